//! Where VMMs come from: a socket file of this process's own, or a descriptor that it was started
//! with (the `--fd` of the vhost-user conventions), which listens or is connected already.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::net::sockopt::{socket_acceptconn, socket_domain};

use crate::vfio_user::EndpointError;
use crate::vfio_user::listener::Listener;

/// See the module's own description.
pub struct Socket(Origin);

enum Origin {
    /// A file that is removed at the end.
    File(Listener),
    /// A socket that somebody else listens at.
    Listening(UnixListener),
    /// A client that is there already, and the only one.
    Connected(Option<UnixStream>),
}

impl Socket {
    /// Listens at `path`. The file of a server that is no more is replaced.
    pub fn bind(path: &Path) -> Result<Self, EndpointError> {
        Listener::bind(path).map(|listener| Self(Origin::File(listener)))
    }

    /// Takes the descriptor with this number, which must be a UNIX socket.
    pub fn inherit(number: RawFd) -> io::Result<Self> {
        let fd = adopt(number)?;
        if socket_domain(&fd)? != rustix::net::AddressFamily::UNIX {
            return Err(Errno::PROTOTYPE.into());
        }
        fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
        if socket_acceptconn(&fd)? {
            let listener = UnixListener::from(fd);
            listener.set_nonblocking(true)?;
            Ok(Self(Origin::Listening(listener)))
        } else {
            let stream = UnixStream::from(fd);
            Ok(Self(Origin::Connected(Some(stream))))
        }
    }

    /// The next client, if one waits.
    pub fn accept(&mut self) -> io::Result<Option<UnixStream>> {
        match &mut self.0 {
            Origin::File(listener) => Ok(listener.accept()?),
            Origin::Listening(listener) => match listener.accept() {
                Ok((stream, _)) => Ok(Some(stream)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                Err(error) => Err(error),
            },
            Origin::Connected(stream) => Ok(stream.take()),
        }
    }

    /// What the event loop watches for clients; none when there will be no other one.
    pub fn descriptor(&self) -> Option<RawFd> {
        match &self.0 {
            Origin::File(listener) => Some(listener.as_raw_fd()),
            Origin::Listening(listener) => Some(listener.as_raw_fd()),
            Origin::Connected(_) => None,
        }
    }
}

/// Takes over a descriptor that this process was started with.
#[allow(
    unsafe_code,
    reason = "a descriptor of the command line is known by its number only"
)]
fn adopt(number: RawFd) -> io::Result<OwnedFd> {
    // The standard streams are in use.
    if number <= libc::STDERR_FILENO {
        return Err(Errno::BADF.into());
    }
    // SAFETY: F_GETFD takes no pointer and changes nothing, whatever the number is.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open. It is called at the start, from the command line's number,
    // before this process has opened a descriptor that it could be instead.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
