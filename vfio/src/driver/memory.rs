//! Memory that the driver shares with its function: one memfd, mapped once, given out in
//! pages.

#![forbid(unsafe_code)]

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use super::{DriverError, pages};
use crate::function::{DmaAccess, DmaWindow, Iova};
use crate::nvme::PAGE_SIZE;

/// A part of a [`DmaMemory`], in whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaBuffer {
    iova: Iova,
    size: usize,
}

impl DmaBuffer {
    /// Where the function sees it; a multiple of 4096.
    pub fn iova(&self) -> Iova {
        self.iova
    }

    /// Its size in bytes, a multiple of 4096: at least what was asked for.
    pub fn size(&self) -> usize {
        self.size
    }

    fn no_room(self, at: usize, len: usize) -> DriverError {
        DriverError::OutOfBounds {
            at,
            len,
            size: self.size,
        }
    }
}

/// Memory that a function reads and writes.
pub struct DmaMemory {
    iova: Iova,
    region: Arc<MmapRegion>,
    /// For each page, whether it is given out.
    used: Vec<bool>,
}

impl DmaMemory {
    /// Makes `len` bytes of memory, to be mapped at `iova`; both multiples of 4096.
    pub fn new(iova: Iova, len: usize) -> Result<Self, DriverError> {
        let fail = |what| move |source: std::io::Error| DriverError::Io { what, source };
        let what = "making DMA memory";
        let fd = memfd_create("nvme-driver", MemfdFlags::CLOEXEC)
            .map_err(|error| fail(what)(error.into()))?;
        let file = File::from(fd);
        file.set_len(len as u64).map_err(fail(what))?;
        let region = MmapRegion::from_file(FileOffset::new(file, 0), len)
            .map_err(|error| fail(what)(std::io::Error::other(error)))?;
        Ok(Self {
            iova,
            region: Arc::new(region),
            used: vec![false; len / PAGE_SIZE],
        })
    }

    /// All of it, as a function gets it.
    pub fn window(&self) -> DmaWindow {
        DmaWindow {
            iova: self.iova,
            memory: Arc::clone(&self.region),
            offset: 0,
            len: self.region.size(),
            access: DmaAccess::ReadWrite,
        }
    }

    /// Gives out zeroed pages for `len` bytes.
    pub fn allocate(&mut self, len: usize) -> Result<DmaBuffer, DriverError> {
        let count = pages(len).max(1);
        let first = (0..self.used.len())
            .find(|&at| {
                self.used
                    .get(at..at + count)
                    .is_some_and(|run| !run.contains(&true))
            })
            .ok_or(DriverError::OutOfMemory(len))?;
        let size = count * PAGE_SIZE;
        let at = first * PAGE_SIZE;
        let buffer = DmaBuffer {
            iova: Iova(self.iova.0 + at as u64),
            size,
        };
        self.mark(buffer, true);
        self.write(buffer, 0, &vec![0; size])?;
        Ok(buffer)
    }

    /// Takes a buffer back.
    pub fn free(&mut self, buffer: DmaBuffer) {
        self.mark(buffer, false);
    }

    fn mark(&mut self, buffer: DmaBuffer, used: bool) {
        let first = buffer.iova.0.wrapping_sub(self.iova.0) as usize / PAGE_SIZE;
        for page in self.used.iter_mut().skip(first).take(pages(buffer.size)) {
            *page = used;
        }
    }

    /// Copies out of a buffer, from `at` on (bytes).
    pub fn read(&self, buffer: DmaBuffer, at: usize, data: &mut [u8]) -> Result<(), DriverError> {
        self.slice(buffer, at, data.len())?.copy_to(data);
        Ok(())
    }

    /// Copies into a buffer, from `at` on (bytes).
    pub fn write(&self, buffer: DmaBuffer, at: usize, data: &[u8]) -> Result<(), DriverError> {
        self.slice(buffer, at, data.len())?.copy_from(data);
        Ok(())
    }

    /// Loads a little-endian quadword at a multiple of 8; what was stored before it is seen
    /// by loads after this one.
    pub(super) fn load(&self, buffer: DmaBuffer, at: usize) -> Result<u64, DriverError> {
        let slice = self.slice(buffer, at, 8)?;
        let quadword: u64 = slice
            .load(0, Ordering::Acquire)
            .map_err(|_| buffer.no_room(at, 8))?;
        Ok(u64::from_le(quadword))
    }

    /// Loads a little-endian doubleword at a multiple of 4.
    pub(super) fn load32(&self, buffer: DmaBuffer, at: usize) -> Result<u32, DriverError> {
        let slice = self.slice(buffer, at, 4)?;
        let value = slice.load(0, Ordering::Acquire);
        value.map(u32::from_le).map_err(|_| buffer.no_room(at, 4))
    }

    /// Stores a little-endian doubleword at a multiple of 4, after everything before it.
    pub(super) fn store32(
        &self,
        buffer: DmaBuffer,
        at: usize,
        value: u32,
    ) -> Result<(), DriverError> {
        let slice = self.slice(buffer, at, 4)?;
        let stored = slice.store(value.to_le(), 0, Ordering::Release);
        stored.map_err(|_| buffer.no_room(at, 4))
    }

    fn slice(
        &self,
        buffer: DmaBuffer,
        at: usize,
        len: usize,
    ) -> Result<VolatileSlice<'_>, DriverError> {
        let error = buffer.no_room(at, len);
        if at.checked_add(len).is_none_or(|end| end > buffer.size) {
            return Err(error);
        }
        let start = buffer.iova.0.wrapping_sub(self.iova.0) as usize;
        let start = start.checked_add(at);
        start
            .and_then(|start| self.region.get_slice(start, len).ok())
            .ok_or(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> DmaMemory {
        DmaMemory::new(Iova(0x10_0000), 4 * PAGE_SIZE).unwrap()
    }

    #[test]
    fn pages_are_given_out_once_and_zeroed_when_given_again() {
        let mut memory = memory();
        let first = memory.allocate(1).unwrap();
        let second = memory.allocate(PAGE_SIZE + 1).unwrap();
        assert_eq!((first.iova().0, first.size()), (0x10_0000, PAGE_SIZE));
        assert_eq!((second.iova().0, second.size()), (0x10_1000, 2 * PAGE_SIZE));
        assert!(matches!(
            memory.allocate(2 * PAGE_SIZE),
            Err(DriverError::OutOfMemory(_))
        ));
        memory.write(first, 0, &[7; PAGE_SIZE]).unwrap();
        memory.free(first);
        let again = memory.allocate(PAGE_SIZE).unwrap();
        assert_eq!(again, first);
        let mut bytes = [1; PAGE_SIZE];
        memory.read(again, 0, &mut bytes).unwrap();
        assert_eq!(bytes, [0; PAGE_SIZE]);
    }

    #[test]
    fn accesses_outside_of_a_buffer_are_refused() {
        let mut memory = memory();
        let buffer = memory.allocate(PAGE_SIZE).unwrap();
        assert!(memory.write(buffer, PAGE_SIZE - 1, &[0]).is_ok());
        assert!(memory.write(buffer, PAGE_SIZE - 1, &[0; 2]).is_err());
        assert!(memory.read(buffer, usize::MAX, &mut [0; 2]).is_err());
        // A buffer of other memory.
        let mut elsewhere = DmaMemory::new(Iova(0x80_0000), PAGE_SIZE).unwrap();
        let foreign = elsewhere.allocate(PAGE_SIZE).unwrap();
        assert!(memory.read(foreign, 0, &mut [0; 1]).is_err());
        memory.free(foreign);
    }
}
