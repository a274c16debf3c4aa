//! The buffer shadow: device-side memory that the device DMAs to and from in place of the
//! guest's.
//!
//! It has a fixed size per attachment, so what a guest keeps in flight bounds the device
//! server's memory. The *compute half* hands out its pages (it must know where a payload lands
//! before it sends it, as a one-sided write does); the device half checks each range and
//! uses it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use farbus_vfio::nvme::PAGE_SIZE;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vm_memory::{FileOffset, MmapRegion};

/// Shared memory of `len` bytes (whole pages) that others can map by its descriptor, and whose
/// size nobody can change.
pub fn shared_memory(name: &str, len: usize) -> io::Result<Arc<MmapRegion>> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let file = File::from(fd);
    file.set_len(len as u64)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    MmapRegion::from_file(FileOffset::new(file, 0), len)
        .map(Arc::new)
        .map_err(io::Error::other)
}

/// A range of the buffer shadow: whole pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShadowRange {
    /// First byte, a multiple of the page size.
    pub offset: u32,
    /// Pages.
    pub pages: u32,
}

/// Hands out the pages of a buffer shadow, first fit from where the last search ended.
pub struct ShadowAllocator {
    /// Where it begins, in bytes.
    base: u32,
    /// One bit a page, set while in use.
    used: Vec<u64>,
    pages: u32,
    free: u32,
    next: u32,
}

impl ShadowAllocator {
    /// For a shadow of `len` bytes; a last page that is not whole is left unused.
    pub fn new(len: u32) -> Self {
        Self::of(0..len)
    }

    /// For a part of a shadow, in bytes, that begins at a page.
    pub fn of(part: Range<u32>) -> Self {
        let pages = (part.end - part.start) / PAGE_SIZE as u32;
        Self {
            base: part.start,
            used: vec![0; pages.div_ceil(64) as usize],
            pages,
            free: pages,
            next: 0,
        }
    }

    /// A contiguous range for `len` bytes that leaves `reserve` pages free, or none if there is
    /// none now. An empty range costs nothing.
    pub fn allocate(&mut self, len: u32, reserve: u32) -> Option<ShadowRange> {
        let wanted = len.div_ceil(PAGE_SIZE as u32);
        if wanted == 0 {
            return Some(ShadowRange::default());
        }
        if wanted.saturating_add(reserve) > self.free {
            return None;
        }
        let start = self
            .search(self.next, self.pages, wanted)
            .or_else(|| self.search(0, self.pages.min(self.next + wanted), wanted))?;
        for page in start..start + wanted {
            self.set(page, true);
        }
        self.free -= wanted;
        self.next = start + wanted;
        Some(ShadowRange {
            offset: self.base + start * PAGE_SIZE as u32,
            pages: wanted,
        })
    }

    /// Takes a certain range, as it was handed out before; says whether it could be.
    pub fn occupy(&mut self, range: ShadowRange) -> bool {
        let start = range.offset / PAGE_SIZE as u32;
        let Some(end) = start
            .checked_add(range.pages)
            .filter(|end| *end <= self.pages)
        else {
            return false;
        };
        if range.offset as usize % PAGE_SIZE != 0 || (start..end).any(|page| self.is_used(page)) {
            return false;
        }
        (start..end).for_each(|page| self.set(page, true));
        self.free -= range.pages;
        true
    }

    /// Takes a range back.
    pub fn release(&mut self, range: ShadowRange) {
        if range.pages == 0 {
            return;
        }
        let start = (range.offset - self.base) / PAGE_SIZE as u32;
        for page in start..start + range.pages {
            self.set(page, false);
        }
        self.free += range.pages;
    }

    /// How many pages are in use.
    pub fn used_pages(&self) -> u32 {
        self.pages - self.free
    }

    fn search(&self, from: u32, to: u32, wanted: u32) -> Option<u32> {
        let mut start = from;
        let mut page = from;
        while page < to {
            if page % 64 == 0 && self.used[page as usize / 64] == u64::MAX {
                page += 64;
                start = page;
            } else if self.is_used(page) {
                page += 1;
                start = page;
            } else {
                page += 1;
                if page - start == wanted {
                    return Some(start);
                }
            }
        }
        None
    }

    fn is_used(&self, page: u32) -> bool {
        self.used[page as usize / 64] >> (page % 64) & 1 == 1
    }

    fn set(&mut self, page: u32, used: bool) {
        let bit = 1 << (page % 64);
        let word = &mut self.used[page as usize / 64];
        if used {
            *word |= bit;
        } else {
            *word &= !bit;
        }
    }
}
