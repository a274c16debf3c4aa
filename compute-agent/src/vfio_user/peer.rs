//! Who is at the other end of a UNIX socket.
//!
//! Rule: the only call is getsockopt(2) with a buffer of the size that it is told.
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

/// The process that connected (`SO_PEERCRED`, unix(7)); `None` when it is not visible from
/// here, such as in another pid namespace.
pub(crate) fn pid_of(stream: &UnixStream) -> Option<u32> {
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
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut len,
        )
    };
    u32::try_from(credentials.pid)
        .ok()
        .filter(|pid| result == 0 && *pid > 0)
}
