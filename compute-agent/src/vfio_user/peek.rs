//! How far a UNIX socket was read without taking anything out.
//!
//! Rule: the only calls are getsockopt(2) and setsockopt(2) with a buffer of the size that they
//! are told.
#![allow(
    unsafe_code,
    reason = "the standard library has no call for SO_PEEK_OFF"
)]

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

/// From where on the next read without taking out reads, in bytes (`SO_PEEK_OFF`, socket(7)): it
/// rises by what such a read returns, and falls by what is taken out. The kernel counts, so this
/// is right whatever happened to whoever read.
pub(crate) fn peeked(stream: &UnixStream) -> std::io::Result<usize> {
    let mut offset: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `offset`, which has as many and may hold
    // any bit pattern; both pointers are to live variables.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw mut offset).cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(usize::try_from(offset).unwrap_or(0))
}

/// The next read without taking out begins at the beginning; from now on [`peeked`] counts.
pub(crate) fn peek_from_start(stream: &UnixStream) -> std::io::Result<()> {
    let offset: libc::c_int = 0;
    // SAFETY: the kernel reads the given length from `offset`, which is live and as long.
    let result = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const offset).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}
