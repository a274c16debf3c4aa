//! Many attachments: one after the other, and at the same time.

use std::time::Instant;

use farbus_compute_agent::api::{AttachmentState, DeviceState};
use farbus_integration::deadline::Deadline;
use farbus_integration::procfs::Proc;
use farbus_integration::report::{Failure, TestResult};
use hyper::Method;

use crate::bed::{Bed, prove, vfio_user};

/// What must not grow: descriptors of the daemon and of the device server, and the daemon's memory.
fn used(bed: &Bed) -> Result<([usize; 2], u64), Failure> {
    let agent = bed.service.daemon()?.proc();
    let server = bed.server.as_ref().unwrap().proc();
    let files = [agent.open_files()?.len(), server.open_files()?.len()];
    Ok((files, agent.anonymous_bytes()?))
}

#[test]
fn fifty_cycles_leave_nothing_behind() -> TestResult {
    let bed = Bed::new("cycles", 1)?;
    let service = &bed.service;
    let cycle = |round: u8| -> TestResult {
        let attachment = service.attach("vm1", &vfio_user("rack1/d0"))?;
        if round % 10 == 0 {
            prove(&attachment, round);
        }
        assert_eq!(
            service.detach("vm1", false)?.state,
            AttachmentState::Detached
        );
        Ok(())
    };
    for round in 0..5 {
        cycle(round)?;
    }
    let (files, memory) = used(&bed)?;
    let begun = Instant::now();

    for round in 0..50 {
        cycle(round)?;
    }

    let took = begun.elapsed() / 50;
    let device = &service.devices("")?.devices[0];
    assert_eq!((device.state, &device.holder), (DeviceState::Free, &None));
    let (files_after, memory_after) = used(&bed)?;
    println!(
        "a cycle: {took:?}; files {files:?} → {files_after:?}; anonymous memory {memory} → {memory_after}"
    );
    // A connection or two may be about to be closed.
    assert!(
        files_after[0] <= files[0] + 2,
        "{files:?} → {files_after:?}"
    );
    assert!(
        files_after[1] <= files[1] + 2,
        "{files:?} → {files_after:?}"
    );
    assert!(
        memory_after <= memory + (1 << 20),
        "{memory} → {memory_after}"
    );
    assert!(service.workers().is_empty());
    assert_eq!(service.remains(), Vec::<std::path::PathBuf>::new());
    Ok(())
}

#[test]
fn hundred_attachments_are_made_fast_and_idle_for_almost_nothing() -> TestResult {
    const COUNT: usize = 100;
    let bed = Bed::new("hundred", COUNT)?;
    let service = &bed.service;
    let begun = Instant::now();

    for number in 0..COUNT {
        let spec = vfio_user(&format!("rack1/d{number}")).to_string();
        let path = format!("/v1/attachments/vm{number}");
        let answer = service.ask(Method::PUT, &path, Some(&spec))?;
        assert_eq!(answer.status, 202, "{:?}", answer.body);
    }
    for number in 0..COUNT {
        let id = format!("vm{number}");
        service.wait_state(&id, AttachmentState::Ready, Deadline::secs(120))?;
    }

    let each = begun.elapsed() / COUNT as u32;
    let workers = service.workers();
    assert_eq!(workers.len(), COUNT);
    let mut private = 0;
    let mut proportional = 0;
    for worker in &workers {
        private += Proc::of(*worker).anonymous_bytes()?;
        proportional += Proc::of(*worker).proportional_bytes()?;
    }
    let daemon = service.daemon()?.proc();
    let cpu = || -> Result<[u64; 2], Failure> {
        let mut all = 0;
        for worker in &workers {
            all += Proc::of(*worker).cpu_ns()?;
        }
        Ok([daemon.cpu_ns()?, all])
    };
    let (before, start) = (cpu()?, Instant::now());
    // Nobody asks for anything meanwhile.
    let mut events = service.events(u64::MAX / 2)?;
    let _ = service.until(&mut events, Deadline::secs(2), |_| false);
    let (after, elapsed) = (cpu()?, start.elapsed().as_nanos() as u64);
    let ppm = |index: usize| after[index].saturating_sub(before[index]) * 1_000_000 / elapsed;
    let kib = |bytes: u64| bytes / COUNT as u64 / 1024;
    println!(
        "{each:?} to attach; per worker {} KiB private, {} KiB proportional; daemon {} KiB private; idle: \
         daemon {} millionths of a core, a worker {}",
        kib(private),
        kib(proportional),
        daemon.anonymous_bytes()? / 1024,
        ppm(0),
        ppm(1) / COUNT as u64
    );
    assert!(kib(private) < 16 << 10);
    assert!(daemon.anonymous_bytes()? < 64 << 20);
    assert!(
        ppm(0) < 20_000,
        "the idle daemon takes {} millionths of a core",
        ppm(0)
    );
    assert!(ppm(1) / (COUNT as u64) < 5_000);
    prove(&service.attachment("vm42")?.unwrap(), 42);
    for number in 0..COUNT {
        let path = format!("/v1/attachments/vm{number}");
        service.ask(Method::DELETE, &path, None)?;
    }
    for number in 0..COUNT {
        if service.attachment(&format!("vm{number}"))?.is_some() {
            // Held until it is gone, or gone meanwhile.
            let path = format!("/v1/attachments/vm{number}?wait=60");
            service.ask(Method::DELETE, &path, None)?;
        }
    }
    assert_eq!(service.remains(), Vec::<std::path::PathBuf>::new());
    Ok(())
}
