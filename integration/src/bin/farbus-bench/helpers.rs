//! Processes that a measurement consists of beside the one that measures: this program again, with a
//! subcommand of its own. They end when their peer does, and the kernel kills them when their parent dies.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use farbus_integration::process::Process;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::limits::wire::{Stream, read_exact, write_all};

/// Arguments of `spin`.
#[derive(Debug, Args)]
pub(crate) struct SpinArgs {
    /// The CPU to keep busy.
    #[arg(long)]
    cpu: usize,
}

/// Spins until it is killed; without the instruction for waiting loops, which has a hypervisor take the CPU away.
pub(crate) fn spin(args: &SpinArgs) -> Result<()> {
    let _pinned = Pinned::to(args.cpu)?;
    let mut turns = 0_u64;
    loop {
        turns = std::hint::black_box(turns.wrapping_add(1));
    }
}

/// Keeps the calling thread on one CPU for as long as it lives.
///
/// Limits are those of two ends that do not share a CPU, as two hosts do not, unless they say so. Left alone,
/// the scheduler puts both ends of a ping-pong on one CPU at some times and not at others.
#[derive(Debug)]
pub(crate) struct Pinned {
    before: CpuSet,
}

impl Pinned {
    /// CPU of the end that measures.
    pub(crate) const NEAR: usize = 0;

    /// CPU of the other end: the first of the upper half, which the other side has.
    pub(crate) fn far() -> usize {
        std::thread::available_parallelism().map_or(0, |count| count.get() / 2)
    }

    /// `cpu` counts those that this process may use, and starts again at their end.
    pub(crate) fn to(cpu: usize) -> Result<Self> {
        let before = sched_getaffinity(None).context("reading the CPU affinity")?;
        let allowed: Vec<usize> = (0..CpuSet::MAX_CPU)
            .filter(|cpu| before.is_set(*cpu))
            .collect();
        let mut set = CpuSet::new();
        set.set(allowed[cpu % allowed.len().max(1)]);
        sched_setaffinity(None, &set).context("setting the CPU affinity")?;
        Ok(Self { before })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // It was the affinity a moment ago.
        let _ = sched_setaffinity(None, &self.before);
    }
}

/// What the other end of a connection does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    /// Answers each request.
    Echo,
    /// Reads all that comes.
    Sink,
    /// Writes without end.
    Source,
}

/// Arguments of `echo`.
#[derive(Debug, Clone, Args)]
pub(crate) struct EchoArgs {
    /// A TCP address to listen on.
    #[arg(long, required_unless_present = "unix")]
    pub(crate) tcp: Option<SocketAddr>,
    /// A UNIX socket to listen on.
    #[arg(long, conflicts_with = "tcp")]
    pub(crate) unix: Option<PathBuf>,
    #[arg(long, value_enum)]
    pub(crate) role: Role,
    /// Bytes of a request, or of what is read at a time.
    #[arg(long)]
    pub(crate) request: usize,
    /// Bytes of an answer, or of what is written at a time.
    #[arg(long)]
    pub(crate) response: usize,
    /// Does not sleep while it waits.
    #[arg(long)]
    pub(crate) polled: bool,
    /// The CPU to run on.
    #[arg(long)]
    pub(crate) cpu: usize,
}

/// Serves one connection. Prints where it listens.
pub(crate) fn echo(args: &EchoArgs) -> Result<()> {
    let _pinned = Pinned::to(args.cpu)?;
    let mut stream = match (&args.tcp, &args.unix) {
        (Some(address), _) => {
            let listener = TcpListener::bind(address).context("listening")?;
            say(&listener.local_addr()?.to_string())?;
            Stream::from(listener.accept()?.0)
        }
        (None, Some(path)) => {
            let listener = UnixListener::bind(path).context("listening")?;
            say(&path.display().to_string())?;
            Stream::from(listener.accept()?.0)
        }
        (None, None) => bail!("nowhere to listen"),
    };
    stream.prepare(args.polled)?;
    match serve(&mut stream, args) {
        // The peer has seen enough.
        Err(error) if is_end(&error) => Ok(()),
        other => other.context("serving"),
    }
}

fn serve(stream: &mut Stream, args: &EchoArgs) -> io::Result<()> {
    let mut request = vec![0; args.request];
    let response = vec![0; args.response];
    loop {
        match args.role {
            Role::Echo => {
                read_exact(stream, &mut request)?;
                write_all(stream, &response)?;
            }
            Role::Sink => match stream.read(&mut request)? {
                0 => return Ok(()),
                _ => continue,
            },
            Role::Source => write_all(stream, &response)?,
        }
    }
}

fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

fn say(address: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{address}")?;
    out.flush()
}

/// Starts a process whose first line says where it listens; returns both.
pub(crate) fn start_listening(name: &str, mut command: Command) -> Result<(Process, String)> {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut process = Process::start(name, command)?;
    let stdout = process.child().stdout.take();
    let mut line = String::new();
    if let Some(stdout) = stdout {
        BufReader::new(stdout).read_line(&mut line)?;
    }
    if line.is_empty() {
        bail!("'{name}' ended before it listened");
    }
    Ok((process, line.trim().to_owned()))
}
