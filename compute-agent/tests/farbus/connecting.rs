//! How the agent is reached: by its socket, or over TCP with certificates.

use std::path::{Path, PathBuf};

use farbus_rest::server::{Shutdown, serve_tls};
use farbus_rest::tls::{Files, TlsListener};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::json;

use crate::standin::{Agent, Ended, farbus};

#[test]
fn agent_that_is_not_there_ends_with_3_and_its_path() {
    let ended = Ended::of(farbus(&["--agent", "/nonexistent/agent.sock", "list"]));

    assert_eq!(ended.code, 3);
    assert!(
        ended.stderr.contains("/nonexistent/agent.sock"),
        "{ended:?}"
    );
    assert!(ended.stderr.contains("No such file"), "{ended:?}");
}

/// An authority, and what it has signed for 127.0.0.1.
struct Pki {
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
}

fn pki(directory: &Path, name: &str) -> Pki {
    let file = |kind: &str, text: String| {
        let path = directory.join(format!("{name}-{kind}.pem"));
        std::fs::write(&path, text).unwrap();
        path
    };
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec!["127.0.0.1".into()]).unwrap();
    let leaf = leaf.signed_by(&key, &authority).unwrap();
    Pki {
        ca: file("ca", authority.pem()),
        cert: file("cert", leaf.pem()),
        key: file("key", key.serialize_pem()),
    }
}

/// Serves the agent's script as the daemon serves TCP: to who shows a certificate of its authority.
fn listen(agent: &Agent, pki: &Pki) -> String {
    let files = Files {
        certificate: pki.cert.clone(),
        key: pki.key.clone(),
        client_ca: pki.ca.clone(),
    };
    let listener = agent
        .runtime()
        .block_on(TlsListener::bind("127.0.0.1:0", &files))
        .unwrap();
    let url = format!("https://{}", listener.address());
    let router = agent.script.router();
    let (trigger, shutdown) = Shutdown::new();
    agent.runtime().spawn(async move {
        let _trigger = trigger;
        serve_tls(listener, router, shutdown).await;
    });
    url
}

fn list_by(url: &str, shown: &Pki, ca: &Path) -> Ended {
    let mut command = farbus(&["--agent", url, "list"]);
    command
        .arg("--cert")
        .arg(&shown.cert)
        .arg("--key")
        .arg(&shown.key)
        .arg("--ca")
        .arg(ca);
    Ended::of(command)
}

#[test]
fn agent_over_tcp_is_asked_with_certificates_on_both_sides() {
    let agent = Agent::start();
    agent
        .script
        .answer("GET /v1/attachments", 200, &json!({"attachments": []}));
    let pki = pki(agent.directory.as_path(), "ours");
    let url = listen(&agent, &pki);

    let ended = list_by(&url, &pki, &pki.ca);

    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(agent.script.asked().len(), 1);
}

#[test]
fn agent_of_another_authority_is_not_asked() {
    let agent = Agent::start();
    let ours = pki(agent.directory.as_path(), "ours");
    let theirs = pki(agent.directory.as_path(), "theirs");
    let url = listen(&agent, &theirs);

    let ended = list_by(&url, &theirs, &ours.ca);

    assert_eq!(ended.code, 3, "{ended:?}");
    assert!(ended.stderr.contains("certificate"), "{ended:?}");
    assert_eq!(agent.script.asked(), []);
}

#[test]
fn certificate_that_the_agent_does_not_know_is_no_answer() {
    let agent = Agent::start();
    let ours = pki(agent.directory.as_path(), "ours");
    let theirs = pki(agent.directory.as_path(), "theirs");
    let url = listen(&agent, &ours);

    let ended = list_by(&url, &theirs, &ours.ca);

    assert!([1, 3].contains(&ended.code), "{ended:?}");
    assert_eq!(agent.script.asked(), []);
}

#[test]
fn https_without_certificates_and_with_unusable_ones_ends_with_2() {
    let agent = Agent::start();
    let pki = pki(agent.directory.as_path(), "ours");

    let none = Ended::of(farbus(&["--agent", "https://192.0.2.1:7421", "list"]));
    let unusable = list_by("https://192.0.2.1:7421", &pki, &pki.key);
    let no_port = list_by("https://192.0.2.1", &pki, &pki.ca);

    assert_eq!(none.code, 2);
    assert!(
        none.stderr.contains("add --cert, --key and --ca"),
        "{none:?}"
    );
    assert_eq!(unusable.code, 2);
    assert!(
        unusable.stderr.contains("no usable certificate in PEM"),
        "{unusable:?}"
    );
    assert_eq!(no_port.code, 2);
    assert!(
        no_port.stderr.contains("write https://HOST:PORT"),
        "{no_port:?}"
    );
}
