//! A stock guest uses a remote drive through its virtio_blk driver and a vhost-user socket.

use std::path::Path;

use farbus_integration::attached::{self, AttachedDrive};
use farbus_integration::builder::{MachineBuilder, vhost_user_device};
use farbus_integration::deadline::Deadline;
use farbus_integration::guest::Guest;
use farbus_integration::machine::Machine;
use farbus_integration::process::Kill;
use farbus_integration::report::{Failure, TestResult};
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::Tools;
use farbus_integration::tools::initramfs::Userland;
use farbus_integration::tools::kernel::Kernel;
use farbus_integration::verify;
use farbus_integration::vfio::{LendingServer, lender, networked};
use serde_json::{Value, json};

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

/// A machine with the drive, on a root port of its own.
fn boot(name: &str, drive: &AttachedDrive) -> Result<(Machine, Guest), Failure> {
    let machine = builder(name, Kernel::V6_12)
        .vhost_user_blk("disk0", &drive.socket, 2)
        .start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(90))?;
    Ok((machine, guest))
}

fn size(guest: &Guest) -> Result<u64, Failure> {
    let size = guest.check(&format!("blockdev --getsize64 {DRIVE}"))?;
    Ok(size.trim().parse()?)
}

/// Shell words that print how many sectors the guest has written.
const WRITTEN: &str = "awk '{print $7}' /sys/block/vda/stat";

/// Waits until the guest has written this many more sectors.
fn progress(guest: &Guest, sectors: u64) -> TestResult {
    let before: u64 = guest.check(WRITTEN)?.trim().parse()?;
    guest.wait_until(
        &format!("test $({WRITTEN}) -gt {}", before + sectors),
        Deadline::secs(60),
    )?;
    Ok(())
}

/// A job that writes at random and reads back what it wrote.
fn verified_load(loops: u32) -> String {
    format!(
        "fio --name=load --filename={DRIVE} --direct=1 --ioengine=libaio --rw=randwrite \
         --bsrange=4k-128k --iodepth=16 --size=64M --loops={loops} --verify=crc32c --verify_fatal=1 \
         --output-format=terse"
    )
}

fn quiet(guest: &Guest) -> TestResult {
    let log = guest.check("dmesg")?;
    for word in ["timeout", "I/O error", "blocked for more"] {
        assert!(!log.contains(word), "{log}");
    }
    // While the IOMMU is set up, QEMU looks once more for the rings that firmware has left behind.
    let since = log.rsplit("virtio_blk virtio0").next().unwrap_or_default();
    assert!(!since.contains("fault addr"), "{log}");
    Ok(())
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
    assert_eq!(size(&guest)?, SIZE);
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

/// Kills the agent, and starts it again, so many times while the guest writes and verifies.
fn killed_agent_is_a_pause(
    name: &str,
    machine: impl Fn(&Path) -> MachineBuilder,
    times: u32,
) -> TestResult {
    let scratch = Scratch::new(name)?;
    let drive = AttachedDrive::start_vhost_user(&scratch, "size=256MiB", &[])?;
    let machine = machine(&drive.socket).start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(90))?;
    let AttachedDrive {
        server,
        mut agent,
        socket,
        ..
    } = drive;
    let address = attached::address(&server);
    let job = guest.spawn(&verified_load(6))?;
    for _ in 0..times {
        progress(&guest, 2048)?;
        agent.kill()?;
        agent = attached::attach_vhost_user(&address, &socket, &[])?;
    }
    job.check(Deadline::secs(240))?;
    quiet(&guest)?;
    machine.quit()?;
    agent.terminate()?;
    server.terminate()?;
    Ok(())
}

#[test]
fn killed_agent_is_a_pause_twenty_times() -> TestResult {
    let machine =
        |socket: &Path| builder("vhost-kill", Kernel::V6_12).vhost_user_blk("disk0", socket, 2);
    killed_agent_is_a_pause("vhost-kill", machine, 20)
}

#[test]
fn killed_agent_is_a_pause_on_debian_12() -> TestResult {
    let machine = |socket: &Path| {
        let machine = builder("vhost-kill-old", Kernel::V6_1).old_qemu();
        machine.vhost_user_blk("disk0", socket, 2)
    };
    killed_agent_is_a_pause("vhost-kill-old", machine, 8)
}

/// What was under way is asked for anew by the next agent, which knows no translation.
#[test]
fn killed_agent_is_a_pause_behind_an_iommu() -> TestResult {
    let machine = |socket: &Path| {
        let machine = builder("vhost-kill-iommu", Kernel::V6_12).device_iommu(false);
        machine.vhost_user_blk_behind_iommu("disk0", socket, 2)
    };
    killed_agent_is_a_pause("vhost-kill-iommu", machine, 8)
}

/// What the agent says of the VMM's IOMMU when its client goes: how many addresses were mapped, and how
/// often some were taken back.
fn translations(log: &str) -> (u64, u64) {
    let mut sums = (0, 0);
    for line in log.lines().filter(|line| line.contains("the VMM's IOMMU:")) {
        let words: Vec<_> = line.split_whitespace().collect();
        let before = |word: &str| {
            let at = words
                .iter()
                .position(|found| found.trim_end_matches(',') == word);
            at.and_then(|at| words.get(at - 1)?.parse::<u64>().ok())
        };
        sums.0 += before("mapped").unwrap_or(0);
        sums.1 += before("times").unwrap_or(0);
    }
    sums
}

/// A guest whose driver is behind a virtual IOMMU, with everything that a guest does with a drive.
fn drive_behind_an_iommu_passes_the_suite(
    name: &str,
    machine: MachineBuilder,
    strict: bool,
) -> TestResult {
    let scratch = Scratch::new(name)?;
    let mut drive = AttachedDrive::start_vhost_user(&scratch, "size=256MiB", &[])?;
    let machine = machine
        .device_iommu(strict)
        .vhost_user_blk_behind_iommu("disk0", &drive.socket, 2)
        .start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(90))?;
    assert!(guest.check("dmesg")?.contains("DMAR: IOMMU enabled"));
    guest.check("test -e /sys/block/vda/device/../iommu_group")?;
    verify::random_io(&guest, DRIVE)?;
    verify::flush_trim_zeroes(&guest, DRIVE)?;
    let files = verify::filesystem(&guest, DRIVE)?;
    guest.reboot(Deadline::secs(90))?;
    verify::files_intact(&guest, DRIVE, &files)?;
    quiet(&guest)?;
    machine.quit()?;
    drive.agent.signal(Kill::Term)?;
    drive.agent.wait_end(Deadline::secs(20))?;
    let (mapped, taken_back) = translations(&drive.agent.stderr());
    println!("{mapped} addresses were mapped, and taken back {taken_back} times");
    assert!(mapped > 100 && taken_back > 10);
    drive.server.terminate()?;
    Ok(())
}

#[test]
fn drive_behind_a_strict_iommu_passes_the_suite() -> TestResult {
    let machine = builder("vhost-strict", Kernel::V6_12);
    drive_behind_an_iommu_passes_the_suite("vhost-strict", machine, true)
}

#[test]
fn drive_behind_a_lazy_iommu_passes_the_suite() -> TestResult {
    let machine = builder("vhost-lazy", Kernel::V6_12);
    drive_behind_an_iommu_passes_the_suite("vhost-lazy", machine, false)
}

#[test]
fn drive_behind_an_iommu_passes_the_suite_on_debian_12() -> TestResult {
    let machine = builder("vhost-iommu-old", Kernel::V6_1).old_qemu();
    drive_behind_an_iommu_passes_the_suite("vhost-iommu-old", machine, false)
}

#[test]
fn killed_device_server_is_a_pause_to_a_virtio_drive() -> TestResult {
    let scratch = Scratch::new("vhost-pause")?;
    let drive = AttachedDrive::start_vhost_user(&scratch, "size=256MiB", &[])?;
    let (machine, guest) = boot("vhost-pause", &drive)?;
    let address = attached::address(&drive.server);
    let spec = format!("path={}", drive.disk.display());
    let mut server = drive.server;
    let job = guest.spawn(&verified_load(3))?;
    for _ in 0..3 {
        progress(&guest, 4096)?;
        server.kill()?;
        server = attached::serve_at(&address, &spec)?;
    }
    job.check(Deadline::secs(180))?;
    quiet(&guest)?;
    machine.quit()?;
    drive.agent.terminate()?;
    server.terminate()?;
    Ok(())
}

/// While its device server runs, and while it does not.
#[test]
fn drive_that_grows_grows_in_the_guest() -> TestResult {
    let scratch = Scratch::new("vhost-grow")?;
    let drive = AttachedDrive::start_vhost_user(&scratch, "size=256MiB", &[])?;
    let (machine, guest) = boot("vhost-grow", &drive)?;
    assert_eq!(size(&guest)?, SIZE);
    let disk = std::fs::File::options().write(true).open(&drive.disk)?;
    disk.set_len(2 * SIZE)?;
    verify::has_grown(&guest, DRIVE, 2 * SIZE)?;
    let address = attached::address(&drive.server);
    drive.server.terminate()?;
    disk.set_len(3 * SIZE)?;
    let server = attached::serve_at(&address, &format!("path={}", drive.disk.display()))?;
    verify::has_grown(&guest, DRIVE, 3 * SIZE)?;
    quiet(&guest)?;
    machine.quit()?;
    drive.agent.terminate()?;
    server.terminate()?;
    Ok(())
}

#[test]
fn drive_is_plugged_unplugged_and_plugged_again() -> TestResult {
    let scratch = Scratch::new("vhost-plug")?;
    let drive = AttachedDrive::start_vhost_user(&scratch, "size=256MiB", &["--num-queues", "2"])?;
    let machine = builder("vhost-plug", Kernel::V6_12)
        .root_port("rp0", &Value::Null)
        .start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(90))?;
    let path = drive.socket.display().to_string();
    let mut left = None;
    for round in 0..3 {
        machine.qmp().execute(
            "chardev-add",
            &json!({"id": "c0", "backend": {"type": "socket", "data": {
                "addr": {"type": "unix", "data": {"path": path}},
                "server": false,
                "reconnect-ms": 20,
            }}}),
        )?;
        machine
            .qmp()
            .device_add(&vhost_user_device("disk0", "rp0", "c0", 2))?;
        guest.wait_file(DRIVE, Deadline::secs(60))?;
        match &left {
            None => left = Some(verify::filesystem(&guest, DRIVE)?),
            Some(files) => verify::files_intact(&guest, DRIVE, files)?,
        }
        machine.qmp().device_del("disk0", Deadline::secs(60))?;
        guest.wait_until(&format!("! test -e {DRIVE}"), Deadline::secs(30))?;
        machine
            .qmp()
            .execute("chardev-remove", &json!({"id": "c0"}))?;
        println!("round {round} is over");
    }
    machine.quit()?;
    drive.end()?;
    Ok(())
}

#[test]
fn read_only_drive_is_read_only_in_the_guest() -> TestResult {
    let scratch = Scratch::new("vhost-ro")?;
    let drive = AttachedDrive::start_vhost_user(&scratch, "size=256MiB", &["--readonly"])?;
    let (machine, guest) = boot("vhost-ro", &drive)?;
    assert_eq!(guest.check("cat /sys/block/vda/ro")?.trim(), "1");
    let refused = guest.run(&format!("dd if=/dev/zero of={DRIVE} bs=4k count=1"))?;
    assert!(!refused.success(), "{}", refused.text());
    guest.check(&format!("dd if={DRIVE} of=/dev/null bs=1M iflag=direct"))?;
    machine.quit()?;
    drive.end()?;
    Ok(())
}

/// A controller that another machine lends through VFIO, as a virtio drive.
#[test]
fn lent_controller_passes_the_suite_as_a_virtio_drive() -> TestResult {
    let tools = Tools::open()?;
    let scratch = Scratch::new("vhost-lent")?;
    let disk = scratch.disk("disk.img", SIZE)?;
    let host = networked(lender("vhost-lends", Kernel::V6_12))
        .emulated_nvme("nv0", &disk)
        .start(&tools)?;
    let shell = host.wait_guest(Deadline::secs(90))?;
    shell.wait_file("/dev/nvme0n1", Deadline::secs(30))?;
    let server = LendingServer::start(&host, &shell, "--bind --pci 0000:01:00.0,name=disk0")?;
    let socket = scratch.join("disk0.sock");
    let agent = attached::attach_vhost_user(&server.address, &socket, &[])?;
    let machine = builder("vhost-uses", Kernel::V6_12)
        .vhost_user_blk("disk0", &socket, 2)
        .start(&tools)?;
    let guest = machine.wait_guest(Deadline::secs(90))?;
    assert_eq!(size(&guest)?, SIZE);
    verify::random_io(&guest, DRIVE)?;
    verify::flush_trim_zeroes(&guest, DRIVE)?;
    let files = verify::filesystem(&guest, DRIVE)?;
    machine.quit()?;
    agent.terminate()?;
    server.terminate()?;
    shell.wait_file("/dev/nvme0n1", Deadline::secs(30))?;
    verify::files_intact(&shell, "/dev/nvme0n1", &files)?;
    host.quit()?;
    Ok(())
}
