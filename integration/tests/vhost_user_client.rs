//! vhost-user-blk without a virtual machine: QEMU's disk tools, through libblkio, use a remote
//! drive.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use farbus_compute_agent::custody::Event;
use farbus_integration::attached::{self, AttachedDrive};
use farbus_integration::custody::{ID, KeptWorker};
use farbus_integration::daemon::{Daemon, program};
use farbus_integration::deadline::Deadline;
use farbus_integration::process::{Process, run_tool};
use farbus_integration::report::{Failure, TestResult};
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::Tools;
use farbus_integration::tools::clients::BlockClients;
use farbus_integration::tools::initramfs::busybox;
use farbus_integration::tools::uml::UserModeLinux;
use rustix::io::{FdFlags, fcntl_setfd};

fn image(socket: &Path) -> String {
    format!(
        "driver=virtio-blk-vhost-user,path={},cache.direct=on",
        socket.display()
    )
}

/// Runs commands of qemu-io; what it prints.
fn qemu_io(clients: &BlockClients, socket: &Path, commands: &[String]) -> Result<String, Failure> {
    let mut command = clients.command("qemu-io")?;
    command.args(["--image-opts", &image(socket)]);
    for words in commands {
        command.args(["-c", words]);
    }
    let said = String::from_utf8_lossy(&run_tool(&mut command)?).into_owned();
    assert!(!said.contains("ailed"), "{said}");
    Ok(said)
}

fn words(commands: &[&str]) -> Vec<String> {
    commands.iter().map(|&words| words.to_owned()).collect()
}

#[test]
fn blocks_are_written_zeroed_trimmed_and_read_by_libblkio() -> TestResult {
    let clients = BlockClients::obtain()?;
    let scratch = Scratch::new("vhost-io")?;
    let drive = AttachedDrive::start_vhost_user(&scratch, "size=64MiB", &[])?;
    let script = [
        "write -P 0x5a 8k 64k",
        "flush",
        "write -z 16k 8k",
        "discard 32k 8k",
        "read -P 0x5a 8k 8k",
        "read -P 0 16k 8k",
        "read -P 0x5a 24k 8k",
        "read -P 0x5a 40k 32k",
    ];
    qemu_io(&clients, &drive.socket, &words(&script))?;
    let mut backing = vec![0; 65536];
    File::open(&drive.disk)?.read_exact_at(&mut backing, 8192)?;
    assert!(backing[..8192].iter().all(|byte| *byte == 0x5a));
    assert!(backing[8192..16384].iter().all(|byte| *byte == 0));
    drive.end()?;
    Ok(())
}

#[test]
fn worker_of_the_daemon_serves_in_its_sandbox_and_ends_when_it_is_told() -> TestResult {
    let clients = BlockClients::obtain()?;
    let scratch = Scratch::new("vhost-kept")?;
    let socket = scratch.join("disk0.sock");
    let server = attached::serve("backing=memory,size=64MiB")?;
    let address = attached::address(&server);
    let kind = "--vhost-user-blk";
    let mut kept = KeptWorker::start_kind(kind, scratch.path(), &address, &socket, &[])?;
    qemu_io(
        &clients,
        &socket,
        &words(&["write -P 0x5a 8k 64k", "flush"]),
    )?;
    kept.restart_keeper()?;
    kept.event("the worker's return", |event| {
        matches!(event, Event::Ready { .. })
    })?;
    qemu_io(&clients, &socket, &words(&["read -P 0x5a 8k 64k"]))?;
    assert!(kept.keeper()?.stop(ID));
    kept.event("the worker's end", |event| {
        matches!(event, Event::Bye { .. })
    })?;
    kept.end()?;
    server.terminate().map_err(Into::into)
}

#[test]
fn what_is_written_32_at_a_time_is_read_back_32_at_a_time() -> TestResult {
    let clients = BlockClients::obtain()?;
    let scratch = Scratch::new("vhost-depth")?;
    let drive = AttachedDrive::start_vhost_user(&scratch, "size=64MiB", &[])?;
    let mut script = Vec::new();
    for round in 0..6u64 {
        // Lengths of 512 bytes to 160 KiB, in places that do not touch.
        let all: Vec<_> = (0..32u64)
            .map(|n| {
                let at = (n * 7 % 32) * (1 << 20) + round * 512;
                let len = ((n * n + round) % 320 + 1) * 512;
                (at, len, (n * 32 + round) % 255 + 1)
            })
            .collect();
        for (at, len, pattern) in &all {
            script.push(format!("aio_write -q -P {pattern} {at} {len}"));
        }
        script.push("aio_flush".into());
        for (at, len, pattern) in &all {
            script.push(format!("aio_read -q -P {pattern} {at} {len}"));
        }
        script.push("aio_flush".into());
    }
    qemu_io(&clients, &drive.socket, &script)?;
    drive.end()?;
    Ok(())
}

#[test]
fn image_is_copied_out_of_order_and_compares_equal() -> TestResult {
    let clients = BlockClients::obtain()?;
    let scratch = Scratch::new("vhost-copy")?;
    let drive = AttachedDrive::start_vhost_user(&scratch, "size=64MiB,block-size=4096", &[])?;
    let source = scratch.join("source.img");
    let mut bytes = vec![0; 64 << 20];
    File::open("/dev/urandom")?.read_exact(&mut bytes[..48 << 20])?;
    std::fs::write(&source, &bytes)?;
    let source = source.display().to_string();
    let target = image(&drive.socket);
    run_tool(clients.command("qemu-img")?.args([
        "convert",
        "-n",
        "-W",
        "-m",
        "16",
        "-t",
        "none",
        "-f",
        "raw",
        "--target-image-opts",
        &source,
        &target,
    ]))?;
    let from = format!("driver=raw,file.driver=file,file.filename={source}");
    run_tool(
        clients
            .command("qemu-img")?
            .args(["compare", "--image-opts", &from, &target]),
    )?;
    drive.end()?;
    Ok(())
}

#[test]
fn benchmark_at_depth_32_ends_and_the_agent_serves_the_next_client() -> TestResult {
    let clients = BlockClients::obtain()?;
    let scratch = Scratch::new("vhost-bench")?;
    let drive = AttachedDrive::start_vhost_user(&scratch, "size=64MiB", &[])?;
    for more in [&[][..], &["-w"]] {
        let mut command = clients.command("qemu-img")?;
        command.args([
            "bench",
            "--image-opts",
            "-t",
            "none",
            "-c",
            "20000",
            "-d",
            "32",
        ]);
        command.args(["-s", "4096", "-S", "8192"]).args(more);
        let said = run_tool(command.arg(image(&drive.socket)))?;
        println!("{}", String::from_utf8_lossy(&said));
    }
    drive.end()?;
    Ok(())
}

#[test]
fn read_only_device_and_drive_that_another_has_are_refused() -> TestResult {
    let clients = BlockClients::obtain()?;
    let scratch = Scratch::new("vhost-refused")?;
    let drive = AttachedDrive::start_vhost_user(&scratch, "size=64MiB", &["--readonly"])?;
    let mut command = clients.command("qemu-io")?;
    command.args(["--image-opts", &image(&drive.socket), "-c", "write 0 4k"]);
    assert!(run_tool(&mut command).is_err(), "it took a write");
    let mut command = clients.command("qemu-io")?;
    command.args([
        "-r",
        "--image-opts",
        &image(&drive.socket),
        "-c",
        "read 0 4k",
    ]);
    run_tool(&mut command)?;
    // A second agent is told who has the export, and does not disturb.
    let other = scratch.join("other.sock").display().to_string();
    let address = attached::address(&drive.server);
    let refused = Daemon::run(
        "farbus-compute-agent",
        &[
            "attach",
            "--from",
            &address,
            "--export",
            attached::EXPORT,
            "--vhost-user-blk",
            &other,
        ],
        Deadline::secs(20),
    )?;
    assert_eq!(refused.status.code(), Some(3), "{}", refused.stderr);
    drive.end()?;
    Ok(())
}

#[test]
fn backend_says_what_it_can_do_as_the_conventions_have_it() -> TestResult {
    for arguments in [
        &["--print-capabilities"][..],
        &[
            "attach",
            "--socket-path",
            "/nowhere",
            "--print-capabilities",
        ],
    ] {
        let said = run_tool(Command::new(program("farbus-compute-agent")?).args(arguments))?;
        let said: serde_json::Value = serde_json::from_slice(&said)?;
        assert_eq!(said["type"], "block");
        assert_eq!(said["features"], serde_json::json!(["read-only"]));
    }
    let description = include_str!("../../compute-agent/share/50-farbus-vhost-user-blk.json");
    let description: serde_json::Value = serde_json::from_str(description)?;
    assert_eq!(description["type"], "block");
    assert!(
        description["binary"]
            .as_str()
            .is_some_and(|b| b.ends_with("/farbus-compute-agent"))
    );
    Ok(())
}

#[test]
fn agent_serves_a_socket_that_it_was_started_with() -> TestResult {
    let clients = BlockClients::obtain()?;
    let scratch = Scratch::new("vhost-fd")?;
    let path = scratch.join("inherited.sock");
    let listener = UnixListener::bind(&path)?;
    fcntl_setfd(&listener, FdFlags::empty())?;
    let spec = format!("path={},size=64MiB", scratch.join("disk.img").display());
    let server = attached::serve(&spec)?;
    let number = listener.as_raw_fd().to_string();
    let agent = Daemon::start(
        "farbus-compute-agent",
        &[
            "attach",
            "--from",
            &attached::address(&server),
            "--export",
            attached::EXPORT,
            "--fd",
            &number,
        ],
    )?;
    drop(listener);
    let script = ["write -P 7 0 1M", "read -P 7 0 1M"];
    qemu_io(&clients, &path, &words(&script))?;
    agent.terminate()?;
    server.terminate()?;
    Ok(())
}

/// Another kernel's frontend. What its init does is written to a file of this host.
#[test]
fn user_mode_linux_writes_and_reads_back() -> TestResult {
    let uml = UserModeLinux::obtain()?;
    let module = uml.module("virtio_blk.ko")?;
    let scratch = Scratch::new("uml")?;
    let options = ["--num-queues", "1"];
    let drive = AttachedDrive::start_vhost_user(&scratch, "size=64MiB", &options)?;
    let (init, report) = (scratch.join("init"), scratch.join("report"));
    let script = format!(
        "#!/bin/sh\n\
         PATH=/usr/sbin:/usr/bin:/sbin:/bin\n\
         exec >{report} 2>&1\n\
         set -ex\n\
         mount -t proc proc /proc\n\
         mount -t sysfs sysfs /sys\n\
         {busybox} insmod {module}\n\
         test $(cat /sys/block/vda/size) = 131072\n\
         dd if=/dev/urandom of={source} bs=1M count=24\n\
         dd if={source} of=/dev/vda bs=64k oflag=direct conv=fsync\n\
         dd if=/dev/vda bs=12k count=2048 iflag=direct | cmp - {source}\n\
         echo all is well\n",
        report = report.display(),
        busybox = busybox(Tools::open()?.tree())?.display(),
        module = module.display(),
        source = scratch.join("source").display(),
    );
    std::fs::write(&init, script)?;
    std::fs::set_permissions(&init, PermissionsExt::from_mode(0o755))?;
    let mut command = uml.boot(scratch.path(), &init, &drive.socket)?;
    let log = File::create(scratch.join("console"))?;
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    // The end of its init is a panic, which ends it.
    Process::start("uml", command)?.wait(Deadline::secs(90))?;
    let said = std::fs::read_to_string(&report).unwrap_or_default();
    let console = std::fs::read_to_string(scratch.join("console"))?;
    assert!(said.ends_with("all is well\n"), "{said}\n{console}");
    drive.end()?;
    Ok(())
}
