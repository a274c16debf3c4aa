//! A daemon's interface over TCP: TLS with certificates on both sides.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};

/// Why nobody can be asked so.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The address is none.
    #[error("'{url}' is no address of an agent; write https://HOST:PORT")]
    Url {
        /// What was given.
        url: String,
    },
    /// A file has not what it should have.
    #[error("{path} has no usable {what} in PEM")]
    File {
        /// The file.
        path: PathBuf,
        /// What it should have.
        what: &'static str,
        /// The cause.
        #[source]
        source: pem::Error,
    },
    /// The files do not go together.
    #[error("the certificate in {path} and its key cannot be used")]
    Unusable {
        /// The certificate's file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: rustls::Error,
    },
}

/// Who is asked, and what is shown to each other.
#[derive(Clone)]
pub struct Tls {
    address: String,
    name: ServerName<'static>,
    connector: TlsConnector,
}

impl Tls {
    /// Asks at `https://HOST:PORT`, where somebody must show a certificate for HOST that `authority` has
    /// signed. `certificate` and `key` are shown in turn.
    ///
    /// # Errors
    /// See [`TlsError`].
    pub fn new(
        url: &str,
        certificate: &Path,
        key: &Path,
        authority: &Path,
    ) -> Result<Self, TlsError> {
        let wrong = || TlsError::Url { url: url.into() };
        let address = url.strip_prefix("https://").ok_or_else(wrong)?;
        let address = address.trim_end_matches('/');
        let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
        port.parse::<u16>().map_err(|_| wrong())?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(host.to_owned()).map_err(|_| wrong())?;
        let mut roots = RootCertStore::empty();
        for root in certificates(authority)? {
            let unusable = |source| TlsError::Unusable {
                path: authority.to_owned(),
                source,
            };
            roots.add(root).map_err(unusable)?;
        }
        let shown = certificates(certificate)?;
        let secret = PrivateKeyDer::from_pem_file(key).map_err(|source| TlsError::File {
            path: key.to_owned(),
            what: "private key",
            source,
        })?;
        let unusable = |source| TlsError::Unusable {
            path: certificate.to_owned(),
            source,
        };
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .with_root_certificates(roots)
            .with_client_auth_cert(shown, secret)
            .map_err(unusable)?;
        Ok(Self {
            address: address.to_owned(),
            name,
            connector: TlsConnector::from(Arc::new(config)),
        })
    }

    pub(super) fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    pub(super) async fn connect(&self) -> io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(&self.address).await?;
        self.connector.connect(self.name.clone(), stream).await
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrong = |source| TlsError::File {
        path: path.to_owned(),
        what: "certificate",
        source,
    };
    let found: Vec<_> = CertificateDer::pem_file_iter(path)
        .map_err(wrong)?
        .collect::<Result<_, _>>()
        .map_err(wrong)?;
    if found.is_empty() {
        return Err(wrong(pem::Error::NoItemsFound));
    }
    Ok(found)
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Tls").field(&self.address).finish()
    }
}
