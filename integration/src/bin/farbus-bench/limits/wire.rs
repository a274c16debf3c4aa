//! Ping-pong between two processes over a socket, blocking or polled.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use farbus_integration::process::{Process, mortal_command};
use farbus_integration::scratch::Scratch;

use super::How;
use super::namespaces::Namespace;
use crate::helpers::{Pinned, Role, start_listening};
use crate::interrupt;
use crate::results::{Figures, figure};
use crate::session::{Latencies, Plan};

/// A connected socket of either kind.
#[derive(Debug)]
pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl From<TcpStream> for Stream {
    fn from(stream: TcpStream) -> Self {
        Self::Tcp(stream)
    }
}

impl From<UnixStream> for Stream {
    fn from(stream: UnixStream) -> Self {
        Self::Unix(stream)
    }
}

impl Stream {
    /// Sends without delay, and returns at once when polled.
    pub(crate) fn prepare(&self, polled: bool) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => {
                stream.set_nodelay(true)?;
                stream.set_nonblocking(polled)
            }
            Self::Unix(stream) => stream.set_nonblocking(polled),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads all of `buffer`, spinning where the socket does not block.
pub(crate) fn read_exact(stream: &mut Stream, mut buffer: &mut [u8]) -> io::Result<()> {
    while !buffer.is_empty() {
        match stream.read(buffer) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(got) => buffer = &mut buffer[got..],
            Err(error) => spin_on(error)?,
        }
    }
    Ok(())
}

/// Writes all of `bytes`, spinning where the socket does not block.
pub(crate) fn write_all(stream: &mut Stream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(sent) => bytes = &bytes[sent..],
            Err(error) => spin_on(error)?,
        }
    }
    Ok(())
}

fn spin_on(error: io::Error) -> io::Result<()> {
    match error.kind() {
        ErrorKind::WouldBlock => std::hint::spin_loop(),
        ErrorKind::Interrupted => {}
        _ => return Err(error),
    }
    Ok(())
}

/// Where the other end of a TCP connection is.
#[derive(Debug)]
pub(crate) struct Place<'a> {
    address: &'a str,
    namespace: Option<&'a Namespace>,
}

impl<'a> Place<'a> {
    pub(crate) fn loopback() -> Self {
        Self {
            address: "127.0.0.1:0",
            namespace: None,
        }
    }

    pub(crate) fn namespace(namespace: &'a Namespace) -> Self {
        Self {
            address: namespace.address(),
            namespace: Some(namespace),
        }
    }

    /// Starts the other end there and connects to it.
    pub(crate) fn connect(
        &self,
        role: Role,
        sizes: (usize, usize),
        how: How,
    ) -> Result<(Process, Stream)> {
        let own = std::env::current_exe().context("finding this program")?;
        let mut command = match self.namespace {
            Some(namespace) => namespace.command(&own),
            None => mortal_command(&own),
        };
        echo_arguments(&mut command, role, sizes, how);
        command.args(["--tcp", self.address]);
        let (process, address) = start_listening("echo", command)?;
        let stream = Stream::from(TcpStream::connect(&address).context("connecting")?);
        stream.prepare(how == How::Polled)?;
        Ok((process, stream))
    }
}

fn connect_unix(path: &Path, sizes: (usize, usize), how: How) -> Result<(Process, Stream)> {
    let own = std::env::current_exe().context("finding this program")?;
    let mut command = mortal_command(&own);
    echo_arguments(&mut command, Role::Echo, sizes, how);
    command.arg("--unix").arg(path);
    let (process, _) = start_listening("echo", command)?;
    let stream = Stream::from(UnixStream::connect(path).context("connecting")?);
    stream.prepare(how == How::Polled)?;
    Ok((process, stream))
}

fn echo_arguments(command: &mut Command, role: Role, sizes: (usize, usize), how: How) {
    let role = match role {
        Role::Echo => "echo",
        Role::Sink => "sink",
        Role::Source => "source",
    };
    command
        .args(["echo", "--role", role])
        .args(["--request", &sizes.0.to_string()])
        .args(["--response", &sizes.1.to_string()]);
    let cpu = match how {
        How::OneCpu => Pinned::NEAR,
        How::Blocking | How::Polled => Pinned::far(),
    };
    command.args(["--cpu", &cpu.to_string()]);
    if how == How::Polled {
        command.arg("--polled");
    }
}

/// A ping-pong to be.
#[derive(Debug)]
pub(crate) struct Wire<'a> {
    place: Option<&'a Place<'a>>,
    sizes: (usize, usize),
    how: How,
}

impl<'a> Wire<'a> {
    pub(crate) fn tcp(place: &'a Place<'a>, sizes: (usize, usize), how: How) -> Self {
        Self {
            place: Some(place),
            sizes,
            how,
        }
    }

    pub(crate) fn unix(sizes: (usize, usize), how: How) -> Self {
        Self {
            place: None,
            sizes,
            how,
        }
    }

    pub(crate) fn measure(&self, plan: &Plan) -> Result<Figures> {
        // Holds the socket's path for as long as it is needed.
        let scratch = Scratch::new("wire")?;
        let (_process, mut stream) = match self.place {
            Some(place) => place.connect(Role::Echo, self.sizes, self.how)?,
            None => connect_unix(&scratch.join("s"), self.sizes, self.how)?,
        };
        let _pinned = Pinned::to(Pinned::NEAR)?;
        let request = vec![0; self.sizes.0];
        let mut response = vec![0; self.sizes.1];
        ping(plan, || {
            write_all(&mut stream, &request)?;
            read_exact(&mut stream, &mut response)?;
            Ok(())
        })
    }
}

/// Times `round_trip` again and again: first to warm up, then for the figures.
pub(crate) fn ping(plan: &Plan, mut round_trip: impl FnMut() -> Result<()>) -> Result<Figures> {
    let warm = Instant::now() + plan.warmup;
    while Instant::now() < warm {
        round_trip()?;
    }
    interrupt::check()?;
    let mut latencies = Latencies::new()?;
    let begun = Instant::now();
    let mut last = begun;
    while last.duration_since(begun) < plan.time {
        round_trip()?;
        let now = Instant::now();
        latencies.add(now.duration_since(last));
        last = now;
    }
    let mut figures = latencies.figures();
    let rate = latencies.count() as f64 / last.duration_since(begun).as_secs_f64();
    figures.insert(figure::IOPS.into(), rate);
    Ok(figures)
}
