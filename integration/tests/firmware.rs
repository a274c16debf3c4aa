//! The test bed proves itself: firmware boots a guest from a drive that QEMU emulates.

use farbus_integration::builder::MachineBuilder;
use farbus_integration::deadline::Deadline;
use farbus_integration::report::TestResult;
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::Tools;
use farbus_integration::tools::firmware::Firmware;
use farbus_integration::tools::kernel::Kernel;

fn boots_from_the_drive(firmware: Firmware, kernel: Kernel) -> TestResult {
    let tools = Tools::open()?;
    let scratch = Scratch::new("disk")?;
    let disk = scratch.join("disk.img");
    tools.boot_disk(kernel, &disk)?;
    let machine = MachineBuilder::new(firmware.name())
        .firmware(firmware)
        .emulated_nvme("nv0", &disk)
        .start(&tools)?;
    let guest = machine.wait_guest(Deadline::secs(120))?;
    let partitions = guest.check("lsblk -rno NAME,TYPE /dev/nvme0n1")?;
    assert!(partitions.contains("nvme0n1p1 part"), "{partitions}");
    machine.quit()?;
    Ok(())
}

#[test]
fn seabios_boots_from_the_drive() -> TestResult {
    boots_from_the_drive(Firmware::SeaBios, Kernel::V6_1)
}

#[test]
fn ovmf_boots_from_the_drive() -> TestResult {
    boots_from_the_drive(Firmware::Ovmf, Kernel::V6_12)
}
