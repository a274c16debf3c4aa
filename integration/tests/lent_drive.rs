//! A stock guest uses a real NVMe controller of another machine: the device server runs in a
//! machine with an IOMMU and passes the controller through, the agent runs here, and a second
//! machine is the guest.

use farbus_integration::attached::{attach, attach_export};
use farbus_integration::builder::MachineBuilder;
use farbus_integration::deadline::Deadline;
use farbus_integration::guest::Guest;
use farbus_integration::machine::Machine;
use farbus_integration::report::{Failure, TestResult};
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::Tools;
use farbus_integration::tools::initramfs::Userland;
use farbus_integration::tools::kernel::Kernel;
use farbus_integration::verify::{self, Files};
use farbus_integration::vfio::{LendingServer, lender, networked, sriov_nvme};

const DRIVE: &str = "/dev/nvme0n1";
const PHYSICAL: &str = "/sys/bus/pci/devices/0000:01:00.0";
const SIZE: u64 = 256 << 20;

fn lent_drive_passes_the_suite(lends: Kernel, uses: Kernel) -> TestResult {
    let tools = Tools::open()?;
    let scratch = Scratch::new("lent")?;
    let disk = scratch.disk("disk.img", SIZE)?;
    let host = networked(lender(&format!("lends-{}", lends.name()), lends))
        .emulated_nvme("nv0", &disk)
        .start(&tools)?;
    let shell = host.wait_guest(Deadline::secs(90))?;
    shell.wait_file(DRIVE, Deadline::secs(30))?;
    let server = LendingServer::start(&host, &shell, "--bind --pci 0000:01:00.0,name=disk0")?;
    let gone = shell.run(&format!("test -e {DRIVE}"))?;
    assert_eq!(gone.status, 1, "the host still has its drive");

    let socket = scratch.join("disk0.sock");
    let agent = attach(&server.address, &socket)?;
    let machine = MachineBuilder::new(&format!("uses-{}", uses.name()))
        .kernel(uses)
        .userland(Userland::Large)
        .vfio_user("disk0", &socket)
        .start(&tools)?;
    let guest = machine.wait_guest(Deadline::secs(90))?;
    let identity = verify::nvme_cli(&guest, DRIVE)?;
    assert_eq!(identity.size, SIZE);
    verify::random_io(&guest, DRIVE)?;
    verify::flush_trim_zeroes(&guest, DRIVE)?;
    let files = verify::filesystem(&guest, DRIVE)?;
    guest.reboot(Deadline::secs(90))?;
    verify::files_intact(&guest, DRIVE, &files)?;
    machine.quit()?;
    agent.terminate()?;

    // The host has its drive back, and finds what the guest has left on it.
    let said = server.terminate()?;
    println!("{said}");
    shell.wait_file(DRIVE, Deadline::secs(30))?;
    verify::files_intact(&shell, DRIVE, &files)?;
    host.quit()?;
    Ok(())
}

#[test]
fn lent_drive_passes_the_suite_on_6_12() -> TestResult {
    lent_drive_passes_the_suite(Kernel::V6_12, Kernel::V6_1)
}

#[test]
fn lent_drive_passes_the_suite_on_6_1() -> TestResult {
    lent_drive_passes_the_suite(Kernel::V6_1, Kernel::V6_12)
}

/// Two controllers of one device server, each attached on its own, in one guest and busy at once;
/// the first one's disk has [`SIZE`], the other half of that. Returns the lender, what its device
/// server said, and what the guest has left on the first disk.
fn two_lent_drives(
    host: &MachineBuilder,
    options: &str,
    names: [&str; 2],
) -> Result<(Machine, Guest, String, Files), Failure> {
    let tools = Tools::open()?;
    let scratch = Scratch::new("two")?;
    let host = host.start(&tools)?;
    let shell = host.wait_guest(Deadline::secs(90))?;
    shell.wait_file("/dev/nvme1n1", Deadline::secs(30))?;
    let server = LendingServer::start(&host, &shell, options)?;
    let sockets = [scratch.join("disk0.sock"), scratch.join("disk1.sock")];
    let agents = [
        attach_export(&server.address, names[0], &sockets[0])?,
        attach_export(&server.address, names[1], &sockets[1])?,
    ];
    let machine = MachineBuilder::new("uses-two")
        .kernel(Kernel::V6_12)
        .userland(Userland::Large)
        .vfio_user("disk0", &sockets[0])
        .vfio_user("disk1", &sockets[1])
        .start(&tools)?;
    let guest = machine.wait_guest(Deadline::secs(90))?;
    // The guest may number them as it likes.
    let by_size = |size: u64| {
        guest.check(&format!(
            "for drive in /dev/nvme?n1; do \
             [ $(blockdev --getsize64 $drive) = {size} ] && echo $drive; done; true"
        ))
    };
    let (large, small) = (by_size(SIZE)?, by_size(SIZE / 2)?);
    let busy = guest.spawn(&format!(
        "fio --name=busy --filename={small} --direct=1 --ioengine=libaio --iodepth=8 --rw=randwrite \
         --bs=16k --size=64M --verify=crc32c --verify_fatal=1 --output-format=terse"
    ))?;
    verify::random_io(&guest, &large)?;
    verify::flush_trim_zeroes(&guest, &large)?;
    busy.check(Deadline::secs(240))?;
    let files = verify::filesystem(&guest, &small)?;
    let left = verify::filesystem(&guest, &large)?;
    verify::files_intact(&guest, &small, &files)?;
    machine.quit()?;
    for agent in agents {
        agent.terminate()?;
    }
    let said = server.terminate()?;
    println!("{said}");
    Ok((host, shell, said, left))
}

#[test]
fn two_lent_drives_do_not_touch_each_other() -> TestResult {
    let scratch = Scratch::new("disks")?;
    let (first, second) = (scratch.disk("0", SIZE)?, scratch.disk("1", SIZE / 2)?);
    let host = networked(lender("lends-two", Kernel::V6_12))
        .emulated_nvme("nv0", &first)
        .emulated_nvme("nv1", &second);
    let options = "--bind --pci 0000:01:00.0,name=disk0 --pci 0000:02:00.0,name=disk1";
    let (host, ..) = two_lent_drives(&host, options, ["disk0", "disk1"])?;
    host.quit()?;
    Ok(())
}

/// A virtual function, which the device server makes and equips, beside a physical one. The virtual
/// one's namespace is its physical function's, too, whose driver stays with the lender.
#[test]
fn virtual_function_and_physical_one_are_lent_at_once() -> TestResult {
    let scratch = Scratch::new("disks")?;
    let (first, second) = (scratch.disk("0", SIZE)?, scratch.disk("1", SIZE / 2)?);
    let host = sriov_nvme(networked(lender("lends-vf", Kernel::V6_12)), 2, &first)
        .emulated_nvme("nv1", &second);
    let options = "--bind --sriov 0000:01:00.0,vfs=2,name=vf --pci 0000:02:00.0,name=disk1";
    let (host, shell, said, files) = two_lent_drives(&host, options, ["vf-1", "disk1"])?;

    assert!(
        said.contains("virtual functions that got 4 queues and 4 interrupts each: 2"),
        "{said}"
    );
    // All that was given is the physical function's again, and the guest's files are on its disk.
    let secondaries = shell.check("nvme list-secondary /dev/nvme0 -e 2")?;
    println!("{secondaries}");
    assert!(!secondaries.contains("(Online)"), "{secondaries}");
    let assigned = secondaries
        .lines()
        .filter(|line| line.contains("Flex Resources Assigned"));
    let assigned: Vec<&str> = assigned.filter(|line| !line.ends_with(": 0000")).collect();
    assert!(
        assigned.is_empty() && secondaries.contains("NVQ"),
        "{assigned:?}"
    );
    shell.check(&format!("test $(cat {PHYSICAL}/sriov_numvfs) = 0"))?;
    verify::files_intact(&shell, DRIVE, &files)?;
    host.quit()?;
    Ok(())
}
