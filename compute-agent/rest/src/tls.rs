//! REST on TCP, for hosts that have shown a certificate of an authority that is trusted here. There is
//! no TCP without that.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{self, RootCertStore, ServerConfig};

/// What a server needs to know clients, and to be known; all in PEM.
#[derive(Clone, Debug)]
pub struct Files {
    /// The daemon's certificate, and those between it and its authority's.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The certificates of the authorities that sign clients' certificates.
    pub client_ca: PathBuf,
}

/// Why there is no REST on TCP.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is not what it should be.
    #[error("{path} holds no usable {what} in PEM")]
    Pem {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// The cause.
        #[source]
        source: pem::Error,
    },
    /// A file has no certificate.
    #[error("{path} holds no certificate; it must begin with -----BEGIN CERTIFICATE-----")]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// An authority's certificate cannot be one.
    #[error("{path} holds a certificate that cannot be an authority's")]
    Authority {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: rustls::Error,
    },
    /// Clients cannot be verified.
    #[error("clients cannot be verified with {path}")]
    Verifier {
        /// The file of authorities.
        path: PathBuf,
        /// The cause.
        #[source]
        source: rustls::server::VerifierBuilderError,
    },
    /// Certificate and key are not each other's.
    #[error("the certificate {certificate} and the key {key} cannot be used together")]
    Pair {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's.
        key: PathBuf,
        /// The cause.
        #[source]
        source: rustls::Error,
    },
    /// The address is not to be had.
    #[error("cannot listen on {address}; it must be ADDRESS:PORT of this host, and free")]
    Listen {
        /// What was given.
        address: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// A TCP socket whose clients must show a certificate.
pub struct TlsListener {
    socket: TcpListener,
    address: SocketAddr,
    acceptor: TlsAcceptor,
}

impl TlsListener {
    /// Listens at `address`.
    ///
    /// # Errors
    /// See [`TlsError`].
    pub async fn bind(address: &str, files: &Files) -> Result<Self, TlsError> {
        let config = config(files)?;
        let failed = |source| TlsError::Listen {
            address: address.to_owned(),
            source,
        };
        let socket = TcpListener::bind(address).await.map_err(failed)?;
        Ok(Self {
            address: socket.local_addr().map_err(failed)?,
            socket,
            acceptor: TlsAcceptor::from(Arc::new(config)),
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The next client, which has shown nothing yet.
    ///
    /// # Errors
    /// As accept(2).
    pub async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        self.socket.accept().await
    }

    /// What shakes hands with a client.
    #[must_use]
    pub fn acceptor(&self) -> TlsAcceptor {
        self.acceptor.clone()
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrong = |source| TlsError::Pem {
        path: path.to_owned(),
        what: "certificate",
        source,
    };
    let found = CertificateDer::pem_file_iter(path).map_err(wrong)?;
    let found = found.collect::<Result<Vec<_>, _>>().map_err(wrong)?;
    if found.is_empty() {
        let path = path.to_owned();
        return Err(TlsError::NoCertificate { path });
    }
    Ok(found)
}

fn config(files: &Files) -> Result<ServerConfig, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let mut authorities = RootCertStore::empty();
    for certificate in certificates(&files.client_ca)? {
        let added = authorities.add(certificate);
        added.map_err(|source| TlsError::Authority {
            path: files.client_ca.clone(),
            source,
        })?;
    }
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(authorities), provider.clone())
            .build()
            .map_err(|source| TlsError::Verifier {
                path: files.client_ca.clone(),
                source,
            })?;
    let chain = certificates(&files.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|source| TlsError::Pem {
        path: files.key.clone(),
        what: "key",
        source,
    })?;
    ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| {
            builder
                .with_client_cert_verifier(verifier)
                .with_single_cert(chain, key)
        })
        .map_err(|source| TlsError::Pair {
            certificate: files.certificate.clone(),
            key: files.key.clone(),
            source,
        })
}
