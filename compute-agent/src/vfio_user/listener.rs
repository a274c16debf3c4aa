//! The socket file that VMMs connect to.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, chmod, fchmod, lstat, unlink};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with,
};

/// The longest path that fits in a socket address, in bytes (`sun_path` less the NUL byte,
/// unix(7)).
const MAX_PATH: usize = 107;

/// Clients that wait to be accepted. Only one is served at a time.
const BACKLOG: i32 = 16;

/// Read and write for owner and group; whoever else should connect is made a member.
const MODE: Mode = Mode::from_raw_mode(0o660);

/// Why there is no endpoint.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The path does not fit in a socket address.
    #[error("the socket path {path} has {len} bytes; it must have 1 to {MAX_PATH}")]
    PathLength {
        /// The path.
        path: String,
        /// Its length in bytes.
        len: usize,
    },
    /// Another server listens at the path.
    #[error("the socket {path} is in use by another process; stop that, or choose another path")]
    InUse {
        /// The path.
        path: String,
    },
    /// There is something else at the path.
    #[error("{path} exists and is not a socket; remove it, or choose another path")]
    NotASocket {
        /// The path.
        path: String,
    },
    /// The operating system refused.
    #[error("cannot {what} the socket {path}; its directory must exist and be writable")]
    Socket {
        /// What was tried, as a verb.
        what: &'static str,
        /// The path.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// There is no memory for what a successor needs.
    #[error("there is no memory for what a successor of this process would need at {path}")]
    Memory {
        /// The endpoint's path.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A predecessor has left nothing that can be gone on with.
    #[error("what the last process has left of the endpoint {path} cannot be taken up")]
    NothingLeft {
        /// The endpoint's path.
        path: String,
    },
    /// An eventfd for the endpoint's own use cannot be had.
    #[error("cannot create an eventfd for the endpoint {path}")]
    EventFd {
        /// The endpoint's path.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// A listening socket and its file, which goes when this does.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of the file that we made; one that a successor put in its place is
    /// not ours to remove.
    file: Option<(u64, u64)>,
}

impl Listener {
    /// Listens at `path`. The file of a server that is no more is replaced.
    pub(crate) fn bind(path: &Path) -> Result<Self, EndpointError> {
        let shown = || path.display().to_string();
        let len = path.as_os_str().as_bytes().len();
        if !(1..=MAX_PATH).contains(&len) {
            return Err(EndpointError::PathLength { path: shown(), len });
        }
        let failed = |what| {
            move |e: Errno| EndpointError::Socket {
                what,
                path: path.display().to_string(),
                source: e.into(),
            }
        };
        let address = SocketAddrUnix::new(path).map_err(failed("name"))?;
        make_way(path, &address)?;
        let socket = new_socket().map_err(failed("create"))?;
        // The file gets the socket's mode less the umask, so that nobody else can ever open
        // it; what the umask took is given back before anyone can connect.
        fchmod(&socket, MODE).map_err(failed("set the mode of"))?;
        bind(&socket, &address).map_err(|error| match error {
            Errno::ADDRINUSE => EndpointError::InUse { path: shown() },
            other => failed("create")(other),
        })?;
        let file = lstat(path).ok().map(|stat| (stat.st_dev, stat.st_ino));
        let listener = Self {
            socket,
            path: path.to_owned(),
            file,
        };
        chmod(path, MODE).map_err(failed("set the mode of"))?;
        listen(&listener.socket, BACKLOG).map_err(failed("listen at"))?;
        Ok(listener)
    }

    /// The listener of a predecessor, which listened at `path`.
    pub(crate) fn resume(socket: OwnedFd, path: &Path) -> Self {
        let file = lstat(path).ok().map(|stat| (stat.st_dev, stat.st_ino));
        Self {
            socket,
            path: path.to_owned(),
            file,
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The next client, if one waits. Its socket is non-blocking.
    pub(crate) fn accept(&self) -> Result<Option<UnixStream>, Errno> {
        match accept_with(&self.socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
            Ok(fd) => Ok(Some(fd.into())),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes the file, so that nobody connects any more.
    pub(crate) fn unlink(&mut self) {
        let Some(ours) = self.file.take() else { return };
        let now = lstat(&self.path)
            .ok()
            .map(|stat| (stat.st_dev, stat.st_ino));
        if now == Some(ours) {
            match unlink(&self.path) {
                Ok(()) => {}
                // A worker in its sandbox may not; its daemon, or who listens here next, does.
                Err(Errno::ACCESS) => log::debug!("the socket {} is left", self.path.display()),
                Err(error) => {
                    log::warn!("cannot remove the socket {}: {error}", self.path.display());
                }
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.unlink();
    }
}

fn new_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Removes the socket file of a server that has died; nothing else.
fn make_way(path: &Path, address: &SocketAddrUnix) -> Result<(), EndpointError> {
    let shown = || path.display().to_string();
    let failed = |what, error: Errno| EndpointError::Socket {
        what,
        path: shown(),
        source: error.into(),
    };
    let stat = match lstat(path) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(failed("look at", error)),
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(EndpointError::NotASocket { path: shown() });
    }
    let probe = new_socket().map_err(|error| failed("create", error))?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {}
        // AGAIN: its backlog is full. PROTOTYPE: it is a datagram socket, and alive.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => {
            return Err(EndpointError::InUse { path: shown() });
        }
        Err(error) => return Err(failed("probe", error)),
    }
    match unlink(path) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(failed("replace", error)),
    }
}
