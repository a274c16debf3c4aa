//! The memory that a conversation with a VMM is kept in: private, or such that a successor of
//! this process finds it.
//!
//! Rule: of a range of the memory there is one [`Buffer`] in one process at a time. A process that
//! goes on with another's memory got it from the keeper, which gives it out only when the
//! connection of the process that had it has ended; the keeper itself never maps it.
#![allow(
    unsafe_code,
    reason = "a mapping that a successor finds is no slice that Rust has made"
)]

use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use farbus_shadow_mem::shadow::shared_memory;
use vm_memory::{FileOffset, MmapRegion};

/// See the module's own description.
#[derive(Clone, Debug)]
pub(crate) struct SharedMemory(Arc<MmapRegion>);

impl SharedMemory {
    /// Fresh memory of this many bytes, a multiple of the page size.
    pub(crate) fn create(name: &str, len: usize) -> io::Result<Self> {
        shared_memory(name, len).map(Self)
    }

    /// A predecessor's, which must be as long.
    pub(crate) fn open(fd: OwnedFd, len: usize) -> io::Result<Self> {
        let file = File::from(fd);
        if file.metadata()?.len() != len as u64 {
            return Err(io::Error::other("the memory has another size"));
        }
        let region = MmapRegion::from_file(FileOffset::new(file, 0), len);
        Ok(Self(Arc::new(region.map_err(io::Error::other)?)))
    }

    /// Its descriptor.
    pub(crate) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.0.file_offset().map(|file| file.file().as_fd())
    }

    /// The memory itself, for access word by word.
    pub(crate) fn region(&self) -> &MmapRegion {
        &self.0
    }
}

/// Bytes of the one or the other kind.
#[derive(Debug)]
pub(crate) enum Buffer {
    Private(Vec<u8>),
    Shared {
        memory: SharedMemory,
        at: usize,
        len: usize,
    },
}

impl Buffer {
    /// Bytes of nobody else's.
    pub(crate) fn private(len: usize) -> Self {
        Self::Private(vec![0; len])
    }

    /// A range of memory that a successor finds. There must be no other buffer of it.
    pub(crate) fn shared(memory: &SharedMemory, range: Range<usize>) -> Self {
        let end = range.end.min(memory.0.size());
        let at = range.start.min(end);
        Self::Shared {
            memory: memory.clone(),
            at,
            len: end - at,
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Private(bytes) => bytes,
            // SAFETY: the range lies within the mapping, which `memory` keeps, and any bytes are
            // valid. Nobody else writes there, by the module's rule.
            Self::Shared { memory, at, len } => unsafe {
                std::slice::from_raw_parts(memory.0.as_ptr().add(*at), *len)
            },
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Private(bytes) => bytes,
            // SAFETY: as above; and nobody else reads there, by the module's rule.
            Self::Shared { memory, at, len } => unsafe {
                std::slice::from_raw_parts_mut(memory.0.as_ptr().add(*at), *len)
            },
        }
    }
}
