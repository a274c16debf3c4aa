//! Moves bytes between the backing file and DMA windows, gives memory back, and makes eventfds
//! non-blocking: the controller's only unsafe code.
//!
//! Rules of this module:
//!
//! 1. Window memory is shared with others who change it at any time, so no Rust reference to
//!    it exists. It is described to the kernel by address and length, taken from
//!    `VolatileSlice`s, and only the kernel touches it here.
//! 2. Addresses do not outlive the call that they were collected for: they are gathered from
//!    slices whose lifetime spans the call, and forgotten before it returns.
//! 3. Memory that is gone (a mapping whose file was truncated) makes the kernel return
//!    `EFAULT`; nothing here faults.
//! 4. File descriptors are borrowed from owners that outlive the call.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

/// Linux `UIO_MAXIOV`: more vectors than these in one call are refused.
const MAX_VECTORS: usize = 1024;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the file into memory.
    Read,
    /// From memory into the file; the page cache may keep them.
    Write,
    /// From memory into the file and on to stable storage, as `fdatasync` would have it.
    WriteDurable,
}

/// Why not all bytes were moved.
#[derive(Debug)]
pub(super) enum TransferError {
    /// The file ended.
    EndOfFile,
    /// The kernel said no.
    Os(io::Error),
}

/// A reusable list of memory ranges, so that no transfer allocates.
pub(super) struct Vectors(Vec<libc::iovec>);

// SAFETY: Between calls the list is empty (rule 2), so that no address goes from one thread to
// another; within a call it is borrowed by one thread. A list that goes with its queue, from
// one doorbell's thread to the next, needs this.
unsafe impl Send for Vectors {}

impl Vectors {
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self(Vec::with_capacity(capacity))
    }

    /// Moves all bytes of `slices`, in order, to or from `file` at `offset` (bytes).
    pub(super) fn transfer<'a>(
        &mut self,
        file: &File,
        offset: u64,
        direction: Direction,
        slices: impl Iterator<Item = VolatileSlice<'a>>,
    ) -> Result<(), TransferError> {
        self.0.clear();
        // The guard matters only for memory that is mapped on demand (Xen), which this is
        // not: the address stays valid for as long as the slice's lifetime `'a`.
        self.0
            .extend(slices.filter(|s| !s.is_empty()).map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            }));
        let outcome = transfer_all(file, offset, direction, &mut self.0);
        self.0.clear();
        outcome
    }
}

fn transfer_all(
    file: &File,
    mut offset: u64,
    direction: Direction,
    mut vectors: &mut [libc::iovec],
) -> Result<(), TransferError> {
    while !vectors.is_empty() {
        let moved = match transfer_some(file, offset, direction, vectors) {
            Ok(0) => return Err(TransferError::EndOfFile),
            Ok(moved) => moved,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(TransferError::Os(error)),
        };
        offset = offset.saturating_add(moved as u64);
        vectors = advance(vectors, moved);
    }
    Ok(())
}

/// Drops the first `moved` bytes of the list.
fn advance(vectors: &mut [libc::iovec], mut moved: usize) -> &mut [libc::iovec] {
    let done = vectors
        .iter()
        .take_while(|vector| {
            let whole = vector.iov_len <= moved;
            if whole {
                moved -= vector.iov_len;
            }
            whole
        })
        .count();
    let rest = vectors.get_mut(done..).unwrap_or_default();
    if let Some(first) = rest.first_mut() {
        first.iov_base = first.iov_base.cast::<u8>().wrapping_add(moved).cast();
        first.iov_len -= moved;
    }
    rest
}

/// One system call; returns how many bytes it moved.
fn transfer_some(
    file: &File,
    offset: u64,
    direction: Direction,
    vectors: &[libc::iovec],
) -> io::Result<usize> {
    let offset =
        libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    let count = vectors.len().min(MAX_VECTORS) as libc::c_int;
    let fd = file.as_raw_fd();
    let moved = match direction {
        // SAFETY: `vectors` holds at least `count` entries, each describing memory that is
        // mapped for the length of this call (rule 2). The kernel writes there, which is
        // allowed at any time for memory that is only accessed volatilely (rule 1). A system
        // call is needed because std's vectored I/O takes references.
        Direction::Read => unsafe { libc::preadv(fd, vectors.as_ptr(), count, offset) },
        // SAFETY: As above; the kernel only reads the memory.
        Direction::Write => unsafe { libc::pwritev(fd, vectors.as_ptr(), count, offset) },
        // SAFETY: As above. `RWF_DSYNC` is known since Linux 4.7.
        Direction::WriteDurable => unsafe {
            libc::pwritev2(fd, vectors.as_ptr(), count, offset, libc::RWF_DSYNC)
        },
    };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

/// Memory of this process alone, all zeroes at first.
#[derive(Debug)]
pub(super) struct PrivateMemory(MmapRegion);

impl PrivateMemory {
    /// Pages are taken when they are first written.
    pub(super) fn new(len: usize) -> io::Result<Self> {
        // Anonymous and private.
        MmapRegion::new(len).map(Self).map_err(io::Error::other)
    }

    /// `len` bytes from `at` on, if they are inside.
    pub(super) fn slice(&self, at: usize, len: usize) -> Option<VolatileSlice<'_>> {
        self.0.get_slice(at, len).ok()
    }

    /// Gives the pages of a range back, which must be whole ones: they read as zeroes.
    pub(super) fn discard(&self, at: usize, len: usize) -> io::Result<()> {
        let slice = self
            .slice(at, len)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        if len == 0 {
            return Ok(());
        }
        let pointer = slice.ptr_guard_mut().as_ptr();
        // SAFETY: The range lies in a private anonymous mapping of ours, of which no Rust
        // reference exists (rule 1), so that its bytes may change at any time; that a page is
        // missing is nothing that an access could notice but for the zeroes. Neither std nor
        // vm-memory can give pages back.
        match unsafe { libc::madvise(pointer.cast(), len, libc::MADV_DONTNEED) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Makes writes to an eventfd fail instead of waiting for somebody to read it.
pub(super) fn set_nonblocking(event: &EventFd) -> io::Result<()> {
    // SAFETY: `event` owns the descriptor and is borrowed for longer than `fd` is used
    // (rule 4). It has no safe way of its own to lend it out.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    Ok(fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advancing_splits_the_vector_in_which_a_short_transfer_ended() {
        let base = |n: usize| n as *mut libc::c_void;
        let mut vectors = [
            libc::iovec {
                iov_base: base(0x1000),
                iov_len: 16,
            },
            libc::iovec {
                iov_base: base(0x2000),
                iov_len: 16,
            },
            libc::iovec {
                iov_base: base(0x3000),
                iov_len: 16,
            },
        ];
        let rest = advance(&mut vectors, 20);
        assert_eq!(rest.len(), 2);
        assert_eq!((rest[0].iov_base, rest[0].iov_len), (base(0x2004), 12));
        assert_eq!((rest[1].iov_base, rest[1].iov_len), (base(0x3000), 16));
        assert!(advance(rest, 28).is_empty());
    }
}
