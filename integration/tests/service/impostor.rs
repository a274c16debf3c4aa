//! Processes that say they are workers: what is held for an attachment is for the process that the daemon
//! has started, whatever another one of the same user says, and whenever.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use farbus_compute_agent::api::AttachmentState;
use farbus_compute_agent::custody::messages::{FromKeeper, FromWorker, VERSION};
use farbus_compute_agent::custody::socket::Socket;
use farbus_integration::deadline::Deadline;
use farbus_integration::report::TestResult;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal, kill_process};

use crate::bed::{Bed, prove, vfio_user};
use crate::load::Load;

const ID: &str = "vm1";

/// What the daemon answers to who says that it carries the attachment.
fn claim(custody: &Path, live: bool) -> FromKeeper {
    let socket = Socket::connect(custody).unwrap();
    let hello = FromWorker::Hello {
        version: VERSION,
        id: ID.into(),
        pid: std::process::id(),
        live,
    };
    assert!(socket.send(&hello, &[]).unwrap());
    loop {
        poll(&mut [PollFd::new(&socket, PollFlags::IN)], None).unwrap();
        if let Some((said, fds)) = socket.receive().unwrap() {
            assert!(fds.is_empty());
            return said;
        }
    }
}

#[test]
fn another_process_gets_nothing_before_and_after_the_death_of_the_worker() -> TestResult {
    let bed = Bed::new("impostor", 1)?;
    let service = &bed.service;
    let first = service.attach(ID, &vfio_user("rack1/d0"))?;
    let worker = first.worker.unwrap().pid;
    let mut load = Load::start(&first)?;
    let custody = bed.scratch.join("run").join("custody.sock");
    let own = std::process::id();

    for live in [false, true] {
        let FromKeeper::Refused { reason } = claim(&custody, live) else {
            panic!("an impostor was not refused");
        };
        assert!(
            reason.contains(&format!("process {own} of user")),
            "{reason}"
        );
        assert!(reason.contains(&format!("is process {worker}")), "{reason}");
        let log = service.daemon()?.stderr();
        assert!(log.contains(&reason), "{log}");
    }
    let over = Arc::new(AtomicBool::new(false));
    let impostor = std::thread::spawn({
        let over = over.clone();
        move || {
            let mut answers = Vec::new();
            while !over.load(Ordering::Relaxed) {
                answers.push(claim(&custody, false));
            }
            answers
        }
    });
    kill_process(Pid::from_raw(worker.try_into()?).unwrap(), Signal::KILL)?;
    let mut events = service.events(0)?;
    service.until(&mut events, Deadline::secs(60), |event| {
        event.state == AttachmentState::Degraded
    })?;
    service.wait_state(ID, AttachmentState::Ready, Deadline::secs(60))?;
    over.store(true, Ordering::Relaxed);

    let answers = impostor.join().unwrap();
    assert!(!answers.is_empty());
    for answer in answers {
        assert!(matches!(answer, FromKeeper::Refused { .. }), "{answer:?}");
    }
    load.goes_on(service, ID, 100)?;
    load.end()?;
    let last = service.attachment(ID)?.unwrap();
    assert_eq!(last.statistics.unwrap().errors, 0);
    assert_eq!(last.worker.unwrap().restarts, 1);
    Ok(())
}

#[test]
fn command_line_like_that_of_a_worker_makes_none_for_the_next_daemon() -> TestResult {
    let mut bed = Bed::new("named", 1)?;
    let first = bed.service.attach(ID, &vfio_user("rack1/d0"))?;
    let worker = first.worker.unwrap().pid;
    let socket = first.socket.unwrap();
    // It waits for its input.
    let mut impostor = Command::new("sh")
        .args([
            "-c",
            "read line",
            "attach",
            "--id",
            ID,
            "--vfio-user",
            &socket,
        ])
        .stdin(Stdio::piped())
        .spawn()?;
    bed.service.kill()?;

    bed.service.restart()?;

    assert_eq!(bed.service.workers(), [worker]);
    let status = impostor.wait()?;
    assert!(!status.success(), "{status}");
    let now = bed.service.attachment(ID)?.unwrap();
    assert_eq!(now.worker.unwrap().pid, worker);
    prove(&now, 5);
    Ok(())
}
