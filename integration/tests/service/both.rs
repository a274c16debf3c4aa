//! Daemon and worker die at once. What they had is in the service manager's store.

use farbus_compute_agent::api::AttachmentState;
use farbus_integration::attached;
use farbus_integration::deadline::Deadline;
use farbus_integration::report::TestResult;
use farbus_integration::scratch::Scratch;
use farbus_integration::service::Service;
use rustix::process::{Pid, Signal, kill_process};

use crate::bed::vfio_user;
use crate::load::Load;
use crate::manager::{Manager, socket};

const ID: &str = "vm1";

#[test]
fn daemon_and_worker_that_die_at_once_are_a_pause_under_a_service_manager() -> TestResult {
    let scratch = Scratch::new("store")?;
    let server = attached::serve("backing=memory,size=64MiB")?;
    let rack = format!("rack1={}", attached::address(&server));
    let mut service = Service::start(&scratch, &[rack], &[])?;
    service.terminate()?;
    let mut manager = Manager::start(socket(scratch.path()));
    manager.restart(&mut service)?;
    let attachment = service.attach(ID, &vfio_user("rack1/disk0"))?;
    let mut load = Load::start(&attachment)?;

    for round in 0..8u64 {
        load.goes_on(&service, ID, 100 + round * 150)?;
        let worker = service.workers()[0];
        if round % 2 == 0 {
            service.kill()?;
            kill_process(Pid::from_raw(worker.try_into()?).unwrap(), Signal::KILL)?;
        } else {
            // Its worker hands all of it to the next daemon anew.
            service.terminate()?;
        }
        let kept = manager.names();
        assert!(kept.contains(&format!("{ID}/connection")), "{kept:?}");
        manager.restart(&mut service)?;
        service.wait_state(ID, AttachmentState::Ready, Deadline::secs(60))?;
    }

    load.goes_on(&service, ID, 200)?;
    load.end()?;
    let errors = service.attachment(ID)?.unwrap().statistics.unwrap().errors;
    assert_eq!(errors, 0);
    service.detach(ID, false)?;
    service.terminate()?;
    assert_eq!(manager.names(), Vec::<String>::new());
    Ok(())
}
