//! Starts the programs of each peer, and ends them.

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use farbus_integration::deadline::Deadline;
use farbus_integration::process::{Process, describe_status, run_tool, tail};
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::peers::Peers;

use crate::interrupt;
use crate::sides::Side;
use crate::usage::Watched;

/// Size of the disk.
const DISK_BYTES: u64 = 256 << 20;

/// How long a program may take to be ready.
const READY_SECS: u64 = 20;

/// Queues of each vhost-user-blk device; a client uses as many of them as it likes.
const QUEUES: u32 = 4;

/// The running programs of a peer. Dropping them kills them, also the one that ignores SIGTERM.
#[derive(Debug)]
pub(crate) struct Chain {
    /// The vhost-user-blk sockets at its end, one for each attachment.
    pub(crate) sockets: Vec<PathBuf>,
    pub(crate) watched: Vec<Watched>,
    processes: Vec<Process>,
    _disk: Option<Scratch>,
}

impl Chain {
    /// An error unless all of its programs are running; their words are in `scratch`.
    pub(crate) fn check(&mut self, scratch: &Scratch) -> Result<()> {
        for process in &mut self.processes {
            check(process, scratch)?;
        }
        Ok(())
    }
}

/// nbdkit with a disk in memory, reached through qemu-storage-daemon.
pub(crate) fn nbd(peers: &Peers, scratch: &Scratch, attachments: u32) -> Result<Chain> {
    let port = free_port()?;
    let mut nbdkit = peers.nbdkit()?;
    nbdkit
        .args(["-f", "-i", "127.0.0.1", "-p", &port.to_string()])
        .arg(peers.nbdkit_plugin("memory")?)
        .arg(DISK_BYTES.to_string());
    let mut server = start("nbdkit", nbdkit, scratch)?;
    wait(&mut server, scratch, || {
        TcpStream::connect(("127.0.0.1", port)).is_ok()
    })?;
    let served = Served {
        server: ("nbdkit", server),
        node: nbd_client(port),
        disk: None,
    };
    served.attach(peers, scratch, attachments)
}

/// qemu-storage-daemon at both ends; the disk is none, and moves no data to speak of.
pub(crate) fn nbd_null(peers: &Peers, scratch: &Scratch, attachments: u32) -> Result<Chain> {
    let port = free_port()?;
    let mut daemon = peers.qemu_storage_daemon()?;
    daemon
        .args(["--object", "iothread,id=io0"])
        .arg("--blockdev")
        .arg(format!(
            "driver=null-co,node-name=n0,size={DISK_BYTES},read-zeroes=on"
        ))
        .arg("--nbd-server")
        .arg(format!(
            "addr.type=inet,addr.host=127.0.0.1,addr.port={port}"
        ))
        .args([
            "--export",
            "type=nbd,id=e0,node-name=n0,name=,writable=on,iothread=io0",
        ]);
    let mut server = start("qsd-server", daemon, scratch)?;
    wait(&mut server, scratch, || {
        TcpStream::connect(("127.0.0.1", port)).is_ok()
    })?;
    let served = Served {
        server: ("qsd-server", server),
        node: nbd_client(port),
        disk: None,
    };
    served.attach(peers, scratch, attachments)
}

fn nbd_client(port: u16) -> String {
    format!("driver=nbd,node-name=n0,server.type=inet,server.host=127.0.0.1,server.port={port}")
}

/// tgt with a disk in memory, reached through qemu-storage-daemon.
pub(crate) fn iscsi(peers: &Peers, scratch: &Scratch, attachments: u32) -> Result<Chain> {
    const TARGET: &str = "iqn.2001-04.com.example:bench";
    let port = free_port()?;
    let control = std::process::id().to_string();
    let ipc = scratch.join("tgt");
    let portal = format!("127.0.0.1:{port}");

    let memory = memory_dir()?;
    let image = memory.disk("disk.img", DISK_BYTES)?;
    let mut tgtd = peers.tgtd()?;
    tgtd.args(["-f", "--iscsi", &format!("portal={portal}"), "-C", &control])
        .env("TGT_IPC_SOCKET", &ipc);
    let mut server = start("tgtd", tgtd, scratch)?;
    wait(&mut server, scratch, || {
        TcpStream::connect(("127.0.0.1", port)).is_ok()
    })?;

    let image = image.display().to_string();
    for arguments in [
        &[
            "--mode", "target", "--op", "new", "--tid", "1", "-T", TARGET,
        ][..],
        &[
            "--mode",
            "logicalunit",
            "--op",
            "new",
            "--tid",
            "1",
            "--lun",
            "1",
            "-b",
            &image,
        ],
        &[
            "--mode",
            "target",
            "--op",
            "bind",
            "--tid",
            "1",
            "-I",
            "127.0.0.1",
        ],
    ] {
        let mut tgtadm = peers.tgtadm()?;
        tgtadm
            .args(["-C", &control, "--lld", "iscsi"])
            .args(arguments)
            .env("TGT_IPC_SOCKET", &ipc);
        run_tool(&mut tgtadm)?;
    }
    let served = Served {
        server: ("tgtd", server),
        node: format!(
            "driver=iscsi,node-name=n0,transport=tcp,portal={portal},target={TARGET},lun=1"
        ),
        disk: Some(memory),
    };
    served.attach(peers, scratch, attachments)
}

/// A server that is running, and how qemu-storage-daemon reaches it.
struct Served {
    server: (&'static str, Process),
    node: String,
    disk: Option<Scratch>,
}

impl Served {
    /// Offers what it serves as vhost-user-blk devices, each of a process of its own.
    fn attach(self, peers: &Peers, scratch: &Scratch, attachments: u32) -> Result<Chain> {
        let (name, server) = self.server;
        let watch = |name, side, process: &Process| Watched {
            side,
            name,
            pid: process.id(),
        };
        let mut chain = Chain {
            sockets: Vec::new(),
            watched: vec![watch(name, Side::Device, &server)],
            processes: Vec::new(),
            _disk: self.disk,
        };
        for number in 0..attachments {
            let socket = scratch.join(format!("blk{number}.sock"));
            let daemon = storage_daemon(peers, scratch, &self.node, &socket)?;
            chain.watched.push(watch("qsd", Side::Compute, &daemon));
            chain.sockets.push(socket);
            chain.processes.push(daemon);
        }
        // Those that are connected to it end first.
        chain.processes.push(server);
        Ok(chain)
    }
}

/// Offers a block node as a vhost-user-blk device.
fn storage_daemon(peers: &Peers, scratch: &Scratch, node: &str, socket: &Path) -> Result<Process> {
    let mut daemon = peers.qemu_storage_daemon()?;
    daemon
        .args([
            "--object",
            "iothread,id=io0",
            "--blockdev",
            node,
            "--export",
        ])
        .arg(format!(
            "type=vhost-user-blk,id=e0,node-name=n0,addr.type=unix,addr.path={},writable=on,\
             num-queues={QUEUES},iothread=io0",
            socket.display()
        ));
    let mut process = start("qsd", daemon, scratch)?;
    wait(&mut process, scratch, || {
        UnixStream::connect(socket).is_ok()
    })?;
    Ok(process)
}

/// A directory whose files are in memory.
fn memory_dir() -> Result<Scratch> {
    Ok(Scratch::within(Path::new("/dev/shm"), "disk")?)
}

/// Starts a program whose words go to a file of `scratch`.
pub(crate) fn start(name: &str, mut command: Command, scratch: &Scratch) -> Result<Process> {
    let log = File::create(scratch.join(format!("{name}.log"))).context("making a log")?;
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    Ok(Process::start(name, command)?)
}

/// An error with its last words when a program that [`start`] started has ended.
fn check(process: &mut Process, scratch: &Scratch) -> Result<()> {
    if let Some(status) = process.try_status()? {
        let name = process.name();
        let status = describe_status(status);
        bail!("{name} ended ({status}): {}", words(name, scratch));
    }
    Ok(())
}

fn words(name: &str, scratch: &Scratch) -> String {
    let said = std::fs::read_to_string(scratch.join(format!("{name}.log")));
    tail(&said.unwrap_or_default(), 5)
}

/// Waits until `ready`; the program's end is an error.
pub(crate) fn wait(
    process: &mut Process,
    scratch: &Scratch,
    mut ready: impl FnMut() -> bool,
) -> Result<()> {
    let deadline = Deadline::secs(READY_SECS);
    // None of these programs tells by an event that it listens.
    while !ready() {
        interrupt::check()?;
        check(process, scratch)?;
        if deadline.has_passed() {
            let name = process.name();
            let seen = words(name, scratch);
            return Err(deadline
                .missed_with(format!("readiness of {name}"), &seen)
                .into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A port that nobody uses just now.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
