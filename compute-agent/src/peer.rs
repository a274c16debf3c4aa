//! Who is at the other end of a UNIX socket.
//!
//! Rule: the only call is getsockopt(2) with a buffer of the size that it is told. It is not that of
//! `rustix`, whose process id cannot be zero: the kernel names a process so that is not visible from here.
#![allow(
    unsafe_code,
    reason = "a peer of another pid namespace has no number that the safe call could return"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// Who has connected, or listened (`SO_PEERCRED`, unix(7)), as it was then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The process; `None` when it is not visible from here, such as in another pid namespace.
    pub pid: Option<u32>,
    /// The user that it ran as.
    pub uid: u32,
}

/// Who is at the other end.
///
/// # Errors
/// When the descriptor is no such socket.
pub fn credentials(socket: BorrowedFd<'_>) -> io::Result<Credentials> {
    let mut credentials = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `credentials`, which has as many and
    // may hold any bit pattern; both pointers are to live variables.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let pid = u32::try_from(credentials.pid).ok();
    Ok(Credentials {
        pid: pid.filter(|pid| *pid > 0),
        uid: credentials.uid,
    })
}

/// The process at the other end, if it is visible from here.
pub fn pid_of(socket: &impl AsFd) -> Option<u32> {
    credentials(socket.as_fd()).ok()?.pid
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn peer_is_named_by_the_kernel() {
        let (one, _other) = UnixStream::pair().unwrap();

        let peer = credentials(one.as_fd()).unwrap();

        let uid = rustix::process::geteuid().as_raw();
        let pid = Some(std::process::id());
        assert_eq!(peer, Credentials { pid, uid });
    }
}
