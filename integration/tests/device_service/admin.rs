//! The admin interface: who may use it, and what it makes of requests that are none.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use farbus_device_server::service::document;

use super::bed::*;

#[test]
fn the_socket_is_for_owner_and_group_and_goes_with_the_server() {
    let service = Service::start("mode", "", &memory("a"));
    let socket = service.socket();
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    service.server.terminate().unwrap();
    assert!(!socket.exists());
}

#[test]
fn requests_that_are_none_are_answered_with_a_problem() {
    let service = Service::start("requests", "", &memory("a"));
    for (method, path, status) in [
        ("GET", "/", 404),
        ("GET", "/v1/exports/b", 404),
        ("GET", "/v1/exports/a%20b", 400),
        ("PUT", "/v1/exports", 405),
        ("GET", "/v1/reload", 405),
    ] {
        let (got, problem) = service.ask(method, path);
        assert_eq!(got, status, "{method} {path}: {problem}");
        assert!(problem["remedy"].is_string(), "{method} {path}: {problem}");
    }
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(1 << 20));
    for bytes in [long.as_bytes(), b"nonsense\r\n\r\n"] {
        let (status, ..) = service.raw(bytes);
        assert!((400..500).contains(&status), "{status}");
    }
    assert_eq!(service.ask("GET", "/healthz").0, 200);
    service.server.terminate().unwrap();
}

#[test]
fn metrics_have_every_export_and_what_was_refused() {
    let service = Service::start("metrics", "", &memory("a"));
    let _claimed = service.claim("a", "tenant").unwrap();
    assert!(service.claim("none", "tenant").is_err());
    let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let (status, _, text) = service.raw(request);
    assert_eq!(status, 200);
    for line in [
        "farbus_device_server_draining 0",
        "farbus_device_server_export_state{export=\"a\",state=\"claimed\"} 1",
        "farbus_device_server_export_claimed{export=\"a\"} 1",
        "farbus_device_server_export_claims_total{export=\"a\"} 1",
        "farbus_device_server_refusals_total{reason=\"unknown_export\"} 1",
    ] {
        assert!(text.contains(line), "{line} is not in:\n{text}");
    }
    service.server.terminate().unwrap();
}

/// `FARBUS_BLESS=1` writes the file anew.
#[test]
fn the_openapi_document_in_the_tree_is_the_servers() {
    let service = Service::start("openapi", "", &memory("a"));
    let (status, served) = service.ask("GET", "/v1/openapi.json");
    assert_eq!(status, 200);
    assert_eq!(served, document());
    assert!(served["openapi"].as_str().unwrap().starts_with("3.1"));
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi/device-server.json");
    let text = format!("{}\n", serde_json::to_string_pretty(&served).unwrap());
    if std::env::var_os("FARBUS_BLESS").is_some() {
        std::fs::write(&file, &text).unwrap();
    }
    assert_eq!(
        std::fs::read_to_string(&file).unwrap(),
        text,
        "docs/openapi/device-server.json is out of date; FARBUS_BLESS=1 writes it"
    );
    let (_, version) = service.ask("GET", "/v1/version");
    assert_eq!(version["newest_protocol"], 3);
    service.server.terminate().unwrap();
}
