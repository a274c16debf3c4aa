//! The UNIX socket of a REST interface. Who may connect is who may open the file: owner and group.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, chmod, fchmod, lstat, unlink};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use tokio::net::{UnixListener, UnixStream};

/// The longest path that fits in a socket address, in bytes (`sun_path` less the NUL byte, unix(7)).
pub const MAX_PATH: usize = 107;

/// Clients that wait to be accepted.
const BACKLOG: i32 = 128;

/// Read and write for owner and group; whoever else should connect is made a member.
const MODE: Mode = Mode::from_raw_mode(0o660);

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The path does not fit in a socket address.
    #[error("the socket path {path} has {len} bytes; it must have 1 to {MAX_PATH}")]
    PathLength {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// Another server listens at the path.
    #[error("the socket {path} is in use by another process; stop that, or choose another path")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// There is something else at the path.
    #[error("{path} exists and is not a socket; remove it, or choose another path")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("cannot {what} the socket {path}; its directory must be writable")]
    Refused {
        /// What was tried, as a verb.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// A listening socket and its file, which goes when this does.
#[derive(Debug)]
pub struct SocketFile {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the file that we made; one that a successor put in its place is not
    /// ours to remove.
    file: Option<(u64, u64)>,
}

impl SocketFile {
    /// Listens at `path`, and makes its directory if there is none. The file of a server that is no
    /// more is replaced. To be called within a tokio runtime.
    ///
    /// # Errors
    /// See [`ListenError`].
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let len = path.as_os_str().as_bytes().len();
        if !(1..=MAX_PATH).contains(&len) {
            let path = path.to_owned();
            return Err(ListenError::PathLength { path, len });
        }
        let refused = |what| {
            move |source: io::Error| ListenError::Refused {
                what,
                path: path.to_owned(),
                source,
            }
        };
        if let Some(parent) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            std::fs::create_dir_all(parent).map_err(refused("make the directory of"))?;
        }
        let address = SocketAddrUnix::new(path).map_err(|e| refused("name")(e.into()))?;
        make_way(path, &address)?;
        let socket = new_socket().map_err(|e| refused("create")(e.into()))?;
        // The file gets the socket's mode less the umask, so that nobody else can ever open it;
        // what the umask took is given back before anyone can connect.
        fchmod(&socket, MODE).map_err(|e| refused("set the mode of")(e.into()))?;
        bind(&socket, &address).map_err(|error| match error {
            Errno::ADDRINUSE => ListenError::InUse {
                path: path.to_owned(),
            },
            other => refused("create")(other.into()),
        })?;
        let file = lstat(path).ok().map(|stat| (stat.st_dev, stat.st_ino));
        chmod(path, MODE).map_err(|e| refused("set the mode of")(e.into()))?;
        listen(&socket, BACKLOG).map_err(|e| refused("listen at")(e.into()))?;
        let socket = UnixListener::from_std(socket.into()).map_err(refused("watch"))?;
        Ok(Self {
            socket,
            path: path.to_owned(),
            file,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next client.
    ///
    /// # Errors
    /// As accept(2).
    pub async fn accept(&self) -> io::Result<UnixStream> {
        self.socket.accept().await.map(|(stream, _address)| stream)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let now = lstat(&self.path)
            .ok()
            .map(|stat| (stat.st_dev, stat.st_ino));
        if now.is_some() && now == self.file {
            if let Err(error) = unlink(&self.path) {
                log::warn!("cannot remove the socket {}: {error}", self.path.display());
            }
        }
    }
}

fn new_socket() -> Result<std::os::fd::OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Removes the socket file of a server that has died; nothing else.
fn make_way(path: &Path, address: &SocketAddrUnix) -> Result<(), ListenError> {
    let refused = |what, error: Errno| ListenError::Refused {
        what,
        path: path.to_owned(),
        source: error.into(),
    };
    let path = || path.to_owned();
    let stat = match lstat(path()) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(refused("look at", error)),
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(ListenError::NotASocket { path: path() });
    }
    let probe = new_socket().map_err(|error| refused("create", error))?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {}
        // AGAIN: its backlog is full. PROTOTYPE: it is of another type, and alive.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => {
            return Err(ListenError::InUse { path: path() });
        }
        Err(error) => return Err(refused("probe", error)),
    }
    match unlink(path()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(refused("replace", error)),
    }
}
