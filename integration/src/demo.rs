//! The demonstration that a newcomer runs: a guest uses a drive that lives behind another process.
//!
//! The programs run as an operator starts them, and the output is what a person would look at: the
//! guest's own view of the drive, files written and verified, and how fast it was.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use serde_json::Value;

use crate::attached;
use crate::builder::MachineBuilder;
use crate::daemon::program;
use crate::deadline::Deadline;
use crate::error::Result;
use crate::guest::Guest;
use crate::measure::{Workload, measure};
use crate::process::run_tool;
use crate::scratch::Scratch;
use crate::service::Service;
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

/// Shows a remote drive that is plugged into a running guest and unplugged, or, for comparison, the one
/// that QEMU emulates.
///
/// # Errors
/// When anything fails on the way.
pub fn run(emulated: bool) -> Result<()> {
    let tools = Tools::open()?;
    let scratch = Scratch::new("demo")?;
    let builder = MachineBuilder::new("demo").userland(Userland::Large);
    if !emulated {
        return show_remote(builder, &tools, &scratch);
    }
    let disk = scratch.disk("disk.img", 1 << 30)?;
    let machine = builder.emulated_nvme("disk0", &disk).start(&tools)?;
    let guest = machine.wait_guest(Deadline::secs(60))?;
    show(&guest)?;
    machine.quit()
}

fn show_remote(builder: MachineBuilder, tools: &Tools, scratch: &Scratch) -> Result<()> {
    let disk = scratch.join("disk.img");
    let server = attached::serve(&format!("path={},size=1GiB", disk.display()))?;
    println!("device server: {}", server.ready());
    let rack = format!("rack1={}", attached::address(&server));
    let mut service = Service::start(scratch, &[rack], &[])?;
    println!("compute agent: {}", service.daemon()?.ready());
    let socket = service.daemon()?.ready_value("socket").unwrap_or_default();
    let agent = Path::new(socket).to_owned();
    let qmp = scratch.join("qmp.sock").display().to_string();
    let machine = builder
        .monitor(Path::new(&qmp))
        .root_port("rp1", &Value::Null)
        .start(tools)?;
    let guest = machine.wait_guest(Deadline::secs(60))?;

    farbus(&agent, &["devices"])?;
    let begun = Instant::now();
    farbus(
        &agent,
        &["attach", "demo", "--device", "rack1/disk0", "--qmp", &qmp],
    )?;
    guest.wait_file(DRIVE, Deadline::secs(30))?;
    let took = begun.elapsed().as_secs_f32();
    println!("\n# the running guest has its drive {took:.1} s after the command was begun");
    show(&guest)?;
    farbus(&agent, &["list", "demo"])?;
    farbus(&agent, &["detach", "demo"])?;
    print(&guest, "ls /dev/nvme* 2>/dev/null || echo no drive")?;

    machine.quit()?;
    service.terminate()?;
    server.terminate()
}

fn show(guest: &Guest) -> Result<()> {
    print(guest, "uname -r")?;
    print(guest, "lspci -nn | grep -i memory")?;
    print(guest, "nvme list")?;
    println!("\n# how fast it is, as the guest sees it (emulated CPU: compare, do not quote)");
    for workload in WORKLOADS {
        let measured = measure(guest, DRIVE, &workload)?;
        let Workload {
            pattern,
            block,
            depth,
            ..
        } = workload;
        println!("{pattern:>9} {block:>5} x{depth:<3} {measured}");
    }
    let files = verify::filesystem(guest, DRIVE)?;
    let count = files.manifest.lines().count();
    println!("\n# {count} files written, read back after a remount, and verified (SHA-256):");
    print(
        guest,
        &format!("mount -o ro {DRIVE} /mnt; df -h /mnt; sha256sum /mnt/large; umount /mnt"),
    )
}

/// Runs `farbus` as an operator does, and shows both sides of it.
fn farbus(agent: &Path, arguments: &[&str]) -> Result<()> {
    println!("\nhost# farbus {}", arguments.join(" "));
    let mut command = Command::new(program("farbus")?);
    let said = run_tool(command.args(arguments).env("FARBUS_AGENT", agent))?;
    print!("{}", String::from_utf8_lossy(&said));
    Ok(())
}

fn print(guest: &Guest, command: &str) -> Result<()> {
    println!("\nguest# {command}\n{}", guest.check(command)?);
    Ok(())
}
