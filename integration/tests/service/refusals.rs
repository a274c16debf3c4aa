//! Requests that cannot be: each has its status and its remedy, and leaves nothing behind.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::process::Command;

use farbus_compute_agent::api::AttachmentState;
use farbus_integration::daemon::Daemon;
use farbus_integration::deadline::Deadline;
use farbus_integration::report::TestResult;
use farbus_integration::service::problem;
use farbus_integration::skip;
use hyper::Method;
use serde_json::json;

use crate::bed::{Bed, vfio_user};

#[test]
fn bad_requests_of_every_kind_are_refused_with_the_remedy_and_leave_nothing() -> TestResult {
    let bed = Bed::new("bad", 1)?;
    let service = &bed.service;
    let nobody = bed.scratch.join("nobody.sock").display().to_string();
    let stranger = bed.scratch.join("stranger.sock");
    // It accepts, and says nothing: no QMP.
    let _stranger = UnixListener::bind(&stranger)?;
    let with = |change: serde_json::Value| {
        let mut spec = vfio_user("rack1/d0");
        for (key, value) in change.as_object().unwrap() {
            spec[key] = value.clone();
        }
        spec.to_string()
    };
    let blk = |further: serde_json::Value| {
        let mut endpoint = json!({"kind": "vhost-user-blk"});
        for (key, value) in further.as_object().unwrap() {
            endpoint[key] = value.clone();
        }
        with(json!({"endpoint": endpoint}))
    };
    let one = "/v1/attachments/vm1";
    let long = format!("/v1/attachments/{}", "x".repeat(64));
    let large = with(json!({"device": "x".repeat(70_000)}));
    let cases = [
        (
            one,
            with(json!({"device": "rack1/d9"})),
            404,
            "no-such-device",
        ),
        (
            one,
            with(json!({"device": "rack2/d0"})),
            404,
            "no-such-device",
        ),
        (one, with(json!({"device": "d0"})), 422, "invalid-spec"),
        (
            one,
            with(json!({"device": "rack1/a/b/c"})),
            422,
            "invalid-spec",
        ),
        (one, with(json!({"selector": {}})), 422, "invalid-spec"),
        (one, with(json!({"device": null})), 422, "invalid-spec"),
        (
            one,
            with(json!({"device": null, "selector": {"vendor_id": "intel"}})),
            422,
            "invalid-spec",
        ),
        (
            one,
            with(json!({"device": null, "selector": {"min_capacity_bytes": 1u64 << 60}})),
            404,
            "no-such-device",
        ),
        (one, with(json!({"colour": "red"})), 422, "invalid-body"),
        (
            one,
            with(json!({"endpoint": {"kind": "scsi"}})),
            422,
            "invalid-body",
        ),
        (
            one,
            with(json!({"limits": {"iops": 0}})),
            422,
            "invalid-spec",
        ),
        (
            one,
            with(json!({"limits": {"iops_burst": 5}})),
            422,
            "invalid-spec",
        ),
        (one, blk(json!({"num_queues": 65})), 422, "invalid-spec"),
        (one, blk(json!({"queue_size": 100})), 422, "invalid-spec"),
        (
            one,
            blk(json!({"serial": "two words"})),
            422,
            "invalid-spec",
        ),
        (
            one,
            with(json!({"vm": {"kind": "qemu", "qmp": nobody}})),
            422,
            "vm-unreachable",
        ),
        (
            one,
            with(json!({"vm": {"kind": "qemu", "qmp": stranger}})),
            422,
            "vm-unreachable",
        ),
        (
            one,
            with(json!({"vm": {"kind": "cloud-hypervisor", "api": nobody}})),
            422,
            "vm-unreachable",
        ),
        (
            one,
            with(json!({"vm": {"kind": "qemu", "qmp": "relative.sock"}})),
            422,
            "invalid-spec",
        ),
        (
            one,
            with(json!({"vm": {"kind": "qemu", "qmp": "/a\u{0}b"}})),
            422,
            "invalid-spec",
        ),
        (one, "{\"device\":".to_owned(), 400, "malformed-json"),
        (one, String::new(), 400, "malformed-json"),
        (one, large, 413, "body-too-large"),
        ("/v1/attachments/VM1", with(json!({})), 400, "invalid-id"),
        ("/v1/attachments/%2e%2e", with(json!({})), 400, "invalid-id"),
        ("/v1/attachments/a%2fb", with(json!({})), 400, "invalid-id"),
        ("/v1/attachments/a%ff", with(json!({})), 400, "invalid-path"),
        (&long, with(json!({})), 400, "invalid-id"),
        (
            "/v1/attachments/vm1?wait=61",
            with(json!({})),
            400,
            "invalid-query",
        ),
        (
            "/v1/attachments/vm1?wait=long",
            with(json!({})),
            400,
            "invalid-query",
        ),
        (
            "/v1/attachments/vm1?colour=red",
            with(json!({})),
            400,
            "invalid-query",
        ),
    ];

    for (path, body, status, kind) in cases {
        let shown: String = body.chars().take(200).collect();
        let answer = service.ask(Method::PUT, path, Some(&body))?;
        assert_eq!(answer.status, status, "{path} {shown}: {:?}", answer.body);
        let problem = problem(&answer)?;
        assert_eq!(problem.kind, format!("/problems/{kind}"), "{path} {shown}");
        assert!(
            problem.remedy.is_some() || kind == "invalid-path",
            "{problem:?}"
        );
    }

    assert_eq!(service.attachments()?, []);
    assert_eq!(service.remains(), Vec::<std::path::PathBuf>::new());
    // Nothing is held either: what was refused can be had.
    service.attach("vm1", &vfio_user("rack1/d0"))?;
    Ok(())
}

#[test]
fn unknown_attachment_is_404_for_every_method() -> TestResult {
    let bed = Bed::new("unknown", 1)?;

    for method in [Method::GET, Method::DELETE] {
        let answer = bed.service.ask(method, "/v1/attachments/vm1", None)?;
        let problem = problem(&answer)?;
        assert_eq!(
            (problem.status, &problem.kind[..]),
            (404, "/problems/no-such-attachment")
        );
    }

    Ok(())
}

#[test]
fn device_that_another_has_is_a_conflict() -> TestResult {
    let bed = Bed::new("conflict", 1)?;
    let socket = bed.scratch.join("other.sock");
    let other = farbus_integration::attached::attach_export(&bed.address, "d0", &socket)?;

    let elsewhere = bed.service.refused("vm1", &vfio_user("rack1/d0"))?;
    other.terminate()?;
    bed.service.attach("vm1", &vfio_user("rack1/d0"))?;
    let here = bed.service.refused("vm2", &vfio_user("rack1/d0"))?;

    for problem in [&elsewhere, &here] {
        assert_eq!(
            (problem.status, &problem.kind[..]),
            (409, "/problems/device-claimed")
        );
    }
    assert!(here.detail.contains("vm1"), "{here:?}");
    assert_eq!(bed.service.attachment("vm2")?, None);
    Ok(())
}

#[test]
fn who_asks_for_one_device_twice_at_once_gets_it_once() -> TestResult {
    let bed = Bed::new("race", 1)?;
    let socket = bed.scratch.join("agent.sock");
    let spec = vfio_user("rack1/d0").to_string();
    let ask = |id: &str| {
        Command::new("curl")
            .args(["-s", "-o", "/dev/null", "-w", "%{http_code}", "-X", "PUT"])
            .args([
                "-H",
                "Content-Type: application/json",
                "-d",
                &spec,
                "--unix-socket",
            ])
            .arg(&socket)
            .arg(format!("http://localhost/v1/attachments/{id}?wait=60"))
            .stdout(std::process::Stdio::piped())
            .spawn()
    };
    let Ok(first) = ask("a") else {
        skip!("curl is not installed");
    };
    let others = [ask("a")?, ask("b")?, ask("b")?];

    let mut statuses = vec![String::from_utf8(first.wait_with_output()?.stdout)?];
    for other in others {
        statuses.push(String::from_utf8(other.wait_with_output()?.stdout)?);
    }

    statuses.sort_unstable();
    assert_eq!(statuses, ["200", "202", "409", "409"]);
    assert_eq!(bed.service.workers().len(), 1);
    Ok(())
}

#[test]
fn attachment_that_fails_says_why_and_stays_until_it_is_deleted() -> TestResult {
    let bed = Bed::new("fails", 1)?;
    // Where its socket is to be, there is something else.
    let blocked = bed.service.sockets().join("vm1.sock");
    std::fs::create_dir(&blocked)?;

    let (_, failed) = bed.service.put("vm1", &vfio_user("rack1/d0"))?;

    assert_eq!(failed.state, AttachmentState::Failed);
    let reason = failed.reason.unwrap();
    assert!(reason.contains("vm1.sock"), "{reason}");
    assert!(bed.service.workers().is_empty());
    let gone = bed.service.detach("vm1", false)?;
    assert_eq!(gone.state, AttachmentState::Detached);
    std::fs::remove_dir(&blocked)?;
    bed.service.attach("vm1", &vfio_user("rack1/d0"))?;
    Ok(())
}

#[test]
fn user_who_may_not_is_kept_out_by_the_socket() -> TestResult {
    let bed = Bed::new("user", 1)?;
    let socket = bed.scratch.join("agent.sock");
    let mode = std::fs::metadata(&socket)?.permissions().mode() & 0o777;
    assert_eq!(mode, 0o660);
    // The directory is not what keeps them out.
    let open = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(bed.scratch.path(), open)?;
    let asked = Command::new("setpriv")
        .args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "curl",
            "-sS",
            "--unix-socket",
        ])
        .arg(&socket)
        .arg("http://localhost/v1/attachments")
        .output();
    let asked = match asked {
        Ok(asked) if rustix::process::geteuid().is_root() => asked,
        _ => skip!("only root can become another user"),
    };

    assert!(!asked.status.success());
    assert_eq!(asked.stdout, b"");
    Ok(())
}

#[test]
fn daemon_that_cannot_be_says_why() -> TestResult {
    let bed = Bed::new("cannot", 1)?;
    let path = |name: &str| bed.scratch.join(name).display().to_string();
    let run = |arguments: &[&str]| {
        let arguments = [&["serve"], arguments].concat();
        Daemon::run("farbus-compute-agent", &arguments, Deadline::secs(60))
    };
    std::fs::write(bed.scratch.join("bad.toml"), "[agent]\ncolour = 1\n")?;
    let (other, state) = (path("other.sock"), path("state"));
    let (run2, state2) = (path("run2"), path("state2"));
    std::fs::write(bed.scratch.join("cert.pem"), "no PEM")?;
    let tls = format!(
        "[agent.tls]\nlisten = \"127.0.0.1:0\"\ncertificate = \"{0}\"\nkey = \"{0}\"\nclient-ca = \"{0}\"\n",
        path("cert.pem")
    );
    std::fs::write(bed.scratch.join("tls.toml"), tls)?;
    let fresh = [
        "--socket",
        &other,
        "--runtime-dir",
        &run2,
        "--state-dir",
        &state2,
    ];
    let (bad, none, bad_tls) = (path("bad.toml"), path("none.toml"), path("tls.toml"));
    let taken = path("agent.sock");
    let with_tls = [&fresh[..], &["--config", &bad_tls]].concat();
    let cases: [(&[&str], i32, &str); 6] = [
        (&["--config", &bad], 2, "colour"),
        (&["--config", &none], 2, "none.toml"),
        (&["--device-server", "rack1"], 2, "NAME=HOST:PORT"),
        (
            &[
                "--socket",
                &other,
                "--runtime-dir",
                &run2,
                "--state-dir",
                &state,
            ],
            4,
            "in use",
        ),
        (
            &[
                "--socket",
                &taken,
                "--runtime-dir",
                &run2,
                "--state-dir",
                &state2,
            ],
            4,
            "in use",
        ),
        (&with_tls, 2, "cert.pem"),
    ];

    for (arguments, code, word) in cases {
        let ended = run(arguments)?;
        assert_eq!(ended.status.code(), Some(code), "{arguments:?}: {ended:?}");
        assert!(ended.stderr.contains(word), "{word:?} is not in {ended:?}");
    }

    Ok(())
}
