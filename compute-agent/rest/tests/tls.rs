//! REST on TCP: who has a certificate of the right authority is served, nobody else is, and files that
//! cannot be used are named.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::get;
use farbus_rest::handshakes::MAX_HANDSHAKES;
use farbus_rest::server::{self, MAX_CONNECTIONS, Shutdown, Trigger};
use farbus_rest::tls::{Files, TlsError, TlsListener};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

/// An authority and what it has signed.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    der: CertificateDer<'static>,
}

struct Signed {
    pem: String,
    der: CertificateDer<'static>,
    key: KeyPair,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        Self {
            pem: certificate.pem(),
            der: certificate.der().clone(),
            issuer: Issuer::new(params, key),
        }
    }

    fn sign(&self, name: &str) -> Signed {
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Signed {
            pem: certificate.pem(),
            der: certificate.der().clone(),
            key,
        }
    }
}

/// A directory that goes with the test.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("farbus-tls-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn files(&self, authority: &Authority) -> Files {
        let server = authority.sign("localhost");
        Files {
            certificate: self.file("server.pem", &server.pem),
            key: self.file("server.key", &server.key.serialize_pem()),
            client_ca: self.file("ca.pem", &authority.pem),
        }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

async fn serve(files: &Files) -> (std::net::SocketAddr, Trigger) {
    let listener = TlsListener::bind("127.0.0.1:0", files).await.unwrap();
    let address = listener.address();
    let (trigger, shutdown) = Shutdown::new();
    let router = server::finish(Router::new().route("/hello", get(|| async { "hello" })));
    tokio::spawn(server::serve_tls(listener, router, shutdown));
    (address, trigger)
}

/// What a client hears that trusts `authority` and shows `own`, if anything.
async fn ask(
    address: std::net::SocketAddr,
    authority: &Authority,
    own: Option<&Signed>,
) -> std::io::Result<String> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.der.clone()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match own {
        Some(own) => {
            let key = PrivateKeyDer::try_from(own.key.serialize_der()).unwrap();
            builder
                .with_client_auth_cert(vec![own.der.clone()], key)
                .unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("localhost").unwrap();
    let mut stream = TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await?;
    let request = b"GET /hello HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    stream.write_all(request).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

#[tokio::test]
async fn client_with_a_certificate_of_the_authority_is_served() {
    let (directory, authority) = (Directory::new("good"), Authority::new());
    let (address, _trigger) = serve(&directory.files(&authority)).await;

    let answer = ask(address, &authority, Some(&authority.sign("client")))
        .await
        .unwrap();

    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.ends_with("hello"), "{answer}");
}

#[tokio::test]
async fn client_without_a_certificate_is_refused() {
    let (directory, authority) = (Directory::new("none"), Authority::new());
    let (address, _trigger) = serve(&directory.files(&authority)).await;

    let refused = ask(address, &authority, None).await.unwrap_err();

    assert!(
        refused.to_string().contains("CertificateRequired"),
        "{refused}"
    );
}

#[tokio::test]
async fn client_with_a_certificate_of_another_authority_is_refused() {
    let (directory, authority) = (Directory::new("other"), Authority::new());
    let (address, _trigger) = serve(&directory.files(&authority)).await;

    let stranger = Authority::new().sign("client");
    let refused = ask(address, &authority, Some(&stranger)).await;

    assert!(refused.is_err(), "{refused:?}");
}

#[tokio::test]
async fn client_without_tls_hears_nothing_of_use() {
    let (directory, authority) = (Directory::new("plain"), Authority::new());
    let (address, _trigger) = serve(&directory.files(&authority)).await;
    let mut stream = TcpStream::connect(address).await.unwrap();

    stream
        .write_all(b"GET /hello HTTP/1.1\r\n\r\n")
        .await
        .unwrap();

    let mut answer = Vec::new();
    // The connection is closed, in whatever way.
    let _ = stream.read_to_end(&mut answer).await;
    assert!(!answer.windows(5).any(|window| window == b"hello"));
}

#[tokio::test]
async fn clients_that_show_nothing_are_in_nobodys_way() {
    let (directory, authority) = (Directory::new("silent"), Authority::new());
    let (address, _trigger) = serve(&directory.files(&authority)).await;
    let mut silent = Vec::new();
    for _ in 0..MAX_CONNECTIONS + MAX_HANDSHAKES {
        silent.push(TcpStream::connect(address).await.unwrap());
    }

    let begun = Instant::now();
    let answer = ask(address, &authority, Some(&authority.sign("client"))).await;

    assert!(answer.unwrap().ends_with("hello"));
    println!("answered after {:?}", begun.elapsed());
    // All but the last few have been put out for others, and these in time.
    for (number, stream) in silent.iter_mut().enumerate() {
        let end = tokio::time::timeout(Duration::from_secs(60), stream.read_u8()).await;
        assert!(end.unwrap().is_err(), "connection {number} is not closed");
    }
}

#[tokio::test]
async fn files_that_cannot_be_used_are_named() {
    let (directory, authority) = (Directory::new("files"), Authority::new());
    let good = directory.files(&authority);
    let empty = directory.file("empty.pem", "");
    let broken = "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n";
    let broken = directory.file("broken.pem", broken);
    let none = directory.0.join("none.pem");
    let other_key = directory.file("other.key", &authority.sign("other").key.serialize_pem());
    let with = |change: fn(&mut Files, PathBuf), path: &PathBuf| {
        let mut files = good.clone();
        change(&mut files, path.clone());
        files
    };
    let cases = [
        (
            with(|files, path| files.client_ca = path, &empty),
            "empty.pem",
        ),
        (
            with(|files, path| files.client_ca = path, &broken),
            "broken.pem",
        ),
        (
            with(|files, path| files.certificate = path, &none),
            "none.pem",
        ),
        (with(|files, path| files.key = path, &empty), "empty.pem"),
        (
            with(|files, path| files.key = path, &other_key),
            "other.key",
        ),
    ];

    for (files, name) in cases {
        let refused = TlsListener::bind("127.0.0.1:0", &files)
            .await
            .err()
            .unwrap();
        assert!(refused.to_string().contains(name), "{name}: {refused}");
    }
    let taken = TlsListener::bind("nowhere", &good).await.err().unwrap();
    assert!(matches!(taken, TlsError::Listen { .. }), "{taken}");
}
