//! A stock guest uses a drive that lives behind another process, reached over TCP.

use farbus_integration::attached::{self, AttachedDrive};
use farbus_integration::builder::MachineBuilder;
use farbus_integration::deadline::Deadline;
use farbus_integration::guest::Guest;
use farbus_integration::machine::Machine;
use farbus_integration::report::{Failure, TestResult};
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::Tools;
use farbus_integration::tools::firmware::Firmware;
use farbus_integration::tools::initramfs::Userland;
use farbus_integration::tools::kernel::Kernel;
use farbus_integration::verify;
use serde_json::json;

const DRIVE: &str = "/dev/nvme0n1";
const SIZE: u64 = 256 << 20;

fn boot(drive: &AttachedDrive, kernel: Kernel) -> Result<(Machine, Guest), Failure> {
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
    let said = drive.agent.stderr();
    assert!(
        said.contains("doorbells in memory"),
        "Linux uses them: {said}"
    );
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

#[test]
fn killed_device_server_is_a_pause_to_the_guest() -> TestResult {
    let scratch = Scratch::new("pause")?;
    let AttachedDrive {
        server,
        agent,
        disk,
        socket,
    } = AttachedDrive::start(&scratch, "size=256MiB")?;
    let machine = MachineBuilder::new("remote-pause")
        .userland(Userland::Large)
        .vfio_user("disk0", &socket)
        .start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(60))?;
    let address = attached::address(&server);
    let job = guest.spawn(&format!(
        "fio --name=pause --filename={DRIVE} --direct=1 --ioengine=libaio --rw=randwrite \
         --bsrange=4k-128k --iodepth=16 --size=64M --loops=3 --verify=crc32c --verify_fatal=1 \
         --output-format=terse"
    ))?;
    let mut server = server;
    for _ in 0..3 {
        let before = written(&guest)?;
        guest.wait_until(
            &format!("test $({WRITTEN}) -gt {}", before + 8192),
            Deadline::secs(60),
        )?;
        server.kill()?;
        server = attached::serve_at(&address, &format!("path={}", disk.display()))?;
    }
    job.check(Deadline::secs(180))?;
    let log = guest.check("dmesg")?;
    for word in ["timeout", "I/O error", "resetting controller"] {
        assert!(!log.contains(word), "{log}");
    }
    machine.quit()?;
    agent.terminate()?;
    server.terminate()?;
    Ok(())
}

/// The guest's own driver hears that its drive has grown; also of a device server that was replaced meanwhile.
#[test]
fn drive_that_grows_grows_in_the_guest() -> TestResult {
    let scratch = Scratch::new("grow")?;
    let drive = AttachedDrive::start(&scratch, "size=256MiB")?;
    let (machine, guest) = boot(&drive, Kernel::V6_12)?;
    let disk = std::fs::File::options().write(true).open(&drive.disk)?;
    disk.set_len(2 * SIZE)?;
    verify::has_grown(&guest, DRIVE, 2 * SIZE)?;
    let address = attached::address(&drive.server);
    drive.server.kill()?;
    let server = attached::serve_at(&address, &format!("path={}", drive.disk.display()))?;
    // The controller is rebuilt by the time it answers.
    guest.check(&format!(
        "dd if={DRIVE} of=/dev/null bs=4k count=1 iflag=direct"
    ))?;
    disk.set_len(3 * SIZE)?;
    verify::has_grown(&guest, DRIVE, 3 * SIZE)?;
    let log = guest.check("dmesg")?;
    assert!(!log.contains("resetting controller"), "{log}");
    machine.quit()?;
    drive.agent.terminate()?;
    server.terminate()?;
    Ok(())
}

/// Shell words that print how many sectors the guest has written.
const WRITTEN: &str = "awk '{print $7}' /sys/block/nvme0n1/stat";

fn written(guest: &Guest) -> Result<u64, Failure> {
    Ok(guest.check(WRITTEN)?.trim().parse()?)
}

#[test]
fn drive_of_two_data_threads_is_used_by_both_of_a_guests_processors_and_survives_its_server()
-> TestResult {
    let scratch = Scratch::new("lanes")?;
    let (disk, socket) = (scratch.join("disk.img"), scratch.join("disk0.sock"));
    let mut server = attached::serve(&format!("path={},size=256MiB", disk.display()))?;
    let address = attached::address(&server);
    let agent = attached::attach_with_threads(&address, &socket, 2)?;
    let machine = MachineBuilder::new("remote-lanes")
        .userland(Userland::Large)
        .cpus(2)
        .vfio_user("disk0", &socket)
        .start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(60))?;
    let claimed = agent.stderr();
    assert!(claimed.contains("by 2 connections"), "{claimed}");
    // A queue for each processor, and each has interrupts of its own.
    let queues = guest.check("ls /sys/block/nvme0n1/mq")?;
    assert_eq!(queues.split_whitespace().count(), 2, "{queues}");
    verify::random_io(&guest, DRIVE)?;
    let job = guest.spawn(&format!(
        "fio --name=lanes --filename={DRIVE} --direct=1 --ioengine=libaio --rw=randwrite \
         --bsrange=4k-128k --iodepth=16 --numjobs=2 --cpus_allowed=0-1 --cpus_allowed_policy=split \
         --size=32M --offset_increment=64M --loops=3 --verify=crc32c --verify_fatal=1 \
         --output-format=terse"
    ))?;
    let before = written(&guest)?;
    guest.wait_until(
        &format!("test $({WRITTEN}) -gt {}", before + 8192),
        Deadline::secs(60),
    )?;
    server.kill()?;
    server = attached::serve_at(&address, &format!("path={}", disk.display()))?;
    job.check(Deadline::secs(180))?;
    let log = guest.check("dmesg")?;
    for word in ["timeout", "I/O error", "resetting controller"] {
        assert!(!log.contains(word), "{log}");
    }
    guest.reboot(Deadline::secs(60))?;
    verify::random_io(&guest, DRIVE)?;
    machine.quit()?;
    agent.terminate()?;
    server.terminate()?;
    Ok(())
}

#[test]
fn memory_that_is_not_shared_is_refused_and_the_endpoint_lives_on() -> TestResult {
    let scratch = Scratch::new("private")?;
    let drive = AttachedDrive::start(&scratch, "size=256MiB")?;
    let refused = MachineBuilder::new("private")
        .private_memory()
        .vfio_user("disk0", &drive.socket)
        .start(&Tools::open()?);
    if let Ok(machine) = refused {
        machine.wait_end(Deadline::secs(60))?;
    }
    let log = drive.agent.stderr();
    assert!(log.contains("share=on"), "{log}");
    let (machine, guest) = boot(&drive, Kernel::V6_12)?;
    assert_eq!(verify::identity(&guest, DRIVE)?.size, SIZE);
    machine.quit()?;
    drive.end()?;
    Ok(())
}

#[test]
fn drive_on_the_root_bus_works_as_the_readme_has_it() -> TestResult {
    let scratch = Scratch::new("root-bus")?;
    let drive = AttachedDrive::start(&scratch, "size=256MiB")?;
    let machine = MachineBuilder::new("root-bus")
        .device(&json!({
            "driver": "vfio-user-pci",
            "socket": {"type": "unix", "path": drive.socket.display().to_string()},
        }))
        .start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(60))?;
    verify::filesystem(&guest, DRIVE)?;
    machine.quit()?;
    drive.end()?;
    Ok(())
}

#[test]
fn drive_behind_a_virtual_iommu_works() -> TestResult {
    let scratch = Scratch::new("viommu")?;
    let drive = AttachedDrive::start(&scratch, "size=256MiB")?;
    let machine = MachineBuilder::new("viommu")
        .iommu()
        .vfio_user("disk0", &drive.socket)
        .start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(60))?;
    assert!(guest.check("dmesg")?.contains("DMAR: IOMMU enabled"));
    verify::flush_trim_zeroes(&guest, DRIVE)?;
    verify::filesystem(&guest, DRIVE)?;
    machine.quit()?;
    drive.end()?;
    Ok(())
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
