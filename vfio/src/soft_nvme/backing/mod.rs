//! What holds the namespace's data: a file, memory, or nothing at all.

#![forbid(unsafe_code)]

mod file;
mod memory;

pub(super) use file::FileBacking;
pub(super) use memory::MemoryBacking;

use super::dma::Scatter;
use super::sys::Vectors;
use crate::nvme::Status;

/// What holds the data. Offsets and lengths are in bytes, and lie within the controller's size, which follows that of a file.
#[derive(Debug)]
pub(super) enum Backing {
    /// A file or block device.
    File(FileBacking),
    /// Memory of this process.
    Memory(MemoryBacking),
    /// Nothing: writes vanish, and reads leave memory as it is. What the controller itself
    /// looks at (for Compare) are zeroes.
    Null {
        /// Size in bytes.
        len: u64,
    },
}

impl Backing {
    /// Size in bytes when it was opened.
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::File(file) => file.len(),
            Self::Memory(memory) => memory.len(),
            Self::Null { len } => *len,
        }
    }

    /// The size that a file has by now, in bytes; it may have been made longer, or cut short.
    pub(super) fn len_by_now(&self) -> Option<u64> {
        match self {
            Self::File(file) => file.len_by_now(),
            Self::Memory(_) | Self::Null { .. } => None,
        }
    }

    /// Nothing here ever keeps a command waiting.
    pub(super) fn is_immediate(&self) -> bool {
        !matches!(self, Self::File(_))
    }

    /// Deallocated blocks read as zero.
    pub(super) fn reads_zero(&self) -> bool {
        match self {
            Self::File(file) => !file.is_block_device(),
            Self::Memory(_) => true,
            Self::Null { .. } => false,
        }
    }

    /// Whether acknowledged writes may have been lost, so that no more are taken.
    pub(super) fn has_lost_writes(&self) -> bool {
        matches!(self, Self::File(file) if file.has_lost_writes())
    }

    /// Reads straight into a command's memory.
    pub(super) fn read(
        &self,
        offset: u64,
        to: &Scatter,
        vectors: &mut Vectors,
    ) -> Result<(), Status> {
        match self {
            Self::File(file) => file.read(offset, to, vectors),
            Self::Memory(memory) => memory.read(offset, to),
            Self::Null { .. } => Ok(()),
        }
    }

    /// Reads into the controller's own memory.
    pub(super) fn read_into(&self, offset: u64, data: &mut [u8]) -> Result<(), Status> {
        match self {
            Self::File(file) => file.read_into(offset, data),
            Self::Memory(memory) => memory.read_into(offset, data),
            Self::Null { .. } => {
                data.fill(0);
                Ok(())
            }
        }
    }

    /// Writes straight out of a command's memory.
    pub(super) fn write(
        &self,
        offset: u64,
        from: &Scatter,
        durable: bool,
        vectors: &mut Vectors,
    ) -> Result<(), Status> {
        match self {
            Self::File(file) => file.write(offset, from, durable, vectors),
            Self::Memory(memory) => memory.write(offset, from),
            Self::Null { .. } => Ok(()),
        }
    }

    /// Makes all writes that have completed last as long as the backing does.
    pub(super) fn flush(&self) -> Result<(), Status> {
        match self {
            Self::File(file) => file.flush(),
            Self::Memory(_) | Self::Null { .. } => Ok(()),
        }
    }

    /// Makes a range read as zero. `deallocate` gives its space back, where that is possible.
    pub(super) fn zero(&self, offset: u64, len: u64, deallocate: bool) -> Result<(), Status> {
        match self {
            Self::File(file) => file.zero(offset, len, deallocate),
            Self::Memory(memory) => memory.zero(offset, len),
            Self::Null { .. } => Ok(()),
        }
    }

    /// Gives the space of a range back, where that is possible.
    pub(super) fn deallocate(&self, offset: u64, len: u64) -> Result<(), Status> {
        match self {
            Self::File(file) => file.deallocate(offset, len),
            Self::Memory(memory) => memory.zero(offset, len),
            Self::Null { .. } => Ok(()),
        }
    }
}
