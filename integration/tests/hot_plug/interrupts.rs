//! Both ways of MSI-X: what guests do to a function with each, what QEMU's fault does, and what the
//! safe one costs.

use farbus_compute_agent::hotplug;
use farbus_integration::attached::AttachedDrive;
use farbus_integration::builder::MachineBuilder;
use farbus_integration::deadline::Deadline;
use farbus_integration::guest::Guest;
use farbus_integration::machine::Machine;
use farbus_integration::measure::{Measured, Workload, measure};
use farbus_integration::report::{Failure, TestResult};
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::Tools;
use farbus_integration::tools::initramfs::Userland;
use farbus_integration::tools::kernel::Kernel;
use serde_json::{Value, json};

use crate::bed::{Bed, NVME, SIZE, limit, vm};

/// Interrupts of the drive's queues that the guest has counted, by queue.
pub(crate) fn counted(guest: &Guest) -> Result<Vec<u64>, Failure> {
    let counted = guest.check("awk '/nvme0q/ {print $2 + $3}' /proc/interrupts")?;
    Ok(counted.lines().map(str::parse).collect::<Result<_, _>>()?)
}

/// Reads all of the drive's first megabyte, which needs interrupts of each CPU's queue.
fn reads(guest: &Guest) -> TestResult {
    for mask in [1, 2] {
        guest.check(&format!(
            "taskset {mask} dd if={NVME} of=/dev/null bs=64k count=16 iflag=direct"
        ))?;
    }
    Ok(())
}

/// A guest reboots, is reset from outside, and resets the function.
fn survives_resets(machine: &Machine, guest: &Guest) -> TestResult {
    let up = Deadline::secs(90);
    reads(guest)?;
    guest.reboot(up)?;
    guest.wait_file(NVME, Deadline::secs(30))?;
    reads(guest)?;
    machine.reset(Deadline::secs(90))?;
    guest.wait_file(NVME, Deadline::secs(30))?;
    reads(guest)?;
    for _ in 0..3 {
        guest.check(
            "device=$(readlink -f /sys/class/nvme/nvme0/device) && \
             echo flr >$device/reset_method && echo 1 >$device/reset",
        )?;
        reads(guest)?;
    }
    let log = guest.check("dmesg")?;
    assert!(!log.contains("I/O error"), "{log}");
    machine.check_running()?;
    Ok(())
}

#[test]
fn mediated_drive_survives_reboot_reset_and_flr_and_leaves_afterwards() -> TestResult {
    let bed = Bed::nvme("mediated", |machine| machine)?;
    bed.plug()?;
    survives_resets(&bed.machine, &bed.guest)?;
    bed.unplug()?;
    bed.plug()?;
    bed.io(1)?;
    bed.unplug()?;
    bed.end()
}

/// A machine with a drive whose vectors are eventfds.
fn with_irqfd(
    scratch: &Scratch,
    how: &str,
    port: &Value,
    userland: Userland,
) -> Result<(AttachedDrive, Machine, Guest), Failure> {
    let drive = AttachedDrive::start_with(scratch, SIZE, &[&format!("--msix={how}")])?;
    let machine = MachineBuilder::new(how)
        .kernel(Kernel::V6_12)
        .userland(userland)
        .monitor(&scratch.join("agent.qmp"))
        .vfio_user_behind("farbus-disk0", &drive.socket, port)
        .start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(90))?;
    guest.wait_file(NVME, Deadline::secs(30))?;
    Ok((drive, machine, guest))
}

#[test]
fn irqfd_is_safe_where_nothing_can_be_unplugged() -> TestResult {
    let scratch = Scratch::new("irqfd-safe")?;
    let port = json!({"hotplug": false});
    let (drive, machine, guest) = with_irqfd(&scratch, "irqfd", &port, Userland::Small)?;
    survives_resets(&machine, &guest)?;
    assert!(drive.agent.stderr().contains("MSI-X by eventfds"));
    machine.quit()?;
    drive.end()?;
    Ok(())
}

/// Why mediated is the default. When this fails, a QEMU without the fault has come.
#[test]
fn unplug_with_irqfd_still_aborts_qemu() -> TestResult {
    let scratch = Scratch::new("irqfd-abort")?;
    let (drive, machine, _guest) = with_irqfd(&scratch, "irqfd", &Value::Null, Userland::Small)?;
    let vm = vm(&scratch.join("agent.qmp"));
    let failed = hotplug::unplug(&vm, "disk0", limit(30), false);
    assert!(
        failed
            .as_ref()
            .is_err_and(hotplug::HotplugError::is_vmm_gone),
        "QEMU has lost its fault; --msix=auto can choose irqfd for it: {failed:?}"
    );
    drop(machine);
    drive.end()?;
    Ok(())
}

/// What messages cost beside eventfds. On emulated CPUs of a busy machine the figures say only so
/// much; mediated is a message, a wake-up of QEMU and a memory access longer.
#[test]
fn mediated_interrupts_cost_little() -> TestResult {
    let mut all: Vec<Measured> = Vec::new();
    for how in ["irqfd", "mediated"] {
        let scratch = Scratch::new(how)?;
        let port = json!({"hotplug": false});
        let (drive, machine, guest) = with_irqfd(&scratch, how, &port, Userland::Large)?;
        let workload = Workload {
            pattern: "randread",
            block: "4k",
            depth: 1,
            seconds: 4,
        };
        let measured = measure(&guest, NVME, &workload)?;
        println!("{how:>8}: {measured}");
        all.push(measured);
        machine.quit()?;
        drive.end()?;
    }
    assert!(all[1].p50_us < 4.0 * all[0].p50_us, "{all:?}");
    Ok(())
}
