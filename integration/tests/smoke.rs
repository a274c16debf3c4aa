//! The test bed proves itself: stock guests use a drive that QEMU emulates.

use farbus_integration::builder::MachineBuilder;
use farbus_integration::deadline::Deadline;
use farbus_integration::report::TestResult;
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::Tools;
use farbus_integration::tools::initramfs::Userland;
use farbus_integration::tools::kernel::Kernel;
use farbus_integration::verify;

const DRIVE: &str = "/dev/nvme0n1";
const SIZE: u64 = 256 << 20;

fn drive_passes_the_suite(kernel: Kernel) -> TestResult {
    let tools = Tools::open()?;
    let scratch = Scratch::new("disk")?;
    let disk = scratch.disk("disk.img", SIZE)?;
    let machine = MachineBuilder::new(&format!("smoke-{}", kernel.name()))
        .kernel(kernel)
        .userland(Userland::Large)
        .emulated_nvme("nv0", &disk)
        .start(&tools)?;
    let guest = machine.wait_guest(Deadline::secs(60))?;

    let identity = verify::nvme_cli(&guest, DRIVE)?;
    assert_eq!(identity.size, SIZE);
    verify::random_io(&guest, DRIVE)?;
    verify::flush_trim_zeroes(&guest, DRIVE)?;
    let files = verify::filesystem(&guest, DRIVE)?;
    guest.reboot(Deadline::secs(60))?;
    verify::files_intact(&guest, DRIVE, &files)?;
    machine.quit()?;
    Ok(())
}

#[test]
fn emulated_drive_passes_the_suite_on_6_1() -> TestResult {
    drive_passes_the_suite(Kernel::V6_1)
}

#[test]
fn emulated_drive_passes_the_suite_on_6_12() -> TestResult {
    drive_passes_the_suite(Kernel::V6_12)
}
