//! What dies, and what goes on: the daemon, a worker, a device server, at any moment.

use std::time::Duration;

use farbus_compute_agent::api::AttachmentState;
use farbus_integration::deadline::Deadline;
use farbus_integration::report::TestResult;
use hyper::Method;
use rustix::process::{Pid, Signal, kill_process};

use crate::bed::{BLOCK, Bed, drive, prove, vfio_user};

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), signal).unwrap();
}

#[test]
fn attachments_go_on_while_the_daemon_is_away() -> TestResult {
    let mut bed = Bed::new("upgrade", 1)?;
    let before = bed.service.attach("vm1", &vfio_user("rack1/d0"))?;
    let mut driver = drive(&before);
    driver.write(1, 0, BLOCK, &[5; 4096]).unwrap();

    bed.service.terminate()?;
    let mut back = [0; 4096];
    driver.read(1, 0, BLOCK, &mut back).unwrap();
    bed.service.restart()?;

    assert_eq!(back, [5; 4096]);
    let after = bed.service.attachment("vm1")?.unwrap();
    assert_eq!(after.state, AttachmentState::Ready);
    assert_eq!((after.worker, after.since), (before.worker, before.since));
    driver.read(1, 0, BLOCK, &mut back).unwrap();
    drop(driver);
    bed.service.detach("vm1", false)?;
    assert!(bed.service.workers().is_empty());
    Ok(())
}

#[test]
fn daemon_killed_at_any_moment_leaves_nothing_half_made() -> TestResult {
    let mut bed = Bed::new("killed", 1)?;
    let spec = vfio_user("rack1/d0");
    let mut seen = std::collections::BTreeMap::new();
    for round in 0..24u32 {
        let path = "/v1/attachments/vm1";
        // Odd rounds find it attached, and kill the daemon while it is taken away.
        let method = if round % 2 == 0 {
            Method::PUT
        } else {
            Method::DELETE
        };
        let body = (round % 2 == 0).then(|| spec.to_string());
        let answer = bed.service.ask(method, path, body.as_deref())?;
        assert_eq!(answer.status, 202, "round {round}: {:?}", answer.body);
        // From at once to about when it is done.
        let moment = Deadline::after(Duration::from_millis(u64::from(round / 2) * 4));
        while !moment.has_passed() {
            std::hint::spin_loop();
        }
        bed.service.kill()?;
        bed.service.restart()?;

        let found = bed.service.attachment("vm1")?.map(|it| it.state);
        *seen
            .entry(format!("{:?} {found:?}", round % 2))
            .or_insert(0) += 1;
        if round % 2 == 0 {
            let attachment = bed.service.attach("vm1", &spec)?;
            prove(&attachment, round as u8);
            assert_eq!(bed.service.workers().len(), 1, "round {round}");
        } else {
            // It may be gone before this comes.
            bed.service
                .ask(Method::DELETE, "/v1/attachments/vm1?wait=60", None)?;
            assert_eq!(bed.service.attachment("vm1")?, None);
            assert!(bed.service.workers().is_empty(), "round {round}");
            assert_eq!(bed.service.remains(), Vec::<std::path::PathBuf>::new());
        }
    }
    println!("what the next daemon found, attaching (0) and detaching (1): {seen:#?}");
    Ok(())
}

#[test]
fn killed_worker_is_replaced() -> TestResult {
    let bed = Bed::new("worker", 1)?;
    let service = &bed.service;
    let first = service.attach("vm1", &vfio_user("rack1/d0"))?;
    prove(&first, 1);
    let mut events = service.events(0)?;
    let is_ready =
        |event: &farbus_integration::service::Event| event.state == AttachmentState::Ready;
    service.until(&mut events, Deadline::secs(60), is_ready)?;

    signal(first.worker.unwrap().pid, Signal::KILL);

    let seen = service.until(&mut events, Deadline::secs(60), is_ready)?;
    assert_eq!(seen[0].state, AttachmentState::Degraded);
    assert!(
        seen[0].reason.as_ref().unwrap().contains("signal"),
        "{seen:?}"
    );
    let second = service.attachment("vm1")?.unwrap();
    assert_eq!(second.worker.unwrap().restarts, 1);
    assert_eq!(service.workers(), [second.worker.unwrap().pid]);
    prove(&second, 2);
    Ok(())
}

#[test]
fn worker_that_died_while_the_daemon_was_away_is_replaced() -> TestResult {
    let mut bed = Bed::new("both", 1)?;
    let first = bed.service.attach("vm1", &vfio_user("rack1/d0"))?;
    bed.service.kill()?;
    signal(first.worker.unwrap().pid, Signal::KILL);

    bed.service.restart()?;

    bed.service
        .wait_state("vm1", AttachmentState::Ready, Deadline::secs(60))?;
    prove(&bed.service.attachment("vm1")?.unwrap(), 3);
    Ok(())
}

#[test]
fn attachment_is_taken_away_although_its_device_server_is_dead() -> TestResult {
    let mut bed = Bed::new("dead", 1)?;
    bed.service.attach("vm1", &vfio_user("rack1/d0"))?;
    bed.kill_server()?;

    let gone = bed.service.detach("vm1", false)?;

    assert_eq!(gone.state, AttachmentState::Detached);
    assert!(bed.service.workers().is_empty());
    bed.restart_server()?;
    prove(&bed.service.attach("vm1", &vfio_user("rack1/d0"))?, 4);
    Ok(())
}

#[test]
fn worker_that_does_not_end_is_killed() -> TestResult {
    let bed = Bed::new("stuck", 1)?;
    let attachment = bed.service.attach("vm1", &vfio_user("rack1/d0"))?;
    signal(attachment.worker.unwrap().pid, Signal::STOP);

    let gone = bed.service.detach("vm1", false)?;

    assert_eq!(gone.state, AttachmentState::Detached);
    assert!(bed.service.workers().is_empty());
    Ok(())
}

#[test]
fn workers_end_with_the_daemon_when_the_host_goes_down() -> TestResult {
    let mut bed = Bed::new("host", 2)?;
    for (id, device) in [("a", "rack1/d0"), ("b", "rack1/d1")] {
        bed.service.attach(id, &vfio_user(device))?;
    }
    let workers = bed.service.workers();
    assert_eq!(workers.len(), 2);

    signal(bed.service.daemon()?.pid(), Signal::USR1);
    bed.service.terminate()?;

    for worker in workers {
        let ended = Deadline::secs(30);
        while std::path::Path::new(&format!("/proc/{worker}")).exists() {
            assert!(!ended.has_passed(), "worker {worker} lives");
            std::thread::yield_now();
        }
    }
    // They are not forgotten: the host may come back.
    bed.service.restart()?;
    bed.service
        .wait_state("a", AttachmentState::Ready, Deadline::secs(60))?;
    Ok(())
}
