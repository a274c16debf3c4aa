//! The demonstration that a newcomer runs: a guest uses a drive that lives behind another process.
//!
//! The programs run with the arguments that the documentation gives for them, and the output is
//! what a person would look at: the guest's own view of the drive, a file written and verified, and
//! how fast it was.

use std::path::Path;

use crate::builder::MachineBuilder;
use crate::daemon::Daemon;
use crate::deadline::Deadline;
use crate::error::Result;
use crate::guest::Guest;
use crate::measure::{Workload, measure};
use crate::scratch::Scratch;
use crate::tools::Tools;
use crate::tools::initramfs::Userland;
use crate::verify;

const DRIVE: &str = "/dev/nvme0n1";

const WORKLOADS: [Workload; 4] = [
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
    let (server, agent, socket) = start_daemons(&scratch)?;
    show(&machine.vfio_user("disk0", &socket), &tools)?;
    agent.terminate()?;
    server.terminate()
}

/// The two programs, with a drive of 1 GiB between them.
fn start_daemons(scratch: &Scratch) -> Result<(Daemon, Daemon, std::path::PathBuf)> {
    let path = |path: &Path| path.display().to_string();
    let drive = format!("path={},size=1GiB", path(&scratch.join("disk.img")));
    let server = Daemon::start(
        "farbus-device-server",
        &[
            "export",
            "--soft-nvme",
            &drive,
            "--name",
            "disk0",
            "--listen",
            "127.0.0.1:0",
        ],
    )?;
    println!("device server: {}", server.ready());
    let address = server
        .ready_value("listen")
        .unwrap_or("127.0.0.1:7420")
        .to_owned();
    let socket = scratch.join("disk0.sock");
    let agent = Daemon::start(
        "farbus-compute-agent",
        &[
            "attach",
            "--from",
            &address,
            "--export",
            "disk0",
            "--vfio-user",
            &path(&socket),
        ],
    )?;
    println!("compute agent: {}", agent.ready());
    Ok((server, agent, socket))
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
