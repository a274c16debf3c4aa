//! The program itself: its exit codes, its messages, and its ready line.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test stops where it cannot go on")]

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use vmm_sys_util::tempdir::TempDir;

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_farbus-device-server"))
}

fn run(arguments: &[&str]) -> Output {
    program().args(arguments).output().unwrap()
}

fn directory() -> TempDir {
    TempDir::new_with_prefix(std::env::temp_dir().join("farbus-device-server-")).unwrap()
}

/// Runs `export`, which is refused: its exit code and what it said.
fn refused(arguments: &[&str]) -> (Option<i32>, String) {
    let common = ["export", "--listen", "127.0.0.1:0"];
    let output = run(&[&common[..], arguments].concat());
    assert!(output.stdout.is_empty(), "{output:?}");
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

/// Runs `export` until it is ready, ends it with SIGTERM, and returns its first line.
fn ready(arguments: &[&str]) -> String {
    let mut child = program()
        .args(["export", "--listen", "127.0.0.1:0"])
        .args(arguments)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    out.read_line(&mut line).unwrap();
    let pid = child.id().to_string();
    let killed = Command::new("kill").args(["-TERM", &pid]).status().unwrap();
    assert!(killed.success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    line
}

#[test]
fn the_ready_line_of_one_export_names_it() {
    let directory = directory();
    let drive = format!("path={}/a,size=1MiB", directory.as_path().display());
    let line = ready(&["--soft-nvme", &drive, "--name", "disk0"]);
    assert!(
        line.starts_with("ready export=disk0 listen=127.0.0.1:"),
        "{line}"
    );
}

#[test]
fn the_ready_line_of_several_exports_names_each() {
    let directory = directory();
    let drive = |name: &str| {
        let path = directory.as_path().join(name);
        format!("path={},size=1MiB,name={name}", path.display())
    };
    let arguments = ["--soft-nvme", &drive("a"), "--soft-nvme", &drive("b")];
    let line = ready(&arguments);
    assert!(
        line.starts_with("ready export=a export=b listen="),
        "{line}"
    );
    let json = ready(&[&arguments[..], &["--json"]].concat());
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["exports"], serde_json::json!(["a", "b"]));
}

#[test]
fn the_json_ready_line_of_one_export_has_it_by_itself_too() {
    let directory = directory();
    let drive = format!("path={}/a,size=1MiB", directory.as_path().display());
    let json = ready(&["--soft-nvme", &drive, "--name", "disk0", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["export"], "disk0");
    assert_eq!(json["exports"], serde_json::json!(["disk0"]));
}

#[test]
fn a_drive_that_is_not_there_ends_with_3_and_its_path() {
    let (code, message) = refused(&["--soft-nvme", "path=/nonexistent/disk", "--name", "a"]);
    assert_eq!(code, Some(3));
    assert!(message.contains("/nonexistent/disk"), "{message}");
}

#[test]
fn a_socket_that_is_not_there_ends_with_3_and_its_path() {
    let (code, message) = refused(&["--vfio-user-device", "path=/nonexistent/socket,name=a"]);
    assert_eq!(code, Some(3));
    assert!(message.contains("/nonexistent/socket"), "{message}");
    assert!(message.contains("is its server running?"), "{message}");
}

#[test]
fn a_vfio_user_server_that_says_nothing_is_given_up() {
    let directory = directory();
    let path = directory.as_path().join("socket");
    let _silent = UnixListener::bind(&path).unwrap();
    let begin = Instant::now();
    let spec = format!("path={},name=a", path.display());
    let (code, message) = refused(&["--vfio-user-device", &spec]);
    assert_eq!(code, Some(3));
    assert!(
        message.contains("did not answer Version within 2s"),
        "{message}"
    );
    assert!(begin.elapsed() < Duration::from_secs(20));
}

#[test]
fn values_that_cannot_be_are_refused_with_2_and_named() {
    for (arguments, text) in [
        (
            &["--pci", "0000:01:00"][..],
            "\"0000:01:00\" is not the address of a PCI function",
        ),
        (&["--pci", "0000:01:00.0,name=a/b"], "a/b"),
        (&["--sriov", "0000:01:00.0"], "vfs=COUNT"),
        (
            &["--soft-nvme", "path=x,colour=red", "--name", "a"],
            "colour",
        ),
        (&[], "nothing to export"),
    ] {
        let (code, message) = refused(arguments);
        assert_eq!(code, Some(2), "{message}");
        assert!(message.contains(text), "{message}");
    }
}

#[test]
fn an_address_that_others_reach_is_refused_with_4() {
    let output = run(&[
        "export",
        "--soft-nvme",
        "path=/nonexistent,name=a",
        "--listen",
        "0.0.0.0:0",
    ]);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{message}");
    assert!(message.contains("--insecure"), "{message}");
}

#[test]
fn list_and_doctor_print_json_on_whatever_host_this_is() {
    let list = run(&["list", "--json"]);
    assert_eq!(list.status.code(), Some(0));
    let functions: serde_json::Value = serde_json::from_slice(&list.stdout).unwrap();
    assert!(functions.is_array());

    let doctor = run(&["doctor", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let code = match report["can_export"].as_bool().unwrap() {
        true => 0,
        false => 5,
    };
    assert_eq!(doctor.status.code(), Some(code));
}
