//! A server and its clients over a real socket: what a daemon's interface does whatever its routes are.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::convert::Infallible;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::Router;
use axum::response::IntoResponse;
use axum::response::sse::{Event, Sse};
use axum::routing::{get, put};
use farbus_rest::client::{Client, ClientError};
use farbus_rest::extract::{BODY_LIMIT, Json, Query};
use farbus_rest::listen::{ListenError, SocketFile};
use farbus_rest::problem::Problem;
use farbus_rest::server::{self, Shutdown, Trigger};
use hyper::body::Bytes;
use hyper::{Method, header};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Thing {
    size: u32,
}

/// A directory that goes with the test.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("farbus-rest-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Server {
    client: Client,
    path: PathBuf,
    trigger: Trigger,
    task: JoinHandle<()>,
    _directory: Directory,
}

fn start(name: &str) -> Server {
    let directory = Directory::new(name);
    let path = directory.0.join("api.sock");
    let (trigger, shutdown) = Shutdown::new();
    let ends = shutdown.clone();
    let router = Router::new()
        .route(
            "/thing",
            put(|Json(thing): Json<Thing>| async { axum::Json(thing) }),
        )
        .route(
            "/query",
            get(|Query(thing): Query<Thing>| async { axum::Json(thing) }),
        )
        .route("/stream", get(move || async { stream(ends) }));
    let socket = SocketFile::bind(&path).unwrap();
    let task = tokio::spawn(server::serve(socket, server::finish(router), shutdown));
    Server {
        client: Client::new(&path, PATIENCE),
        path,
        trigger,
        task,
        _directory: directory,
    }
}

/// One event, then silence until the shutdown.
fn stream(ends: Shutdown) -> impl IntoResponse {
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        let event = Event::default().event("a").id("1").data("x");
        sender.send(Ok::<_, Infallible>(event)).await.unwrap();
        ends.requested().await;
    });
    Sse::new(ReceiverStream::new(receiver))
}

async fn problem(server: &Server, method: Method, path: &str, json: bool, body: &str) -> Problem {
    let headers = [(header::CONTENT_TYPE, "application/json")];
    let headers = if json { &headers[..] } else { &[] };
    let body = Bytes::copy_from_slice(body.as_bytes());
    let answer = server
        .client
        .raw(method, path, headers, body)
        .await
        .unwrap();
    assert_eq!(
        answer.headers[header::CONTENT_TYPE],
        "application/problem+json"
    );
    let problem: Problem = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(problem.status, answer.status.as_u16());
    assert!(problem.remedy.is_some(), "{problem:?} says what helps");
    problem
}

#[tokio::test]
async fn each_bad_request_has_its_status_and_kind() {
    let server = start("bad");
    let large = "x".repeat(BODY_LIMIT + 1);
    let cases = [
        (Method::GET, "/nothing", false, "", 404, "no-such-path"),
        (Method::GET, "/thing", false, "", 405, "method-not-allowed"),
        (
            Method::PUT,
            "/thing",
            false,
            "{}",
            415,
            "unsupported-media-type",
        ),
        (Method::PUT, "/thing", true, "", 400, "malformed-json"),
        (
            Method::PUT,
            "/thing",
            true,
            "{\"size\":",
            400,
            "malformed-json",
        ),
        (
            Method::PUT,
            "/thing",
            true,
            "{\"size\":-1}",
            422,
            "invalid-body",
        ),
        (
            Method::PUT,
            "/thing",
            true,
            "{\"size\":1,\"colour\":2}",
            422,
            "invalid-body",
        ),
        (
            Method::PUT,
            "/thing",
            true,
            large.as_str(),
            413,
            "body-too-large",
        ),
        (
            Method::GET,
            "/query?size=much",
            false,
            "",
            400,
            "invalid-query",
        ),
        (
            Method::GET,
            "/query?size=1&colour=2",
            false,
            "",
            400,
            "invalid-query",
        ),
    ];

    for (method, path, json, body, status, kind) in cases {
        let shown = format!("{method} {path}");
        let problem = problem(&server, method, path, json, body).await;
        assert_eq!(problem.status, status, "{shown}: {problem:?}");
        assert_eq!(problem.kind, format!("/problems/{kind}"), "{shown}");
    }
}

#[tokio::test]
async fn unknown_field_is_named() {
    let server = start("field");

    let problem = problem(&server, Method::PUT, "/thing", true, "{\"colour\":2}").await;

    assert!(problem.detail.contains("colour"), "{problem:?}");
}

#[tokio::test]
async fn good_request_is_answered() {
    let server = start("good");

    let (status, back): (_, Thing) = server
        .client
        .put("/thing", &Thing { size: 7 })
        .await
        .unwrap();

    assert_eq!((status.as_u16(), back), (200, Thing { size: 7 }));
}

#[tokio::test]
async fn method_that_is_not_allowed_comes_with_those_that_are() {
    let server = start("allow");

    let answer = server
        .client
        .raw(Method::GET, "/thing", &[], Bytes::new())
        .await
        .unwrap();

    assert_eq!(answer.headers[header::ALLOW], "PUT");
}

#[tokio::test]
async fn shutdown_ends_streams_and_removes_the_socket() {
    let server = start("shutdown");
    let mut events = server.client.events("/stream", None).await.unwrap();
    let first = events.next().await.unwrap();

    server.trigger.pull();

    assert_eq!((first.name.as_str(), first.data.as_str()), ("a", "x"));
    let ended = tokio::time::timeout(PATIENCE, events.next()).await.unwrap();
    assert_eq!(ended, None);
    tokio::time::timeout(PATIENCE, server.task)
        .await
        .unwrap()
        .unwrap();
    assert!(!server.path.exists());
    let gone = server.client.get::<Thing>("/query?size=1").await;
    assert!(matches!(gone, Err(ClientError::Connect { .. })), "{gone:?}");
}

#[tokio::test]
async fn bytes_that_are_no_request_end_their_own_connection_only() {
    let server = start("garbage");
    let mut stream = UnixStream::connect(&server.path).await.unwrap();

    stream
        .write_all(b"\x16\x03\x01 no HTTP at all\r\n\r\n")
        .await
        .unwrap();

    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    assert!(rest.starts_with(b"HTTP/1.1 400"), "{rest:?}");
    let thing: Thing = server.client.get("/query?size=1").await.unwrap();
    assert_eq!(thing, Thing { size: 1 });
}

#[tokio::test]
async fn socket_is_for_owner_and_group_and_replaces_a_dead_one() {
    let directory = Directory::new("socket");
    let path = directory.0.join("made/api.sock");
    std::fs::create_dir(path.parent().unwrap()).unwrap();
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());

    let socket = SocketFile::bind(&path).unwrap();

    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o660
    );
    assert!(matches!(
        SocketFile::bind(&path),
        Err(ListenError::InUse { .. })
    ));
    drop(socket);
    assert!(!path.exists());
}

#[tokio::test]
async fn what_is_no_socket_is_left_alone() {
    let directory = Directory::new("file");
    let path = directory.0.join("api.sock");
    std::fs::write(&path, "precious").unwrap();

    let refused = SocketFile::bind(&path);

    assert!(matches!(refused, Err(ListenError::NotASocket { .. })));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    let long = Path::new("/tmp").join("x".repeat(200));
    assert!(matches!(
        SocketFile::bind(&long),
        Err(ListenError::PathLength { len: 205, .. })
    ));
}
