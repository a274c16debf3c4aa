//! Workers that are another user than the daemon: it is so, for every thread, and what outlives a worker
//! or a daemon does so all the same.

use std::os::unix::fs::PermissionsExt;

use farbus_compute_agent::api::AttachmentState;
use farbus_compute_agent::sandbox::user::{User, resolve};
use farbus_integration::attached;
use farbus_integration::daemon::Daemon;
use farbus_integration::deadline::Deadline;
use farbus_integration::error::Result;
use farbus_integration::report::TestResult;
use farbus_integration::scratch::Scratch;
use farbus_integration::service::Service;
use farbus_integration::skip;
use rustix::process::{Pid, Signal, geteuid, kill_process};

use crate::bed::vfio_user;
use crate::load::Load;

const ID: &str = "vm1";
const NOBODY: &str = "nobody";

/// That every thread of the process is this user, of this group only, without capabilities.
fn is_user(pid: u32, user: User) {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let tasks: Vec<_> = tasks.map(|task| task.unwrap().path()).collect();
    assert!(!tasks.is_empty());
    let User { uid, gid } = user;
    for task in tasks {
        let status = std::fs::read_to_string(task.join("status")).unwrap();
        for line in [
            format!("Uid:\t{uid}\t{uid}\t{uid}\t{uid}"),
            format!("Gid:\t{gid}\t{gid}\t{gid}\t{gid}"),
            "Groups:\t ".to_owned(),
            "CapPrm:\t0000000000000000".to_owned(),
        ] {
            let line = line.trim_end();
            let has = status.lines().any(|found| found.trim_end() == line);
            assert!(has, "{line:?} is not in {status}");
        }
    }
}

/// Waits for the worker that comes after this one.
fn successor(service: &Service, last: u32) -> Result<u32> {
    let deadline = Deadline::secs(60);
    loop {
        let now = service.attachment(ID)?.unwrap();
        let worker = now.worker.as_ref().filter(|worker| worker.pid != last);
        match (now.state, worker) {
            (AttachmentState::Ready, Some(worker)) => return Ok(worker.pid),
            _ if deadline.has_passed() => {
                return Err(deadline.missed_with("another worker", &format!("{now:?}")));
            }
            _ => {}
        }
    }
}

#[test]
fn worker_of_another_user_is_replaced_and_finds_the_next_daemon() -> TestResult {
    if !geteuid().is_root() {
        skip!("only root starts processes of other users");
    }
    let user = resolve(NOBODY)?;
    let scratch = Scratch::new("nobody")?;
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(scratch.path(), mode)?;
    let config = scratch.join("agent.toml");
    std::fs::write(&config, format!("[agent]\nworker-user = \"{NOBODY}\"\n"))?;
    let server = attached::serve("backing=memory,size=64MiB")?;
    let rack = format!("rack1={}", attached::address(&server));
    let config = config.display().to_string();
    let mut service = Service::start(&scratch, &[rack], &["--config", &config])?;
    let first = service.attach(ID, &vfio_user("rack1/disk0"))?;
    let mut worker = first.worker.unwrap().pid;
    is_user(worker, user);
    let mut load = Load::start(&first)?;

    for round in 0..6u64 {
        load.goes_on(&service, ID, 200 + round * 100)?;
        if round % 2 == 0 {
            service.kill()?;
            service.restart()?;
            // It is the same one, and what the new daemon was given is good for a successor.
            assert_eq!(service.workers(), [worker], "round {round}");
        }
        kill_process(Pid::from_raw(worker.try_into()?).unwrap(), Signal::KILL)?;
        worker = successor(&service, worker)?;
        is_user(worker, user);
    }

    load.goes_on(&service, ID, 200)?;
    load.end()?;
    let last = service.attachment(ID)?.unwrap();
    assert_eq!(last.statistics.unwrap().errors, 0);
    assert_eq!(last.state, AttachmentState::Ready);
    service.detach(ID, false)?;
    assert!(service.workers().is_empty());
    assert_eq!(service.remains(), Vec::<std::path::PathBuf>::new());
    Ok(())
}

#[test]
fn user_that_workers_cannot_be_is_refused_at_start() -> TestResult {
    if !geteuid().is_root() {
        skip!("only root starts processes of other users");
    }
    // The scratch directory is root's alone: a worker would not find the next daemon.
    let scratch = Scratch::new("shut")?;
    let path = |name: &str| scratch.join(name).display().to_string();
    let (config, socket) = (path("agent.toml"), path("agent.sock"));
    let (run, state) = (path("run"), path("state"));
    let arguments = [
        "serve",
        "--config",
        &config,
        "--socket",
        &socket,
        "--runtime-dir",
        &run,
        "--state-dir",
        &state,
    ];
    for (user, code, words) in [
        ("no-such-account", 2, "not an account"),
        (NOBODY, 4, "cannot pass"),
    ] {
        std::fs::write(&config, format!("[agent]\nworker-user = \"{user}\"\n"))?;

        let ended = Daemon::run("farbus-compute-agent", &arguments, Deadline::secs(60))?;

        assert_eq!(ended.status.code(), Some(code), "{ended:?}");
        assert!(
            ended.stderr.contains(words),
            "{words:?} is not in {ended:?}"
        );
    }
    Ok(())
}
