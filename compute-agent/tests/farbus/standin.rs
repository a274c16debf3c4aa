//! An agent that answers what a test tells it to, and remembers what it was asked.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{Response, StatusCode, header};
use axum::response::IntoResponse;
use farbus_rest::listen::SocketFile;
use farbus_rest::problem::Problem;
use farbus_rest::server::{self, Shutdown, Trigger};
use serde_json::{Value, json};
use vmm_sys_util::tempdir::TempDir;

/// What was asked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Asked {
    /// Method, path and query.
    pub(crate) line: String,
    /// The body, if it is JSON.
    pub(crate) body: Value,
    /// The header Last-Event-ID.
    pub(crate) last_event: Option<String>,
}

/// What to answer to one kind of request.
type Answers = VecDeque<(u16, String, &'static str)>;

#[derive(Clone, Default)]
pub(crate) struct Script {
    answers: Arc<Mutex<Vec<(String, Answers)>>>,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Script {
    /// The next request that begins with `line` is answered so; the last such answer, again and again.
    pub(crate) fn answer(&self, line: &str, status: u16, body: &Value) -> &Self {
        self.add(line, status, body.to_string(), "application/json")
    }

    pub(crate) fn events(&self, text: &str) -> &Self {
        self.add("GET /v1/events", 200, text.into(), "text/event-stream")
    }

    pub(crate) fn refuse(&self, line: &str, problem: &Problem) -> &Self {
        let body = serde_json::to_string(problem).unwrap();
        self.add(line, problem.status, body, "application/problem+json")
    }

    fn add(&self, line: &str, status: u16, body: String, kind: &'static str) -> &Self {
        let mut all = self.answers.lock().unwrap();
        let answer = (status, body, kind);
        match all.iter_mut().find(|(key, _)| key == line) {
            Some((_, answers)) => answers.push_back(answer),
            None => all.push((line.into(), VecDeque::from([answer]))),
        }
        self
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    async fn serve(State(this): State<Self>, request: Request) -> Response<Body> {
        let line = format!("{} {}", request.method(), request.uri());
        let last_event = request.headers().get("last-event-id");
        let last_event = last_event.map(|id| id.to_str().unwrap().to_owned());
        let body = to_bytes(request.into_body(), 1 << 20).await.unwrap();
        let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
        let asked = Asked {
            line: line.clone(),
            body,
            last_event,
        };
        this.asked.lock().unwrap().push(asked);
        let mut all = this.answers.lock().unwrap();
        let found = all.iter_mut().find(|(key, _)| line.starts_with(key));
        let Some((_, answers)) = found else {
            return StatusCode::NOT_IMPLEMENTED.into_response();
        };
        let (status, body, kind) = match answers.len() {
            1 => answers[0].clone(),
            _ => answers.pop_front().unwrap(),
        };
        let status = StatusCode::from_u16(status).unwrap();
        (status, [(header::CONTENT_TYPE, kind)], body).into_response()
    }

    pub(crate) fn router(&self) -> Router {
        Router::new().fallback(Self::serve).with_state(self.clone())
    }
}

/// A running one.
pub(crate) struct Agent {
    pub(crate) script: Script,
    pub(crate) directory: TempDir,
    runtime: tokio::runtime::Runtime,
    trigger: Option<Trigger>,
}

impl Agent {
    pub(crate) fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let mut agent = Self {
            script: Script::default(),
            directory: TempDir::new().unwrap(),
            runtime,
            trigger: None,
        };
        agent.listen();
        agent
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.as_path().join("agent.sock")
    }

    pub(crate) fn runtime(&self) -> &tokio::runtime::Runtime {
        &self.runtime
    }

    fn listen(&mut self) {
        let (trigger, shutdown) = Shutdown::new();
        let _inside = self.runtime.enter();
        let socket = SocketFile::bind(&self.path()).unwrap();
        self.runtime
            .spawn(server::serve(socket, self.script.router(), shutdown));
        self.trigger = Some(trigger);
    }

    /// A command that asks it.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = farbus(arguments);
        command.env("FARBUS_AGENT", self.path());
        command
    }

    /// Runs a command to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Ended {
        Ended::of(self.command(arguments))
    }
}

/// The program, whatever the tester's environment says.
pub(crate) fn farbus(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_farbus"));
    command.args(arguments).stdin(Stdio::null());
    for name in ["FARBUS_AGENT", "FARBUS_CERT", "FARBUS_KEY", "FARBUS_CA"] {
        command.env_remove(name);
    }
    command
}

/// What a command came to.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    pub(crate) fn of(mut command: Command) -> Self {
        let Output {
            status,
            stdout,
            stderr,
        } = command.output().unwrap();
        Self {
            code: status.code().unwrap(),
            stdout: String::from_utf8(stdout).unwrap(),
            stderr: String::from_utf8(stderr).unwrap(),
        }
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap()
    }
}

/// An attachment in the interface's JSON.
pub(crate) fn attachment(id: &str, state: &str, reason: Option<&str>) -> Value {
    json!({
        "id": id,
        "spec": {"device": "rack1/disk0", "endpoint": {"kind": "vfio-user"}},
        "device": "rack1/disk0",
        "state": state,
        "since": "2026-01-01T00:00:00Z",
        "reason": reason,
        "socket": format!("/run/farbus/attachments/{id}.sock"),
        "worker": {"pid": 4711, "restarts": 1},
        "statistics": {
            "reads": 1000, "writes": 500, "others": 0, "errors": 0, "read_bytes": 4_096_000,
            "written_bytes": 2_048_000, "in_flight": 3, "latency_p50_us": 81.5,
            "latency_p99_us": 2500.0, "fabric_rtt_us": 42.0, "reconnects": 0,
        },
    })
}
