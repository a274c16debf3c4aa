//! Workers that die while their guest is asked to let go of the device. The VMM is a stand-in of
//! cloud-hypervisor, whose guest lets go when the test wants it to, and a vfio-user client.

use farbus_compute_agent::api::{Attachment, AttachmentState};
use farbus_integration::cloud_hypervisor::{Guest, StandIn};
use farbus_integration::deadline::Deadline;
use farbus_integration::error::Result;
use farbus_integration::report::TestResult;
use farbus_integration::service::Service;
use hyper::Method;
use serde_json::json;

use crate::bed::{BLOCK, Bed, drive};
use crate::hopeless::{kill, make_record_unreadable};

const PATH: &str = "/v1/attachments/vm1";

/// An attachment that a guest has, which is in no hurry.
fn plugged(bed: &Bed, vmm: &StandIn) -> Result<Attachment> {
    vmm.set_guest(Guest::Keeps);
    let spec = json!({
        "device": "rack1/d0",
        "endpoint": {"kind": "vfio-user"},
        "vm": {"kind": "cloud-hypervisor", "api": vmm.path()},
    });
    bed.service.attach("vm1", &spec)
}

/// Asks for the attachment to be taken away, and waits until the guest has been asked.
fn begin_to_detach(service: &Service, vmm: &StandIn) -> TestResult {
    let answer = service.ask(Method::DELETE, PATH, None)?;
    assert_eq!(answer.status, 202, "{:?}", answer.body);
    let deadline = Deadline::secs(30);
    while !vmm.calls().iter().any(|call| call == "vm.remove-device") {
        assert!(!deadline.has_passed(), "the guest is not asked");
        std::thread::yield_now();
    }
    Ok(())
}

/// Waits until there is another worker than this one, or none.
fn after(service: &Service, worker: u32) -> Vec<u32> {
    let deadline = Deadline::secs(60);
    loop {
        let now = service.workers();
        let shown = service.attachment("vm1").unwrap();
        let pid = shown.and_then(|it| it.worker).map(|worker| worker.pid);
        if now.first() != Some(&worker) && pid == now.first().copied() {
            return now;
        }
        assert!(!deadline.has_passed(), "{now:?}");
        std::thread::yield_now();
    }
}

fn nothing_is_left(service: &Service, vmm: &StandIn) -> TestResult {
    let gone = service.detach("vm1", false)?;
    assert_eq!(gone.state, AttachmentState::Detached);
    assert_eq!(vmm.devices(), Vec::<String>::new());
    assert!(service.workers().is_empty());
    assert_eq!(service.remains(), Vec::<std::path::PathBuf>::new());
    Ok(())
}

#[test]
fn worker_that_dies_while_the_guest_lets_go_is_replaced_and_what_it_writes_last_is_kept()
-> TestResult {
    let (bed, vmm) = (Bed::new("letting", 1)?, StandIn::start()?);
    let service = &bed.service;
    let first = plugged(&bed, &vmm)?;
    let mut driver = drive(&first);
    begin_to_detach(service, &vmm)?;

    let worker = first.worker.unwrap().pid;
    kill(worker);

    // What a driver does before it lets go.
    driver.write(1, 0, BLOCK, &[7; 4096]).unwrap();
    let mut back = [0; 4096];
    driver.read(1, 0, BLOCK, &mut back).unwrap();
    assert_eq!(back, [7; 4096]);
    assert_eq!(after(service, worker).len(), 1);
    let now = service.attachment("vm1")?.unwrap();
    assert_eq!(now.state, AttachmentState::Detaching);
    drop(driver);
    vmm.set_guest(Guest::LetsGoAfter(0));
    nothing_is_left(service, &vmm)
}

#[test]
fn worker_that_dies_while_the_guest_lets_go_and_has_no_successor_leaves_nothing() -> TestResult {
    let (bed, vmm) = (Bed::new("dying", 1)?, StandIn::start()?);
    let service = &bed.service;
    let first = plugged(&bed, &vmm)?;
    begin_to_detach(service, &vmm)?;

    make_record_unreadable(service);
    let worker = first.worker.unwrap().pid;
    kill(worker);

    assert!(after(service, worker).is_empty());
    vmm.set_guest(Guest::LetsGoAfter(0));
    nothing_is_left(service, &vmm)?;
    assert!(
        bed.service
            .attach("vm2", &crate::bed::vfio_user("rack1/d0"))
            .is_ok()
    );
    Ok(())
}

#[test]
fn daemon_and_worker_that_die_while_the_guest_lets_go_leave_nothing() -> TestResult {
    let (mut bed, vmm) = (Bed::new("both-dying", 1)?, StandIn::start()?);
    let first = plugged(&bed, &vmm)?;
    begin_to_detach(&bed.service, &vmm)?;

    bed.service.kill()?;
    kill(first.worker.unwrap().pid);
    bed.service.restart()?;

    vmm.set_guest(Guest::LetsGoAfter(0));
    nothing_is_left(&bed.service, &vmm)
}
