//! What a controller's next process needs, in memory that outlives this one: which commands are under
//! way, how far every queue is, and what the guest has set up. With it a process that is killed between
//! any two of its instructions has a successor that goes on, and the guest sees each command
//! completed once.
//!
//! Two things make that so. **Small steps are single stores in a known order**: a command's slot is
//! written before its queue's head moves past it, and says at which place its completion is about to be
//! posted before it is; whoever finds it there looks whether it was (`compute/recover.rs`). And
//! **everything that is set up changes as a whole**: it is written beside what was there, and then one
//! store makes it valid. What belongs to an earlier life of the controller carries the number of that
//! life, its *era*, and is void.
//!
//! The memory is only ever written by the one process that has the attachment. What was written
//! before a SIGKILL is there: release stores keep the compiler from changing their order.

mod control;
#[cfg(test)]
pub(crate) mod kill;
mod statistics;

pub(crate) use control::{ControlReader, ControlWriter};
pub use statistics::{BUCKETS, Counter, bucket_end};

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use farbus_fabric::wire::Tag;
use farbus_vfio::nvme::{SQE_SIZE, Status, SubmissionEntry};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::description::MAX_QUEUE_PAIRS;
use crate::shadow::{ShadowRange, shared_memory};

const MAGIC: u64 = u64::from_le_bytes(*b"farbusC1");
/// Of the layout below. A process of another version cannot go on with it.
const VERSION: u64 = 1;

/// Slots that there is room for: a claim grants no more tags.
const SLOTS: usize = 4096;
const SLOT_LEN: usize = 128;
const QUEUE_LEN: usize = 16;
const QUEUES: usize = MAX_QUEUE_PAIRS as usize + 1;
const CONTROL_LEN: usize = 128 << 10;

// Header: magic, version, which control area is valid, the lengths of both.
const ACTIVE_AT: usize = 16;
const LENGTHS_AT: usize = 24;
const STATISTICS: usize = 4096;
const SUBMISSION_AT: usize = 3 * 4096;
const COMPLETION_AT: usize = SUBMISSION_AT + QUEUES * QUEUE_LEN;
const CONFIG_AT: usize = 4 * 4096;
const CONFIG_LEN: usize = 4096;
const CLAIM_AT: usize = CONFIG_AT + CONFIG_LEN;
const CLAIM_LEN: usize = 64 << 10;
const CONTROL_AT: usize = CLAIM_AT + CLAIM_LEN;
const SLOTS_AT: usize = CONTROL_AT + 2 * CONTROL_LEN;
const LEN: usize = SLOTS_AT + SLOTS * SLOT_LEN;

const _: () = assert!(COMPLETION_AT + QUEUES * QUEUE_LEN <= CONFIG_AT);
const _: () = assert!(STATISTICS + STATISTICS_LEN <= SUBMISSION_AT);

/// Where in the memory the statistics are, in bytes.
pub const STATISTICS_AT: u64 = STATISTICS as u64;
/// How long they are: counters, latencies, commands in flight.
pub const STATISTICS_LEN: usize = (Counter::COUNT + BUCKETS + 1) * 8;

// A slot's words.
const STATE: usize = 0;
const OWNER: usize = 8;
const POSITION: usize = 16;
const SHADOW: usize = 24;
const STATUS: usize = 32;
const RESULT: usize = 40;
const ORDER: usize = 48;
const STARTED: usize = 56;
const SQE: usize = 64;

/// Why there is no record to go on with.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The memory cannot be mapped.
    #[error("the memory of the controller's state cannot be used")]
    Memory(#[source] io::Error),
    /// It holds something else.
    #[error("the memory of the controller's state was made by another version of this program")]
    Version,
    /// What it holds cannot be.
    #[error("the controller's state does not hold together: {0}")]
    Broken(&'static str),
}

/// Where a command of the record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlotState {
    Free,
    /// Fetched; not known to be done.
    Queued,
    /// The device has done it; what follows from that may not be recorded yet. Admin commands only.
    Returned,
    /// Its completion waits for its turn.
    Held,
    /// Its completion is posted as the one of this number, or about to be.
    Posting(u64),
}

impl SlotState {
    fn to_word(self) -> u64 {
        match self {
            Self::Free => 0,
            Self::Queued => 1,
            Self::Returned => 2,
            Self::Held => 3,
            Self::Posting(number) => 4 | number << 3,
        }
    }

    fn from_word(word: u64) -> Self {
        match word & 7 {
            1 => Self::Queued,
            2 => Self::Returned,
            3 => Self::Held,
            4 => Self::Posting(word >> 3),
            _ => Self::Free,
        }
    }
}

/// A command of the record, as it was fetched.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) era: u32,
    pub(super) queue: u16,
    pub(super) completion_queue: u16,
    /// Which of its queue's commands it is, counted from the queue's creation.
    pub(super) position: u64,
    pub(super) shadow: ShadowRange,
    pub(super) sqe: SubmissionEntry,
}

/// How far a command of the record is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Progress {
    pub(super) state: SlotState,
    pub(super) status: Status,
    pub(super) result: u64,
    /// Held completions are posted in this order.
    pub(super) order: u64,
}

/// The memory. See the module's own description.
pub struct Record {
    memory: Arc<MmapRegion>,
    order: u64,
    /// The time of the batch at hand, in nanoseconds.
    now: u64,
    /// When the peer was asked for a sign of life that it has not given yet.
    pinged: Option<u64>,
}

impl Record {
    /// Fresh memory, for a controller that begins.
    pub fn create() -> io::Result<Self> {
        let memory = shared_memory("farbus-controller", LEN.next_multiple_of(4096))?;
        let record = Self::over(memory);
        record.store(8, VERSION);
        record.store(0, MAGIC);
        Ok(record)
    }

    /// The memory of a predecessor.
    pub fn open(fd: OwnedFd) -> Result<Self, RecordError> {
        let file = File::from(fd);
        let len = LEN.next_multiple_of(4096);
        if file.metadata().map_err(RecordError::Memory)?.len() != len as u64 {
            return Err(RecordError::Version);
        }
        let memory = MmapRegion::from_file(FileOffset::new(file, 0), len)
            .map_err(|error| RecordError::Memory(io::Error::other(error)))?;
        let record = Self::over(Arc::new(memory));
        if (record.load(0), record.load(8)) != (MAGIC, VERSION) {
            return Err(RecordError::Version);
        }
        Ok(record)
    }

    fn over(memory: Arc<MmapRegion>) -> Self {
        Self {
            memory,
            order: 0,
            now: 0,
            pinged: None,
        }
    }

    /// The memory's descriptor, for whoever is to keep it.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.memory.file_offset().map(|file| file.file().as_fd())
    }

    fn load(&self, at: usize) -> u64 {
        let word = self.memory.get_atomic_ref::<AtomicU64>(at);
        word.map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn store(&self, at: usize, value: u64) {
        #[cfg(test)]
        kill::step();
        if let Ok(word) = self.memory.get_atomic_ref::<AtomicU64>(at) {
            word.store(value, Ordering::Release);
        }
    }

    fn add(&self, at: usize, value: u64) {
        self.store(at, self.load(at).wrapping_add(value));
    }

    fn bytes(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        if let Ok(slice) = self.memory.get_slice(at, len) {
            slice.copy_to(&mut bytes);
        }
        bytes
    }

    fn store_bytes(&self, at: usize, bytes: &[u8]) {
        #[cfg(test)]
        kill::step();
        if let Ok(slice) = self.memory.get_slice(at, bytes.len()) {
            slice.copy_from(bytes);
        }
    }

    /// Configuration space as it is now. Not stored as a whole: a write that was cut off is done
    /// again by whoever goes on.
    pub(crate) fn config(&self) -> Vec<u8> {
        self.bytes(CONFIG_AT, CONFIG_LEN)
    }

    pub(crate) fn set_config(&self, bytes: &[u8]) {
        self.store_bytes(CONFIG_AT, bytes.get(..CONFIG_LEN).unwrap_or(bytes));
    }

    /// What was claimed, which stays as it is.
    pub(crate) fn claim(&self) -> Vec<u8> {
        let len = self.load(CLAIM_AT) as usize;
        self.bytes(CLAIM_AT + 8, len.min(CLAIM_LEN - 8))
    }

    pub(crate) fn set_claim(&self, bytes: &[u8]) -> bool {
        if bytes.len() > CLAIM_LEN - 8 {
            return false;
        }
        self.store_bytes(CLAIM_AT + 8, bytes);
        self.store(CLAIM_AT, bytes.len() as u64);
        true
    }

    /// What is set up, as it was last committed; empty if it never was.
    pub(super) fn control(&self) -> Vec<u8> {
        match self.load(ACTIVE_AT) {
            0 => Vec::new(),
            active => {
                let which = (active % 2) as usize;
                let len = self.load(LENGTHS_AT + 8 * which) as usize;
                self.bytes(CONTROL_AT + which * CONTROL_LEN, len.min(CONTROL_LEN))
            }
        }
    }

    /// Makes this what is set up. What does not fit, which cannot be, is not taken.
    pub(super) fn commit(&self, control: &[u8]) {
        debug_assert!(control.len() <= CONTROL_LEN);
        if control.len() > CONTROL_LEN {
            return;
        }
        let next = self.load(ACTIVE_AT) + 1;
        let which = (next % 2) as usize;
        self.store_bytes(CONTROL_AT + which * CONTROL_LEN, control);
        self.store(LENGTHS_AT + 8 * which, control.len() as u64);
        self.store(ACTIVE_AT, next);
    }

    fn slot_at(tag: Tag) -> usize {
        SLOTS_AT + usize::from(tag.0) % SLOTS * SLOT_LEN
    }

    /// A command was fetched; its queue's head has not moved yet.
    pub(super) fn fetched(&self, tag: Tag, slot: &Slot) {
        let at = Self::slot_at(tag);
        let owner = u64::from(slot.era)
            | u64::from(slot.queue) << 32
            | u64::from(slot.completion_queue) << 48;
        self.store(at + OWNER, owner);
        self.store(at + POSITION, slot.position);
        let shadow = u64::from(slot.shadow.offset) | u64::from(slot.shadow.pages) << 32;
        self.store(at + SHADOW, shadow);
        self.store(at + STARTED, self.now);
        for (index, word) in slot.sqe.0.chunks_exact(8).enumerate() {
            let word = word.try_into().map_or(0, u64::from_ne_bytes);
            self.store(at + SQE + index * 8, word);
        }
        self.store(at + STATE, SlotState::Queued.to_word());
    }

    /// The head of a submission queue has moved past so many commands.
    pub(super) fn set_fetched(&self, queue: u16, count: u64) {
        self.store(SUBMISSION_AT + queue_at(queue), count);
    }

    pub(super) fn submission(&self, queue: u16) -> (u64, u64) {
        let at = SUBMISSION_AT + queue_at(queue);
        (self.load(at), self.load(at + 8))
    }

    /// The guest has rung: the queue's tail as an index.
    pub(super) fn set_tail(&self, queue: u16, tail: u32) {
        self.store(SUBMISSION_AT + queue_at(queue) + 8, tail.into());
    }

    /// So many completions have been posted to a queue.
    pub(super) fn set_posted(&self, queue: u16, count: u64) {
        self.store(COMPLETION_AT + queue_at(queue), count);
    }

    pub(super) fn completion(&self, queue: u16) -> (u64, u64) {
        let at = COMPLETION_AT + queue_at(queue);
        (self.load(at), self.load(at + 8))
    }

    /// The guest has consumed: the queue's head as an index.
    pub(super) fn set_head(&self, queue: u16, head: u32) {
        self.store(COMPLETION_AT + queue_at(queue) + 8, head.into());
    }

    /// The device has done an admin command; what follows from that comes now.
    pub(super) fn returned(&self, tag: Tag, status: Status, result: u64) {
        self.done(tag, status, result, SlotState::Returned);
    }

    /// The outcome of a command is settled; its completion waits for its turn.
    pub(super) fn held(&mut self, tag: Tag, status: Status, result: u64) {
        self.order += 1;
        self.store(Self::slot_at(tag) + ORDER, self.order);
        self.done(tag, status, result, SlotState::Held);
    }

    fn done(&self, tag: Tag, status: Status, result: u64, state: SlotState) {
        let at = Self::slot_at(tag);
        self.store(at + STATUS, status.0.into());
        self.store(at + RESULT, result);
        self.store(at + STATE, state.to_word());
    }

    /// The completion is about to be posted, as the one of this number.
    pub(super) fn posting(&self, tag: Tag, number: u64) {
        self.store(
            Self::slot_at(tag) + STATE,
            SlotState::Posting(number).to_word(),
        );
    }

    /// The command is over.
    pub(super) fn freed(&self, tag: Tag) {
        self.store(Self::slot_at(tag) + STATE, SlotState::Free.to_word());
    }

    pub(super) fn slot(&self, tag: Tag) -> (Slot, Progress) {
        let at = Self::slot_at(tag);
        let owner = self.load(at + OWNER);
        let shadow = self.load(at + SHADOW);
        let mut sqe = [0; SQE_SIZE];
        for (index, word) in sqe.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&self.load(at + SQE + index * 8).to_ne_bytes());
        }
        let slot = Slot {
            era: owner as u32,
            queue: (owner >> 32) as u16,
            completion_queue: (owner >> 48) as u16,
            position: self.load(at + POSITION),
            shadow: ShadowRange {
                offset: shadow as u32,
                pages: (shadow >> 32) as u32,
            },
            sqe: SubmissionEntry(sqe),
        };
        let progress = Progress {
            state: SlotState::from_word(self.load(at + STATE)),
            status: Status(self.load(at + STATUS) as u16),
            result: self.load(at + RESULT),
            order: self.load(at + ORDER),
        };
        (slot, progress)
    }

    /// What was held comes before what will be.
    pub(super) fn set_order(&mut self, order: u64) {
        self.order = order;
    }

    /// So many commands are under way, for whoever looks on.
    pub(super) fn set_in_flight(&self, count: u16) {
        self.store(INFLIGHT, count.into());
    }
}

const INFLIGHT: usize = STATISTICS + (Counter::COUNT + BUCKETS) * 8;

fn queue_at(queue: u16) -> usize {
    usize::from(queue).min(QUEUES - 1) * QUEUE_LEN
}
