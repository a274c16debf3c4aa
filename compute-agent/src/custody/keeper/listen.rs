//! The socket that workers connect to.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Gid, Mode, chmod, chown, unlink};
use rustix::io::Errno;
use rustix::net::{SocketAddrUnix, bind, connect, listen};

use super::super::socket::unconnected;
use crate::sandbox::User;

/// Why there is no keeper.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// Another keeper listens at the path.
    #[error(
        "the custody socket {path} is in use by another daemon; stop that, or choose another runtime-dir"
    )]
    InUse {
        /// The path.
        path: String,
    },
    /// The operating system refused.
    #[error("cannot {what} the custody socket {path}; its directory must exist and be writable")]
    Io {
        /// What was tried, as a verb.
        what: &'static str,
        /// The path.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// What has failed at `path`.
pub(super) fn failed<E: Into<io::Error>>(
    what: &'static str,
    path: &Path,
) -> impl FnOnce(E) -> KeeperError {
    let path = path.display().to_string();
    move |error| KeeperError::Io {
        what,
        path,
        source: error.into(),
    }
}

/// Listens at `path`, which must be free or left behind by a daemon that is no more.
pub(super) fn open(path: &Path) -> Result<OwnedFd, KeeperError> {
    let address = SocketAddrUnix::new(path).map_err(failed("name", path))?;
    let probe = unconnected().map_err(failed("create", path))?;
    match connect(&probe, &address) {
        Err(Errno::NOENT) => {}
        Err(Errno::CONNREFUSED) => unlink(path).map_err(failed("replace", path))?,
        Err(Errno::PROTOTYPE) | Ok(()) => {
            let path = path.display().to_string();
            return Err(KeeperError::InUse { path });
        }
        Err(error) => return Err(failed("probe", path)(error)),
    }
    let listener = unconnected().map_err(failed("create", path))?;
    bind(&listener, &address).map_err(failed("bind", path))?;
    chmod(path, Mode::from_raw_mode(0o660)).map_err(failed("set the mode of", path))?;
    listen(&listener, 64).map_err(failed("listen at", path))?;
    Ok(listener)
}

/// Processes of this user reach the socket, too, as members of its group.
pub(super) fn give_to_group(path: &Path, user: User) -> Result<(), KeeperError> {
    let group = Some(Gid::from_raw(user.gid));
    chown(path, None, group).map_err(failed("give to the group of worker-user", path))
}
