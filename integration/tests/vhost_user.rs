//! A stock guest uses a remote drive through its virtio_blk driver and a vhost-user socket.

use farbus_integration::attached::{self, AttachedDrive};
use farbus_integration::builder::{MachineBuilder, vhost_user_device};
use farbus_integration::deadline::Deadline;
use farbus_integration::guest::Guest;
use farbus_integration::machine::Machine;
use farbus_integration::report::{Failure, TestResult};
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::Tools;
use farbus_integration::tools::initramfs::Userland;
use farbus_integration::tools::kernel::Kernel;
use farbus_integration::verify;
use serde_json::Value;

const DRIVE: &str = "/dev/vda";
const SIZE: u64 = 256 << 20;

fn builder(name: &str, kernel: Kernel) -> MachineBuilder {
    MachineBuilder::new(name)
        .kernel(kernel)
        .userland(Userland::Large)
        .modules(match kernel {
            Kernel::V6_1 => "virtio_pci,virtio_blk",
            // The others have the bus built in.
            _ => "virtio_blk",
        })
}

/// Everything that a guest does with a drive; then the guest is rebooted, and the bytes are looked
/// for in the backing file.
fn drive_passes_the_suite(name: &str, machine: MachineBuilder, options: &str) -> TestResult {
    let scratch = Scratch::new(name)?;
    let drive = AttachedDrive::start_vhost_user(&scratch, options, &["--serial", "farbus-1"])?;
    let machine = machine
        .vhost_user_blk("disk0", &drive.socket, 2)
        .start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(90))?;
    let size = guest.check(&format!("blockdev --getsize64 {DRIVE}"))?;
    assert_eq!(size.trim().parse::<u64>()?, SIZE);
    assert_eq!(guest.check("cat /sys/block/vda/serial")?.trim(), "farbus-1");
    assert_eq!(guest.check("ls /sys/block/vda/mq | wc -l")?.trim(), "2");
    verify::random_io(&guest, DRIVE)?;
    verify::flush_trim_zeroes(&guest, DRIVE)?;
    let files = verify::filesystem(&guest, DRIVE)?;
    guest.reboot(Deadline::secs(90))?;
    verify::files_intact(&guest, DRIVE, &files)?;
    guest.check(&format!(
        "echo found-in-the-backing-file | dd of={DRIVE} bs=4096 seek=8 conv=sync oflag=direct,dsync"
    ))?;
    machine.quit()?;
    let backing = std::fs::read(&drive.disk)?;
    assert!(backing[8 * 4096..].starts_with(b"found-in-the-backing-file"));
    drive.end()?;
    Ok(())
}

#[test]
fn virtio_drive_passes_the_suite_on_6_12() -> TestResult {
    let machine = builder("vhost-6.12", Kernel::V6_12);
    drive_passes_the_suite("vhost-new", machine, "size=256MiB")
}

#[test]
fn virtio_drive_with_4k_blocks_passes_the_suite_on_debian_12() -> TestResult {
    let machine = builder("vhost-debian-12", Kernel::V6_1).old_qemu();
    drive_passes_the_suite("vhost-old", machine, "size=256MiB,block-size=4096")
}
