//! The demonstration that a newcomer runs: a guest uses a drive that lives behind another process.
//!
//! The programs run as an operator starts them, and the output is what a person would look at: the
//! guest's own view of the drive, files written and verified, and how fast it was.

use crate::attached::AttachedDrive;
use crate::builder::MachineBuilder;
use crate::deadline::Deadline;
use crate::error::Result;
use crate::guest::Guest;
use crate::measure::{Workload, measure};
use crate::scratch::Scratch;
use crate::tools::Tools;
use crate::tools::initramfs::Userland;
use crate::verify;

const DRIVE: &str = "/dev/nvme0n1";

const WORKLOADS: [Workload<'static>; 4] = [
    Workload {
        pattern: "randread",
        block: "4k",
        depth: 1,
        seconds: 3,
    },
    Workload {
        pattern: "randread",
        block: "4k",
        depth: 32,
        seconds: 3,
    },
    Workload {
        pattern: "read",
        block: "128k",
        depth: 8,
        seconds: 3,
    },
    Workload {
        pattern: "write",
        block: "128k",
        depth: 8,
        seconds: 3,
    },
];

/// Shows a remote drive, or, for comparison, the one that QEMU emulates.
///
/// # Errors
/// When anything fails on the way.
pub fn run(emulated: bool) -> Result<()> {
    let tools = Tools::open()?;
    let scratch = Scratch::new("demo")?;
    let machine = MachineBuilder::new("demo").userland(Userland::Large);
    if emulated {
        let disk = scratch.disk("disk.img", 1 << 30)?;
        return show(&machine.emulated_nvme("disk0", &disk), &tools);
    }
    let drive = AttachedDrive::start(&scratch, "size=1GiB")?;
    println!("device server: {}", drive.server.ready());
    println!("compute agent: {}", drive.agent.ready());
    show(&machine.vfio_user("disk0", &drive.socket), &tools)?;
    drive.end()
}

fn show(builder: &MachineBuilder, tools: &Tools) -> Result<()> {
    let machine = builder.start(tools)?;
    let guest = machine.wait_guest(Deadline::secs(60))?;
    print(&guest, "uname -r")?;
    print(&guest, "lspci -nn | grep -i memory")?;
    print(&guest, "nvme list")?;
    println!("\n# how fast it is, as the guest sees it (emulated CPU: compare, do not quote)");
    for workload in WORKLOADS {
        let measured = measure(&guest, DRIVE, &workload)?;
        let Workload {
            pattern,
            block,
            depth,
            ..
        } = workload;
        println!("{pattern:>9} {block:>5} x{depth:<3} {measured}");
    }
    let files = verify::filesystem(&guest, DRIVE)?;
    let count = files.manifest.lines().count();
    println!("\n# {count} files written, read back after a remount, and verified (SHA-256):");
    print(
        &guest,
        &format!("mount -o ro {DRIVE} /mnt; df -h /mnt; sha256sum /mnt/large; umount /mnt"),
    )?;
    machine.quit()
}

fn print(guest: &Guest, command: &str) -> Result<()> {
    println!("\nguest# {command}\n{}", guest.check(command)?);
    Ok(())
}
