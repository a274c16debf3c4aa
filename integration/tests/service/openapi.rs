//! The interface's description: the one in the tree is the daemon's, and the daemon keeps to it.

use std::path::PathBuf;
use std::process::Command;

use farbus_integration::cache::Cache;
use farbus_integration::report::TestResult;
use farbus_integration::service::Service;
use farbus_integration::skip;
use hyper::Method;

use crate::bed::Bed;

fn document() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi/agent.json")
}

#[test]
fn description_in_the_tree_is_the_daemons() -> TestResult {
    let bed = Bed::new("openapi", 1)?;

    let answer = bed.service.ask(Method::GET, "/v1/openapi.json", None)?;

    let served: serde_json::Value = serde_json::from_slice(&answer.body)?;
    let kept: serde_json::Value = serde_json::from_slice(&std::fs::read(document())?)?;
    assert!(
        served == kept,
        "docs/openapi/agent.json is old: farbus-compute-agent openapi > docs/openapi/agent.json"
    );
    assert!(
        served["openapi"]
            .as_str()
            .is_some_and(|version| version.starts_with("3.1"))
    );
    Ok(())
}

/// Forwards connections on TCP to the agent's socket, since schemathesis knows no UNIX sockets.
const FORWARD: &str = r"
import socket, sys, threading
server = socket.create_server(('127.0.0.1', 0))
print(server.getsockname()[1], flush=True)
def pump(a, b):
    try:
        while data := a.recv(65536):
            b.sendall(data)
    except OSError:
        pass
    for end in (a, b):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
while True:
    client, _ = server.accept()
    agent = socket.socket(socket.AF_UNIX)
    agent.connect(sys.argv[1])
    for pair in ((client, agent), (agent, client)):
        threading.Thread(target=pump, args=pair, daemon=True).start()
";

#[test]
fn running_daemon_keeps_to_its_description() -> TestResult {
    let program = Cache::open()?.root().join("schemathesis/bin/schemathesis");
    if !program.exists() {
        skip!(
            "schemathesis is not installed (ci/setup makes {})",
            program.display()
        );
    }
    let bed = Bed::new("schema", 2)?;
    let socket = bed.scratch.join("agent.sock");
    let mut forward = Command::new("python3");
    forward
        .args(["-c", FORWARD])
        .arg(&socket)
        .stdout(std::process::Stdio::piped());
    let mut forward = farbus_integration::process::Process::start("forwarder", forward)?;
    let mut port = String::new();
    let lines = forward.child().stdout.take().unwrap();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(lines), &mut port)?;
    let url = format!("http://127.0.0.1:{}", port.trim());

    let run = Command::new(&program)
        .arg("run")
        .arg(document())
        .args(["--url", &url, "--exclude-path", "/v1/events"])
        .args([
            "--max-examples",
            "25",
            "--seed",
            "7",
            "--request-timeout",
            "30",
        ])
        // That a device exists cannot be said in a schema.
        .args(["--exclude-checks", "positive_data_acceptance"])
        .current_dir(bed.scratch.path())
        .output()?;

    let said = String::from_utf8_lossy(&run.stdout);
    println!("{said}");
    assert!(
        run.status.success(),
        "{}",
        String::from_utf8_lossy(&run.stderr)
    );
    check_alive(&bed.service)?;
    Ok(())
}

fn check_alive(service: &Service) -> TestResult {
    let answer = service.ask(Method::GET, "/healthz", None)?;
    assert_eq!(answer.status, 200);
    Ok(())
}
