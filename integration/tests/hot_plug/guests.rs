//! Guests with other hot-plug, and guests with a will of their own.

use farbus_compute_agent::hotplug::{self, HotplugError, Unplugged};
use farbus_integration::deadline::Deadline;
use farbus_integration::report::TestResult;
use farbus_integration::tools::kernel::Kernel;
use serde_json::json;

use crate::bed::{Bed, ID, limit};

/// The guest switches the drive's slot off by itself, which aborts a QEMU that knows of MSI-X.
fn guest_ejects(bed: &Bed) -> TestResult {
    bed.guest.check(
        "device=$(basename $(readlink -f /sys/class/nvme/nvme0/device)) && \
         for slot in /sys/bus/pci/slots/*; do \
             [ $(cat $slot/address) != ${device%.*} ] || echo 0 >$slot/power; \
         done",
    )?;
    bed.is_gone()
}

#[test]
fn native_hot_plug_works_on_6_1() -> TestResult {
    let bed = Bed::nvme("native", |machine| {
        machine.kernel(Kernel::V6_1).native_hotplug()
    })?;
    let before = bed.objects()?;
    bed.plug()?;
    bed.io(1)?;
    bed.unplug()?;
    assert_eq!(bed.objects()?, before);
    bed.plug()?;
    bed.io(2)?;
    guest_ejects(&bed)?;
    assert_eq!(bed.objects()?, before);
    bed.plug()?;
    bed.io(3)?;
    bed.end()
}

#[test]
fn guest_that_ejects_the_drive_by_itself_can_have_it_again() -> TestResult {
    let bed = Bed::nvme("eject", |machine| machine)?;
    for cycle in 0..3 {
        bed.plug()?;
        bed.io(cycle)?;
        guest_ejects(&bed)?;
    }
    bed.end()
}

#[test]
fn guest_that_ignores_the_request_keeps_the_drive_until_it_listens() -> TestResult {
    let bed = Bed::nvme("ignores", |machine| machine)?;
    bed.plug()?;
    bed.machine.qmp().execute("stop", &json!({}))?;
    let refused = hotplug::unplug(&bed.vm, ID, limit(1), false).unwrap_err();
    assert!(
        matches!(refused, HotplugError::GuestKeeps { .. }),
        "{refused}"
    );
    assert!(
        refused
            .to_string()
            .contains("has not let go of farbus-disk0"),
        "{refused}"
    );
    let forced = hotplug::unplug(&bed.vm, ID, limit(1), true)?;
    assert_eq!(forced, Unplugged::Abandoned);
    assert!(hotplug::is_plugged(&bed.vm, ID)?);
    bed.machine.qmp().execute("cont", &json!({}))?;
    // It may have done as it was asked before, between the two calls.
    hotplug::unplug(&bed.vm, ID, limit(30), false)?;
    bed.is_gone()?;
    bed.plug()?;
    bed.io(1)?;
    bed.end()
}

/// The slot's driver is told while the drive is busy: what was begun is done.
#[test]
fn busy_drive_leaves_when_it_is_asked_to() -> TestResult {
    let bed = Bed::nvme("busy", |machine| machine)?;
    for _ in 0..3 {
        bed.plug()?;
        let job = bed.guest.spawn(
            "while dd if=/dev/nvme0n1 of=/dev/null bs=64k iflag=direct 2>/dev/null; do :; done",
        )?;
        bed.guest.wait_until(
            "[ $(awk '{print $1}' /sys/block/nvme0n1/stat) -gt 100 ]",
            Deadline::secs(30),
        )?;
        bed.unplug()?;
        job.wait(Deadline::secs(30))?;
    }
    bed.end()
}
