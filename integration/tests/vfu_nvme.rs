//! `farbus-vfu-nvme` against everything that it can drive: a drive served at a socket without a
//! fabric, an export that it claims itself, an agent's endpoint, and a drive of its own.

#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it cannot go on"
)]

use farbus_integration::attached::{self, EXPORT};
use farbus_integration::daemon::{Daemon, Ended};
use farbus_integration::deadline::Deadline;
use farbus_integration::scratch::Scratch;
use serde_json::Value;

type TestResult = Result<(), farbus_integration::error::Error>;

const DRIVE: &str = "backing=memory,size=8MiB";
/// Any command here is done well within this, also on a busy machine.
const LIMIT_SECS: u64 = 100;

fn run(command: &str, target: &[&str], options: &[&str]) -> Ended {
    let mut arguments = vec![command];
    arguments.extend_from_slice(target);
    arguments.extend_from_slice(options);
    Daemon::run("farbus-vfu-nvme", &arguments, Deadline::secs(LIMIT_SECS)).unwrap()
}

/// What a command prints that must succeed.
fn json(command: &str, target: &[&str], options: &[&str]) -> Value {
    let ended = run(command, target, &[options, &["--json"]].concat());
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    serde_json::from_str(&ended.stdout).unwrap()
}

fn number(value: &Value, key: &str) -> f64 {
    value[key]
        .as_f64()
        .unwrap_or_else(|| panic!("{key} in {value}"))
}

/// Everything that does not depend on what lies between.
fn exercise(target: &[&str]) {
    let facts = json("identify", target, &[]);
    assert_eq!(facts[0]["size_bytes"], 8 << 20);
    for bs in ["512", "4k", "128k"] {
        let verified = json("verify", target, &["--bs", bs, "--size", "2MiB"]);
        assert_eq!(verified[0]["ok"], true);
        assert_eq!(verified[0]["bytes"], 2 << 20);
    }
    for poll in [&["--poll"][..], &[]] {
        let load = ["--rw", "randrw", "--iodepth", "8", "--queues", "2"];
        let options = [&load[..], &["--count", "500"], poll].concat();
        let measured = json("bench", target, &options);
        let total = &measured["total"];
        assert_eq!(
            (&total["total_ios"], &total["errors"]),
            (&500.into(), &0.into())
        );
        assert_eq!(
            number(total, "read_ios") + number(total, "write_ios"),
            500.0
        );
        let latency = &total["latency_us"];
        assert!(number(latency, "p50") > 0.0);
        assert!(number(latency, "p50") <= number(latency, "max") * 1.01);
        assert!(number(total, "doorbells_per_io") <= 2.0);
    }
}

#[test]
fn a_drive_at_a_socket_is_driven() -> TestResult {
    let scratch = Scratch::new("serve")?;
    let socket = scratch.join("drive.sock").display().to_string();
    let arguments = ["serve", "--soft-nvme", DRIVE, "--socket", &socket];
    let server = Daemon::start("farbus-vfu-nvme", &arguments)?;
    assert_eq!(server.ready_value("vfio-user"), Some(&*socket));
    exercise(&["--vfio-user", &socket]);
    server.terminate()
}

#[test]
fn an_export_is_driven_with_one_message_each_way_for_a_command() -> TestResult {
    let server = attached::serve(DRIVE)?;
    let address = attached::address(&server);
    let target = ["--from", &address, "--export", EXPORT];
    exercise(&target);
    for poll in [&["--poll"][..], &[]] {
        for rw in ["randread", "randwrite"] {
            let options = [&["--rw", rw, "--count", "200"][..], poll].concat();
            let measured = json("bench", &target, &options);
            let total = &measured["total"];
            // A sign of life may come in between, once a second.
            let seconds = number(total, "seconds");
            for key in ["messages_sent_per_io", "messages_received_per_io"] {
                let messages = number(total, key) * 200.0;
                let range = 200.0..=200.0 + seconds.ceil() * 2.0;
                assert!(
                    range.contains(&messages),
                    "{key}: {messages} in {seconds} s"
                );
            }
            let payload = match rw {
                "randread" => "payload_bytes_received_per_io",
                _ => "payload_bytes_sent_per_io",
            };
            assert_eq!(number(total, payload), 4096.0);
        }
    }
    server.terminate()
}

#[test]
fn an_agents_endpoint_is_driven() -> TestResult {
    let scratch = Scratch::new("agent")?;
    let socket = scratch.join("disk0.sock");
    let server = attached::serve(DRIVE)?;
    let agent = attached::attach(&attached::address(&server), &socket)?;
    exercise(&["--vfio-user", &socket.display().to_string()]);
    agent.terminate()?;
    server.terminate()
}

#[test]
fn an_agents_endpoint_with_two_data_threads_is_driven() -> TestResult {
    let scratch = Scratch::new("agent")?;
    let socket = scratch.join("disk0.sock");
    let server = attached::serve(DRIVE)?;
    let agent = attached::attach_with_threads(&attached::address(&server), &socket, 2)?;
    let target = ["--vfio-user", &*socket.display().to_string()];
    exercise(&target);
    let load = ["--rw", "randrw", "--iodepth", "32", "--queues", "4"];
    let measured = json(
        "bench",
        &target,
        &[&load[..], &["--count", "4000"]].concat(),
    );
    assert_eq!(measured["total"]["errors"], 0);
    agent.terminate()?;
    server.terminate()
}

#[test]
fn daemons_that_never_sleep_and_daemons_that_never_look_carry_the_same() -> TestResult {
    for poll in ["always", "never"] {
        let scratch = Scratch::new(poll)?;
        let socket = scratch.join("disk0.sock").display().to_string();
        let export = ["export", "--soft-nvme", DRIVE, "--name", EXPORT];
        let options = ["--listen", "127.0.0.1:0", "--poll", poll];
        let server = Daemon::start("farbus-device-server", &[&export[..], &options].concat())?;
        let address = attached::address(&server);
        let attach = ["attach", "--from", &address, "--export", EXPORT];
        let options = ["--vfio-user", &socket, "--poll", poll];
        let agent = Daemon::start("farbus-compute-agent", &[&attach[..], &options].concat())?;
        exercise(&["--vfio-user", &socket]);
        agent.terminate()?;
        server.terminate()?;
    }
    Ok(())
}

#[test]
fn several_targets_are_measured_together() -> TestResult {
    let targets = ["--soft-nvme", DRIVE, "--soft-nvme", DRIVE];
    let measured = json("bench", &targets, &["--seconds", "0.2", "--warmup", "0.1"]);
    let attachments = measured["attachments"].as_array().unwrap();
    assert_eq!(attachments.len(), 2);
    let sum: f64 = attachments.iter().map(|a| number(a, "total_ios")).sum();
    assert_eq!(number(&measured["total"], "total_ios"), sum);
    assert!(number(&measured["total"], "seconds") >= 0.2);
    Ok(())
}

#[test]
fn a_drive_that_keeps_nothing_is_found_out_with_the_block() {
    let null = ["--soft-nvme", "backing=null,size=1MiB"];
    let ended = run("verify", &null, &[]);
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stdout.contains("block 0 differs"), "{ended:?}");
}

#[test]
fn mistakes_end_with_the_exit_code_that_is_promised() {
    let code =
        |command, target: &[&str], options: &[&str]| run(command, target, options).status.code();
    assert_eq!(code("bench", &[], &[]), Some(2), "no target");
    assert_eq!(code("bench", &["--from", "127.0.0.1:1"], &[]), Some(2));
    let drive = ["--soft-nvme", DRIVE];
    assert_eq!(code("bench", &drive, &["--bs", "x"]), Some(2));
    assert_eq!(
        code("bench", &drive, &["--bs", "1000"]),
        Some(1),
        "no blocks"
    );
    assert_eq!(code("bench", &drive, &["--bs", "2m"]), Some(1), "too long");
    let nobody = ["--vfio-user", "/nonexistent/socket"];
    assert_eq!(code("identify", &nobody, &[]), Some(1));
    // One that works must not hang because another one does not.
    let both = [&drive[..], &nobody[..]].concat();
    assert_eq!(code("bench", &both, &[]), Some(1));
}
