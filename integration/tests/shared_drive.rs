//! Two stock guests on one drive at once, each with a slice of it: one sees an NVMe controller, the
//! other a virtio disk. Each verifies its own while the other is busy; and what each has written is
//! where its slice is, and nowhere else.

use farbus_integration::attached;
use farbus_integration::builder::MachineBuilder;
use farbus_integration::claimant::{self, iops};
use farbus_integration::daemon::Daemon;
use farbus_integration::deadline::Deadline;
use farbus_integration::guest::Guest;
use farbus_integration::machine::Machine;
use farbus_integration::report::{Failure, TestResult};
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::Tools;
use farbus_integration::tools::initramfs::Userland;
use farbus_integration::tools::kernel::Kernel;
use farbus_integration::verify;
use farbus_integration::vfio::{LendingServer, lender, networked};

const NVME: &str = "/dev/nvme0n1";
const VIRTIO: &str = "/dev/vda";
const SLICE: u64 = 128 << 20;
const SLICES: &str = "--slice name=a,size=128MiB --slice name=b,offset=128MiB,size=128MiB";
/// Where each guest leaves a word: the last block but a few of its slice.
const MARK: u64 = SLICE - 32768;

/// A guest and what lies between it and its slice.
struct Tenant {
    machine: Machine,
    guest: Guest,
    agent: Daemon,
    drive: &'static str,
}

impl Tenant {
    fn nvme(address: &str, scratch: &Scratch) -> Result<Self, Failure> {
        let socket = scratch.join("a.sock");
        let agent = attached::attach_export(address, "disk0/a", &socket)?;
        let machine = MachineBuilder::new("shares-a")
            .userland(Userland::Large)
            .vfio_user("disk0", &socket)
            .start(&Tools::open()?)?;
        Self::new(machine, agent, NVME)
    }

    fn virtio(address: &str, scratch: &Scratch) -> Result<Self, Failure> {
        let socket = scratch.join("b.sock");
        let path = socket.display().to_string();
        let options = [
            "attach",
            "--from",
            address,
            "--export",
            "disk0/b",
            "--vhost-user-blk",
            &path,
        ];
        let agent = Daemon::start("farbus-compute-agent", &options)?;
        let machine = MachineBuilder::new("shares-b")
            .userland(Userland::Large)
            .modules("virtio_blk")
            .vhost_user_blk("disk0", &socket, 2)
            .start(&Tools::open()?)?;
        Self::new(machine, agent, VIRTIO)
    }

    fn new(machine: Machine, agent: Daemon, drive: &'static str) -> Result<Self, Failure> {
        let guest = machine.wait_guest(Deadline::secs(90))?;
        let size = guest.check(&format!("blockdev --getsize64 {drive}"))?;
        assert_eq!(size.trim(), SLICE.to_string());
        Ok(Self {
            machine,
            guest,
            agent,
            drive,
        })
    }

    /// A job that writes all over the first half of the slice and reads back what it wrote.
    fn busy(&self) -> String {
        format!(
            "fio --name=busy --filename={} --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite \
             --bsrange=4k-64k --size=64M --loops=2 --verify=crc32c --verify_fatal=1 --output-format=terse",
            self.drive
        )
    }

    fn mark(&self, word: &str) -> TestResult {
        self.guest.check(&format!(
            "echo {word} | dd of={} bs=4096 seek={} conv=sync oflag=direct,dsync",
            self.drive,
            MARK / 4096
        ))?;
        Ok(())
    }

    fn end(self) -> TestResult {
        self.machine.quit()?;
        self.agent.terminate()?;
        Ok(())
    }
}

/// Both guests at work; one leaves in the middle of the other's, and comes back to its files.
fn two_guests_share(address: &str) -> TestResult {
    let scratch = Scratch::new("tenants")?;
    let (a, b) = (
        Tenant::nvme(address, &scratch)?,
        Tenant::virtio(address, &scratch)?,
    );
    let serial = a.guest.check("cat /sys/class/nvme/nvme0/model")?;
    assert!(serial.contains("Farbus slice of"), "{serial}");

    // Each in turn is judged while the other one is busy.
    let busy = b.guest.spawn(&b.busy())?;
    verify::random_io(&a.guest, NVME)?;
    verify::flush_trim_zeroes(&a.guest, NVME)?;
    busy.check(Deadline::secs(240))?;
    let of_b = verify::filesystem(&b.guest, VIRTIO)?;
    let of_a = verify::filesystem(&a.guest, NVME)?;
    verify::files_intact(&b.guest, VIRTIO, &of_b)?;

    // A guest that is gone in the middle of its writes leaves the other one's alone.
    let load = b.guest.spawn(&format!(
        "while true; do cat {VIRTIO} >/dev/null; echo 3 >/proc/sys/vm/drop_caches; done"
    ))?;
    verify::files_intact(&a.guest, NVME, &of_a)?;
    b.machine.kill()?;
    b.agent.kill()?;
    drop(load);
    verify::files_intact(&a.guest, NVME, &of_a)?;
    a.mark("left-by-a")?;
    let b = Tenant::virtio(address, &scratch)?;
    verify::files_intact(&b.guest, VIRTIO, &of_b)?;
    b.mark("left-by-b")?;
    verify::files_intact(&a.guest, NVME, &of_a)?;
    a.end()?;
    b.end()
}

#[test]
fn two_guests_share_a_software_drive() -> TestResult {
    let scratch = Scratch::new("shared")?;
    let disk = scratch.join("disk.img");
    let drive = format!("path={},size=256MiB,queues=8", disk.display());
    let mut arguments = vec!["export", "--soft-nvme", &drive, "--name", "disk0"];
    arguments.extend(
        ["--listen", "127.0.0.1:0"]
            .into_iter()
            .chain(SLICES.split(' ')),
    );
    let server = Daemon::start("farbus-device-server", &arguments)?;
    two_guests_share(&attached::address(&server))?;
    server.terminate()?;
    let backing = std::fs::read(&disk)?;
    for (slice, word) in [(0, "left-by-a"), (SLICE, "left-by-b")] {
        let at = usize::try_from(slice + MARK)?;
        assert!(
            backing[at..].starts_with(word.as_bytes()),
            "{word} at {at:#x}"
        );
    }
    Ok(())
}

#[test]
fn two_guests_share_a_controller_that_another_machine_lends() -> TestResult {
    let tools = Tools::open()?;
    let scratch = Scratch::new("lent")?;
    let disk = scratch.disk("disk.img", 2 * SLICE)?;
    let host = networked(lender("lends-shared", Kernel::V6_12))
        .emulated_nvme("nv0", &disk)
        .start(&tools)?;
    let shell = host.wait_guest(Deadline::secs(90))?;
    shell.wait_file(NVME, Deadline::secs(30))?;
    let options = format!("--bind --pci 0000:01:00.0,name=disk0 {SLICES}");
    let server = LendingServer::start(&host, &shell, &options)?;
    two_guests_share(&server.address)?;
    println!("{}", server.terminate()?);

    // The lender has its drive back, and both words are where the slices are.
    shell.wait_file(NVME, Deadline::secs(30))?;
    for (slice, word) in [(0, "left-by-a"), (SLICE, "left-by-b")] {
        let block = (slice + MARK) / 4096;
        let found = shell.check(&format!(
            "dd if={NVME} bs=4096 skip={block} count=1 iflag=direct status=none | tr -d '\\0'"
        ))?;
        assert_eq!(found.trim(), word);
    }
    host.quit()?;
    Ok(())
}

/// Claimants on this host, of a drive in another machine: two that want the same, and one that is
/// held to a limit.
#[test]
fn claimants_of_a_lent_controller_get_equal_parts_and_keep_to_limits() -> TestResult {
    let scratch = Scratch::new("equal")?;
    let disk = scratch.disk("disk.img", 2 * SLICE)?;
    let host = networked(lender("lends-equal", Kernel::V6_12))
        .emulated_nvme("nv0", &disk)
        .start(&Tools::open()?)?;
    let shell = host.wait_guest(Deadline::secs(90))?;
    shell.wait_file(NVME, Deadline::secs(30))?;
    // An emulated machine may stop for a moment. What it makes up for then is less than the 10 %, of 4 s.
    let limited = "--slice name=c,size=4MiB,offset=252MiB,iops=200,iops-burst=60";
    let slices = "--slice name=a,size=64MiB --slice name=b,offset=64MiB,size=64MiB";
    let options = format!("--bind --pci 0000:01:00.0,name=disk0 {slices} {limited}");
    let server = LendingServer::start(&host, &shell, &options)?;

    let load = ["--iodepth", "16"];
    claimant::share_evenly(&server.address, ["disk0/a", "disk0/b"], &load)?;
    let loads = [("disk0/a", &load[..]), ("disk0/c", &load[..])];
    let [_, c] = claimant::bench_both(&server.address, loads)?;
    claimant::keeps_to(200.0, iops(&c))?;
    server.terminate()?;
    host.quit()?;
    Ok(())
}
