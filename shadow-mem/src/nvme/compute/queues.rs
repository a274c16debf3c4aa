//! The guest's queues, as the controller that it sees has them.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use farbus_fabric::wire::Tag;
use farbus_vfio::Iova;
use farbus_vfio::nvme::{CQE_SIZE, CompletionEntry, SQE_SIZE, SubmissionEntry};
use vm_memory::Bytes;

use super::super::description::MAX_QUEUE_PAIRS;
use super::super::ring::{CompletionRing, SubmissionRing};
use super::super::slots::Slots;
use crate::guest::{GuestMemory, NotMapped};

/// A submission queue in guest memory.
pub(super) struct SubmissionQueue {
    pub(super) base: u64,
    pub(super) ring: SubmissionRing,
    pub(super) completion_queue: u16,
    /// Commands of this queue that are queued or at the device. Fewer than the ring has
    /// entries, since the device's own ring is as long.
    pub(super) outstanding: u32,
    /// The guest has asked for its deletion; nothing more is fetched.
    pub(super) deleting: bool,
    /// Commands that were ever fetched from it.
    pub(super) fetched: u64,
}

impl SubmissionQueue {
    pub(super) fn new(base: u64, size: u32, completion_queue: u16) -> Self {
        Self {
            base,
            ring: SubmissionRing::new(size),
            completion_queue,
            outstanding: 0,
            deleting: false,
            fetched: 0,
        }
    }

    /// Copies the entry at the head, if there is one; the head stays.
    pub(super) fn peek(&self, memory: &GuestMemory) -> Result<Option<SubmissionEntry>, NotMapped> {
        let Some(index) = self.ring.peek() else {
            return Ok(None);
        };
        let mut entry = [0; SQE_SIZE];
        memory.read(entry_iova(self.base, index, SQE_SIZE)?, &mut entry)?;
        Ok(Some(SubmissionEntry(entry)))
    }
}

/// A completion queue in guest memory.
pub(super) struct CompletionQueue {
    pub(super) base: u64,
    pub(super) ring: CompletionRing,
    /// The vector to signal, if the guest wants interrupts.
    pub(super) vector: Option<u16>,
    /// Completions that wait for room, in order.
    pub(super) held: VecDeque<Tag>,
    /// Completions that were ever posted to it.
    pub(super) posted: u64,
}

impl CompletionQueue {
    pub(super) fn new(base: u64, size: u32, vector: Option<u16>) -> Self {
        Self {
            base,
            ring: CompletionRing::new(size),
            vector,
            held: VecDeque::with_capacity(size as usize),
            posted: 0,
        }
    }

    /// Stores an entry, whose phase this fills in. The caller has seen room. The half with
    /// the phase tag is stored last, with release ordering, as a polling driver expects.
    pub(super) fn post(
        &mut self,
        memory: &GuestMemory,
        mut entry: CompletionEntry,
    ) -> Result<(), NotMapped> {
        let (index, phase) = self.ring.next();
        entry.phase = phase;
        let iova = entry_iova(self.base, index, CQE_SIZE)?;
        let refused = NotMapped {
            iova,
            len: CQE_SIZE as u64,
        };
        let slot = memory.slice(iova, CQE_SIZE, true)?;
        let [low, high] = entry.to_qwords();
        #[cfg(test)]
        super::super::record::kill::step();
        slot.store(low.to_le(), 0, Ordering::Relaxed)
            .map_err(|_| refused)?;
        #[cfg(test)]
        super::super::record::kill::step();
        slot.store(high.to_le(), 8, Ordering::Release)
            .map_err(|_| refused)?;
        self.ring.advance();
        self.posted += 1;
        Ok(())
    }

    /// Whether the entry that is to be posted next is in guest memory already: this process's
    /// predecessor was killed before it could take note of that.
    pub(super) fn was_posted(&self, memory: &GuestMemory) -> Result<bool, NotMapped> {
        let (index, phase) = self.ring.next();
        let mut entry = [0; CQE_SIZE];
        memory.read(entry_iova(self.base, index, CQE_SIZE)?, &mut entry)?;
        // The phase tag is bit 16 of dword 3 (NVMe 1.4 §4.6).
        Ok((entry[14] & 1 != 0) == phase)
    }
}

/// The address of entry `index` of a ring whose base the guest chose.
fn entry_iova(base: u64, index: u32, size: usize) -> Result<Iova, NotMapped> {
    base.checked_add(u64::from(index) * size as u64)
        .map(Iova)
        .ok_or(NotMapped {
            iova: Iova(base),
            len: size as u64,
        })
}

/// All queues of a controller; those of id 0 are the admin queues.
pub(super) struct Queues {
    pub(super) submission: Slots<SubmissionQueue>,
    pub(super) completion: Slots<CompletionQueue>,
}

impl Queues {
    pub(super) fn new() -> Self {
        Self {
            submission: Slots::new(MAX_QUEUE_PAIRS + 1),
            completion: Slots::new(MAX_QUEUE_PAIRS + 1),
        }
    }

    /// Forgets all queues.
    pub(super) fn clear(&mut self) {
        self.submission.clear();
        self.completion.clear();
    }

    pub(super) fn sq(&mut self, id: u16) -> Option<&mut SubmissionQueue> {
        self.submission.get_mut(id)
    }

    pub(super) fn cq(&mut self, id: u16) -> Option<&mut CompletionQueue> {
        self.completion.get_mut(id)
    }
}
