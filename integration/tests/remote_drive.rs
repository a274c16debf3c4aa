//! A stock guest uses a drive that lives behind another process, reached over TCP.

use farbus_integration::attached::AttachedDrive;
use farbus_integration::builder::MachineBuilder;
use farbus_integration::deadline::Deadline;
use farbus_integration::guest::Guest;
use farbus_integration::machine::Machine;
use farbus_integration::report::TestResult;
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::Tools;
use farbus_integration::tools::firmware::Firmware;
use farbus_integration::tools::initramfs::Userland;
use farbus_integration::tools::kernel::Kernel;
use farbus_integration::verify;

const DRIVE: &str = "/dev/nvme0n1";
const SIZE: u64 = 256 << 20;

fn boot(
    drive: &AttachedDrive,
    kernel: Kernel,
) -> Result<(Machine, Guest), farbus_integration::report::Failure> {
    let machine = MachineBuilder::new(&format!("remote-{}", kernel.name()))
        .kernel(kernel)
        .userland(Userland::Large)
        .vfio_user("disk0", &drive.socket)
        .start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(60))?;
    Ok((machine, guest))
}

/// Everything that a guest does with a drive; then the guest is rebooted, and replaced by
/// another one, and the bytes are looked for in the backing file.
fn drive_passes_the_suite(kernel: Kernel, next: Kernel, options: &str) -> TestResult {
    let scratch = Scratch::new("drive")?;
    let drive = AttachedDrive::start(&scratch, options)?;
    let (machine, guest) = boot(&drive, kernel)?;

    let pci = guest.check("lspci -nn -v -s 01:00.0")?;
    assert!(
        pci.contains("[0108]") && pci.contains("[4642:0001]"),
        "{pci}"
    );
    assert!(
        pci.contains("64-bit") && pci.contains("[size=16K]"),
        "{pci}"
    );
    assert!(pci.contains("MSI-X: Enable+"), "{pci}");
    let identity = verify::nvme_cli(&guest, DRIVE)?;
    assert_eq!(identity.size, SIZE);
    verify::random_io(&guest, DRIVE)?;
    verify::flush_trim_zeroes(&guest, DRIVE)?;
    let files = verify::filesystem(&guest, DRIVE)?;

    guest.reboot(Deadline::secs(60))?;
    verify::files_intact(&guest, DRIVE, &files)?;
    guest.check(&format!(
        "echo found-in-the-backing-file | dd of={DRIVE} bs=4096 seek=8 conv=sync oflag=direct,dsync"
    ))?;
    machine.quit()?;

    let (machine, guest) = boot(&drive, next)?;
    let block = guest.check(&format!(
        "dd if={DRIVE} bs=4096 skip=8 count=1 iflag=direct | tr -d '\\0'"
    ))?;
    assert!(block.contains("found-in-the-backing-file"), "{block}");
    machine.quit()?;

    let backing = std::fs::read(&drive.disk)?;
    assert!(backing[8 * 4096..].starts_with(b"found-in-the-backing-file"));
    drive.end()?;
    Ok(())
}

#[test]
fn remote_drive_passes_the_suite_on_6_1() -> TestResult {
    drive_passes_the_suite(Kernel::V6_1, Kernel::V6_12, "size=256MiB")
}

#[test]
fn remote_drive_with_4k_blocks_passes_the_suite_on_6_12() -> TestResult {
    drive_passes_the_suite(Kernel::V6_12, Kernel::V6_1, "size=256MiB,block-size=4096")
}

/// A guest whose firmware reads the boot loader, kernel and initramfs from the remote drive, with
/// a driver that polls.
fn boots_from_the_remote_drive(firmware: Firmware, kernel: Kernel) -> TestResult {
    let tools = Tools::open()?;
    let scratch = Scratch::new("boot")?;
    tools.boot_disk(kernel, &scratch.join("disk.img"))?;
    let drive = AttachedDrive::start(&scratch, "block-size=512")?;
    let machine = MachineBuilder::new(&format!("remote-{}", firmware.name()))
        .firmware(firmware)
        .vfio_user("disk0", &drive.socket)
        .start(&tools)?;
    let guest = machine.wait_guest(Deadline::secs(240))?;
    let partitions = guest.check("lsblk -rno NAME,TYPE /dev/nvme0n1")?;
    assert!(partitions.contains("nvme0n1p1 part"), "{partitions}");
    machine.quit()?;
    drive.end()?;
    Ok(())
}

#[test]
fn seabios_boots_from_the_remote_drive() -> TestResult {
    boots_from_the_remote_drive(Firmware::SeaBios, Kernel::V6_1)
}

#[test]
fn ovmf_boots_from_the_remote_drive() -> TestResult {
    boots_from_the_remote_drive(Firmware::Ovmf, Kernel::V6_12)
}
