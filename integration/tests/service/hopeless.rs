//! Attachments whose worker cannot be replaced: they are degraded, say why and what helps, and are not given
//! up, since a VM would lose its device; when the cause is gone, they go on.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use farbus_compute_agent::api::AttachmentState;
use farbus_integration::deadline::Deadline;
use farbus_integration::report::TestResult;
use farbus_integration::service::{Event, Service};
use farbus_rest::client::Events;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::bed::{Bed, prove, vfio_user};

/// What the memory of a controller's state begins with (`shadow-mem/src/nvme/record.rs`); then comes its
/// version.
const MAGIC: &[u8; 8] = b"farbusC1";

pub(crate) fn kill(worker: u32) {
    kill_process(
        Pid::from_raw(worker.try_into().unwrap()).unwrap(),
        Signal::KILL,
    )
    .unwrap();
}

/// Makes what the daemon keeps of its only attachment's controller one of a version that nobody knows.
pub(crate) fn make_record_unreadable(service: &Service) {
    let daemon = service.daemon().unwrap().pid();
    let open = fs::read_dir(format!("/proc/{daemon}/fd")).unwrap();
    let mut found = 0;
    for fd in open.flatten() {
        let name = fs::read_link(fd.path()).unwrap_or_default();
        if !name.to_string_lossy().starts_with("/memfd:") {
            continue;
        }
        let memory = File::options()
            .read(true)
            .write(true)
            .open(fd.path())
            .unwrap();
        let mut begin = [0; 8];
        let is_record = memory.read_exact_at(&mut begin, 0).is_ok() && &begin == MAGIC;
        if is_record {
            memory.write_all_at(&99u64.to_le_bytes(), 8).unwrap();
            found += 1;
        }
    }
    assert_eq!(found, 1, "records of controllers");
}

/// Waits until its state has a reason with `word` in it; all of the reason.
fn says_why(service: &Service, events: &mut Events, word: &str) -> String {
    let told = |event: &Event| {
        let reason = event.reason.as_deref().unwrap_or_default();
        reason.contains(word)
    };
    let told = service.until(events, Deadline::secs(60), told).unwrap();
    told.last().unwrap().reason.clone().unwrap()
}

fn is_ready_again(service: &Service) -> TestResult {
    let deadline = Deadline::secs(60);
    service.wait_state("vm1", AttachmentState::Ready, deadline)?;
    Ok(())
}

#[test]
fn attachment_whose_record_no_worker_can_read_says_so_until_it_is_made_again() -> TestResult {
    let bed = Bed::new("record", 1)?;
    let service = &bed.service;
    let first = service.attach("vm1", &vfio_user("rack1/d0"))?;
    prove(&first, 1);

    make_record_unreadable(service);
    kill(first.worker.unwrap().pid);

    let reason = says_why(service, &mut service.events(0)?, "cannot be had yet");
    for word in ["version", "delete the attachment"] {
        assert!(reason.contains(word), "{word:?} is not in {reason}");
    }
    service.detach("vm1", false)?;
    assert_eq!(service.attachment("vm1")?, None);
    assert!(service.workers().is_empty());
    assert_eq!(service.remains(), Vec::<std::path::PathBuf>::new());
    prove(&service.attach("vm1", &vfio_user("rack1/d0"))?, 2);
    Ok(())
}

#[test]
fn attachment_whose_export_is_gone_goes_on_when_it_is_back() -> TestResult {
    let virtio = json!({"device": "rack1/d1", "endpoint": {"kind": "vhost-user-blk"}});
    for (name, spec) in [("export", vfio_user("rack1/d1")), ("exportblk", virtio)] {
        let mut bed = Bed::new(name, 2)?;
        let first = bed.service.attach("vm1", &spec)?;
        let mut events = bed.service.events(0)?;
        bed.kill_server()?;
        bed.drives = 1;
        bed.restart_server()?;
        says_why(&bed.service, &mut events, "unknown export");

        kill(first.worker.unwrap().pid);

        says_why(&bed.service, &mut events, "it is replaced");
        says_why(&bed.service, &mut events, "unknown export");
        bed.kill_server()?;
        bed.drives = 2;
        bed.restart_server()?;
        is_ready_again(&bed.service)?;
    }
    Ok(())
}

#[test]
fn attachment_whose_device_server_is_away_goes_on_when_it_is_back() -> TestResult {
    let mut bed = Bed::new("away", 1)?;
    let spec = json!({"device": "rack1/d0", "endpoint": {"kind": "vhost-user-blk"}});
    let first = bed.service.attach("vm1", &spec)?;
    bed.kill_server()?;

    kill(first.worker.unwrap().pid);

    says_why(
        &bed.service,
        &mut bed.service.events(0)?,
        "cannot be had yet",
    );
    bed.restart_server()?;
    is_ready_again(&bed.service)
}
