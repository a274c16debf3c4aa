//! The descriptors by which a VMM and this process wake each other: eventfds, or pipes (which
//! user-mode Linux uses).

#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};
use rustix::io::Errno;

/// One of them, non-blocking.
#[derive(Debug)]
pub struct Notifier(OwnedFd);

impl Notifier {
    /// Takes a VMM's descriptor. What writes could block on, or would change, is refused: only
    /// eventfds, pipes and sockets are taken.
    pub fn new(file: File) -> Result<Self, Errno> {
        let fd = OwnedFd::from(file);
        let mode = fstat(&fd)?.st_mode;
        // An eventfd is an anonymous inode, which has no type at all.
        let anonymous = mode & 0o170_000 == 0;
        let kind = FileType::from_raw_mode(mode);
        if !anonymous && !matches!(kind, FileType::Fifo | FileType::Socket) {
            return Err(Errno::INVAL);
        }
        let flags = fcntl_getfl(&fd)?;
        if !flags.contains(OFlags::NONBLOCK) {
            fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        }
        Ok(Self(fd))
    }

    /// Wakes the other side. One that does not look needs no second signal.
    pub fn signal(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Takes what the other side has signalled.
    pub fn drain(&self) {
        let mut bytes = [0; 64];
        let _ = rustix::io::read(&self.0, &mut bytes);
    }
}

impl AsRawFd for Notifier {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
