//! The device half's own memory: the real queues, PRP lists and a page for its own commands.
//! The fabric never touches it; the device does.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use farbus_vfio::nvme::{CQE_SIZE, CompletionEntry, PAGE_SIZE, SQE_SIZE};
use farbus_vfio::{DmaAccess, DmaWindow, Iova};
use vm_memory::mmap::MmapRegion;
use vm_memory::volatile_memory::VolatileSlice;
use vm_memory::{Bytes, VolatileMemory};

use super::super::description::{ADMIN_QUEUE_ENTRIES, MAX_QUEUE_ENTRIES};
use crate::shadow::shared_memory;

const ADMIN_SQ_LEN: usize = ADMIN_QUEUE_ENTRIES as usize * SQE_SIZE;
const SQ_LEN: usize = MAX_QUEUE_ENTRIES as usize * SQE_SIZE;
const CQ_LEN: usize = MAX_QUEUE_ENTRIES as usize * CQE_SIZE;
/// Own data page, admin submission queue, admin completion queue (one page).
const FIXED_LEN: usize = PAGE_SIZE + ADMIN_SQ_LEN + PAGE_SIZE;

/// Where everything is. Only what is used takes memory.
pub(super) struct Arena {
    memory: Arc<MmapRegion>,
    base: Iova,
    queue_pairs: u16,
}

impl Arena {
    /// Bytes that an arena takes in the device's address space.
    pub(super) fn len_for(queue_pairs: u16, tags: u16) -> usize {
        FIXED_LEN + usize::from(queue_pairs) * (SQ_LEN + CQ_LEN) + usize::from(tags) * PAGE_SIZE
    }

    pub(super) fn new(base: Iova, queue_pairs: u16, tags: u16) -> io::Result<Self> {
        Ok(Self {
            memory: shared_memory("farbus-arena", Self::len_for(queue_pairs, tags))?,
            base,
            queue_pairs,
        })
    }

    pub(super) fn window(&self) -> DmaWindow {
        DmaWindow {
            iova: self.base,
            memory: self.memory.clone(),
            offset: 0,
            len: self.memory.size(),
            access: DmaAccess::ReadWrite,
        }
    }

    fn iova(&self, offset: usize) -> Iova {
        Iova(self.base.0 + offset as u64)
    }

    fn sq_offset(&self, queue: u16) -> usize {
        match queue {
            0 => PAGE_SIZE,
            queue => FIXED_LEN + (usize::from(queue) - 1) * SQ_LEN,
        }
    }

    fn cq_offset(&self, queue: u16) -> usize {
        match queue {
            0 => PAGE_SIZE + ADMIN_SQ_LEN,
            queue => {
                FIXED_LEN
                    + usize::from(self.queue_pairs) * SQ_LEN
                    + (usize::from(queue) - 1) * CQ_LEN
            }
        }
    }

    pub(super) fn sq(&self, queue: u16) -> Iova {
        self.iova(self.sq_offset(queue))
    }

    pub(super) fn cq(&self, queue: u16) -> Iova {
        self.iova(self.cq_offset(queue))
    }

    /// The page that the device half's own commands carry data in.
    pub(super) fn own_page(&self) -> Iova {
        self.iova(0)
    }

    /// A copy of that page.
    pub(super) fn read_own_page(&self) -> Vec<u8> {
        let mut page = vec![0; PAGE_SIZE];
        if let Ok(slice) = self.memory.get_slice(0, PAGE_SIZE) {
            slice.copy_to(&mut page[..]);
        }
        page
    }

    /// Fills the beginning of that page.
    pub(super) fn write_own_page(&self, bytes: &[u8; 16]) {
        self.put(0, bytes);
    }

    fn list_offset(&self, tag: u16) -> usize {
        FIXED_LEN + usize::from(self.queue_pairs) * (SQ_LEN + CQ_LEN) + usize::from(tag) * PAGE_SIZE
    }

    /// The PRP list page of a tag.
    pub(super) fn list(&self, tag: u16) -> Iova {
        self.iova(self.list_offset(tag))
    }

    pub(super) fn store_list_entry(&self, tag: u16, index: usize, address: u64) {
        self.put(self.list_offset(tag) + index * 8, &address.to_le_bytes());
    }

    pub(super) fn store_sqe(&self, queue: u16, index: u32, sqe: &[u8; SQE_SIZE]) {
        self.put(self.sq_offset(queue) + index as usize * SQE_SIZE, sqe);
    }

    fn put(&self, offset: usize, bytes: &[u8]) {
        // The offsets are computed from checked queue ids, indices and tags.
        if let Ok(slice) = self.memory.get_slice(offset, bytes.len()) {
            slice.copy_from(bytes);
        }
    }

    /// The completion entry at `index`, if its phase says that it is new.
    pub(super) fn load_cqe(&self, queue: u16, index: u32, phase: bool) -> Option<CompletionEntry> {
        let offset = self.cq_offset(queue) + index as usize * CQE_SIZE;
        let slot = self.slice(offset, CQE_SIZE)?;
        let high = u64::from_le(slot.load(8, Ordering::Acquire).ok()?);
        if (high >> 48 & 1 == 1) != phase {
            return None;
        }
        let low = u64::from_le(slot.load(0, Ordering::Relaxed).ok()?);
        Some(CompletionEntry::from_qwords([low, high]))
    }

    fn slice(&self, offset: usize, len: usize) -> Option<VolatileSlice<'_>> {
        self.memory.get_slice(offset, len).ok()
    }

    /// Zeroes a completion queue, so that no old entry looks new.
    pub(super) fn clear_cq(&self, queue: u16) {
        let len = if queue == 0 { PAGE_SIZE } else { CQ_LEN };
        self.put(self.cq_offset(queue), &[0; CQ_LEN][..len]);
    }
}
