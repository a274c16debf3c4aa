//! vhost-user-blk without a virtual machine: QEMU's disk tools, through libblkio, use a remote
//! drive.

use std::path::Path;

use farbus_integration::attached::{self, AttachedDrive};
use farbus_integration::process::run_tool;
use farbus_integration::report::{Failure, TestResult};
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::clients::BlockClients;

fn image(socket: &Path) -> String {
    format!(
        "driver=virtio-blk-vhost-user,path={},cache.direct=on",
        socket.display()
    )
}

/// Runs commands of qemu-io; what it prints.
fn qemu_io(clients: &BlockClients, socket: &Path, commands: &[&str]) -> Result<String, Failure> {
    let mut command = clients.command("qemu-io")?;
    command.args(["--image-opts", &image(socket)]);
    for words in commands {
        command.args(["-c", words]);
    }
    let said = run_tool(&mut command)?;
    Ok(String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn blocks_are_read_back_by_libblkio() -> TestResult {
    let clients = BlockClients::obtain()?;
    let scratch = Scratch::new("vhost-io")?;
    let drive = AttachedDrive::start_vhost_user(&scratch, "size=64MiB", &[])?;
    let said = qemu_io(
        &clients,
        &drive.socket,
        &["write -P 0x5a 8k 64k", "flush", "read -P 0x5a 8k 64k"],
    )?;
    assert!(!said.contains("ailed"), "{said}");
    let backing = std::fs::read(&drive.disk)?;
    assert!(backing[8192..8192 + 65536].iter().all(|byte| *byte == 0x5a));
    drive.end()?;
    let _ = attached::EXPORT;
    Ok(())
}
