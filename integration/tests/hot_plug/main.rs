//! A drive is plugged into a running guest and taken out again by the agent's own library, with QEMU
//! as it is and guests that do as they like.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod bed;
mod guests;
mod interrupts;
mod losses;
mod refusals;
mod service;

use std::time::Duration;

use farbus_compute_agent::hotplug::{self, Plugged, Unplugged};
use farbus_integration::report::TestResult;
use serde_json::json;

use bed::{Bed, ID, limit};

#[test]
fn drive_is_plugged_and_unplugged_again_and_again_without_a_trace() -> TestResult {
    let bed = Bed::nvme("cycles", |machine| machine)?;
    let before = bed.objects()?;
    let mut slowest = Duration::ZERO;
    let cycles = 22;
    for cycle in 0..cycles {
        slowest = slowest.max(bed.plug()?);
        assert_eq!(hotplug::plug(&bed.vm, &bed.device())?, Plugged::Already);
        bed.io(cycle)?;
        let counted = interrupts::counted(&bed.guest)?;
        assert!(
            counted.len() == 3 && counted.iter().all(|count| *count > 0),
            "an admin queue and one for each CPU: {counted:?}"
        );
        bed.unplug()?;
        let again = hotplug::unplug(&bed.vm, ID, limit(5), false)?;
        assert_eq!(again, Unplugged::Absent);
        assert_eq!(bed.objects()?, before);
    }
    println!("slowest of {cycles}, from the call to the block device: {slowest:?}");
    assert!(bed.drive.agent.stderr().contains("MSI-X is mediated"));
    bed.end()
}

#[test]
fn virtio_drive_is_plugged_and_unplugged_without_a_trace() -> TestResult {
    let bed = Bed::virtio("virtio", |machine| machine.modules("virtio_blk"))?;
    let before = bed.objects()?;
    // What an agent leaves that dies in the middle of an attach.
    let left = json!({
        "id": format!("farbus-{ID}-char"),
        "backend": {"type": "null", "data": {}},
    });
    bed.machine.qmp().execute("chardev-add", &left)?;
    for cycle in 0..3 {
        bed.plug()?;
        bed.io(cycle)?;
        bed.unplug()?;
        assert_eq!(bed.objects()?, before);
    }
    bed.machine.qmp().execute("chardev-add", &left)?;
    let done = hotplug::unplug(&bed.vm, ID, limit(5), false)?;
    assert_eq!(done, Unplugged::Absent);
    assert_eq!(bed.objects()?, before);
    bed.end()
}
