//! A namespace in memory of this process, gone when the controller is.
//!
//! Bytes are copied once, between this memory and the DMA windows, through volatile slices:
//! several queues may be at the same block at once, and whoever drives the controller may be at
//! the windows.

#![forbid(unsafe_code)]

use std::io;

use vm_memory::VolatileSlice;

use super::super::dma::Scatter;
use super::super::sys::PrivateMemory;
use crate::nvme::{PAGE_SIZE, Status};

static ZEROES: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Zeroes at first, which take no memory until they are written to.
#[derive(Debug)]
pub(in super::super) struct MemoryBacking {
    memory: PrivateMemory,
    len: u64,
}

impl MemoryBacking {
    /// `len` bytes, more than none.
    pub(in super::super) fn new(len: u64) -> io::Result<Self> {
        let size = usize::try_from(len).map_err(io::Error::other)?;
        let memory = PrivateMemory::new(size)?;
        Ok(Self { memory, len })
    }

    /// Size in bytes.
    pub(in super::super) fn len(&self) -> u64 {
        self.len
    }

    fn slice(&self, offset: u64, len: usize) -> Result<VolatileSlice<'_>, Status> {
        // Commands are checked against the namespace's size before they come here.
        self.memory
            .slice(offset as usize, len)
            .ok_or(Status::INTERNAL_ERROR)
    }

    /// Copies into a command's memory.
    pub(in super::super) fn read(&self, offset: u64, to: &Scatter) -> Result<(), Status> {
        let mut offset = offset;
        for slice in to.slices() {
            self.slice(offset, slice.len())?
                .copy_to_volatile_slice(slice);
            offset += slice.len() as u64;
        }
        Ok(())
    }

    /// Copies into the controller's own memory.
    pub(in super::super) fn read_into(&self, offset: u64, data: &mut [u8]) -> Result<(), Status> {
        self.slice(offset, data.len())?.copy_to(data);
        Ok(())
    }

    /// Copies out of a command's memory.
    pub(in super::super) fn write(&self, offset: u64, from: &Scatter) -> Result<(), Status> {
        let mut offset = offset;
        for slice in from.slices() {
            slice.copy_to_volatile_slice(self.slice(offset, slice.len())?);
            offset += slice.len() as u64;
        }
        Ok(())
    }

    /// Makes a range read as zero. Whole pages are given back, which takes no longer for large
    /// ranges that hold nothing.
    pub(in super::super) fn zero(&self, offset: u64, len: u64) -> Result<(), Status> {
        let page = PAGE_SIZE as u64;
        let end = offset + len;
        let (first, last) = (offset.next_multiple_of(page), end - end % page);
        if first >= last {
            return self.fill(offset, end);
        }
        self.memory
            .discard(first as usize, (last - first) as usize)
            .map_err(|error| {
                log::error!("memory was not given back: {error}");
                Status::INTERNAL_ERROR
            })?;
        self.fill(offset, first)?;
        self.fill(last, end)
    }

    fn fill(&self, from: u64, to: u64) -> Result<(), Status> {
        let mut at = from;
        while at < to {
            let len = (to - at).min(PAGE_SIZE as u64) as usize;
            self.slice(at, len)?
                .copy_from(ZEROES.get(..len).unwrap_or(&ZEROES));
            at += len as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zeroed_range_is_zero_and_its_neighbours_are_not() {
        const LEN: u64 = 8 * PAGE_SIZE as u64;
        for (offset, len) in [
            (0, LEN),
            (512, 512),
            (512, 2 * 4096),
            (4096, 4096),
            (4096, 512),
            (8192 - 512, 1024),
            (8 * 512 - 512, 512),
            (512, LEN - 1024),
            (0, 0),
        ] {
            let memory = MemoryBacking::new(LEN).unwrap();
            let seven = vec![7u8; LEN as usize];
            memory.slice(0, seven.len()).unwrap().copy_from(&seven);
            memory.zero(offset, len).unwrap();
            let mut bytes = vec![1; LEN as usize];
            memory.read_into(0, &mut bytes).unwrap();
            for (at, byte) in (0..).zip(&bytes) {
                let zero = (offset..offset + len).contains(&at);
                assert_eq!(*byte, if zero { 0 } else { 7 }, "{at} of {offset}+{len}");
            }
        }
    }

    #[test]
    fn what_lies_outside_is_refused() {
        let memory = MemoryBacking::new(4096).unwrap();
        let refused = Err(Status::INTERNAL_ERROR);
        assert_eq!(memory.read_into(4095, &mut [0; 2]), refused);
        assert_eq!(memory.read_into(1 << 60, &mut [0; 2]), refused);
    }
}
