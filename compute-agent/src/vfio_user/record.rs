//! What the next process needs of a conversation with a VMM: which bytes were received and not
//! handled, which were answered and not sent, and which windows of guest memory are mapped.
//!
//! How far the conversation is, is a handful of numbers that change together: they are written beside
//! the valid ones, and one store makes them the valid ones. A message is handled, its answer
//! stands in the outbox, and only then do the numbers say so; who is killed before has handled
//! nothing, and every message is such that handling it again does no more than once.

use std::sync::atomic::{AtomicU64, Ordering};

use farbus_vfio::{DmaAccess, Iova};
use vm_memory::VolatileMemory;

use super::memory::{Buffer, SharedMemory};
use super::{inbox, outbox};
use crate::custody::Custody;
use crate::custody::worker::{SESSION, key};
use crate::guest_memory::MAX_WINDOWS;

const MAGIC: u64 = u64::from_le_bytes(*b"farbusS1");
const VALID_AT: usize = 8;
const PROGRESS_AT: usize = 64;
const PROGRESS_LEN: usize = 128;
const WINDOWS_AT: usize = 4096;
const WINDOW_LEN: usize = 32;
const VECTORS_AT: usize = WINDOWS_AT + (MAX_WINDOWS + 1) * WINDOW_LEN;
const VECTOR_LEN: usize = 16;
/// MSI-X has no more.
const MAX_VECTORS: usize = 2048;
const INBOX_AT: usize = VECTORS_AT + MAX_VECTORS * VECTOR_LEN;
const OUTBOX_AT: usize = (INBOX_AT + inbox::CAPACITY).next_multiple_of(4096);
const LEN: usize = (OUTBOX_AT + outbox::CAPACITY).next_multiple_of(4096);

/// How far the conversation is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// The version has been agreed on.
    pub(super) negotiated: bool,
    /// MSI-X is mediated.
    pub(super) mediated: bool,
    /// What the inbox holds, and where in the stream that begins.
    pub(super) inbox: (usize, usize, u64),
    /// Bytes that the inbox has and the socket has, too, unless they were taken out meanwhile.
    pub(super) unconsumed: usize,
    /// What the outbox holds, and how much of that is of the first message.
    pub(super) outbox: (usize, usize, usize),
    /// Bytes of the outbox may have been put into the pipe.
    pub(super) writing: bool,
    /// How far a `REGION_WRITE_MULTI` is: writes seen, writes done.
    pub(super) multi: (usize, u64),
}

/// A window of guest memory, as the record has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WindowRecord {
    pub(crate) iova: Iova,
    pub(crate) size: u64,
    pub(crate) access: DmaAccess,
    /// Which file, and where in it.
    pub(crate) file: Option<(u64, u64)>,
}

/// See the module's own description.
#[derive(Clone, Debug)]
pub(crate) struct SessionRecord(SharedMemory);

impl SessionRecord {
    /// Fresh memory, which is handed over at once.
    pub(crate) fn create(custody: &Custody) -> std::io::Result<Self> {
        let record = Self(SharedMemory::create("farbus-session", LEN)?);
        record.store(0, MAGIC);
        if let Some(fd) = record.0.descriptor() {
            custody.keep(vec![(key(SESSION), fd)]);
        }
        Ok(record)
    }

    /// A predecessor's, if it left any that can be gone on with.
    pub(crate) fn open(custody: &Custody) -> Option<Self> {
        let memory = SharedMemory::open(custody.held(&key(SESSION))?, LEN).ok()?;
        let record = Self(memory);
        (record.load(0) == MAGIC).then_some(record)
    }

    fn load(&self, at: usize) -> u64 {
        let word = self.0.region().get_atomic_ref::<AtomicU64>(at);
        word.map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn store(&self, at: usize, value: u64) {
        if let Ok(word) = self.0.region().get_atomic_ref::<AtomicU64>(at) {
            word.store(value, Ordering::Release);
        }
    }

    /// Where messages are received to.
    pub(super) fn inbox(&self) -> Buffer {
        Buffer::shared(&self.0, INBOX_AT..INBOX_AT + inbox::CAPACITY)
    }

    /// Where answers wait.
    pub(super) fn outbox(&self) -> Buffer {
        Buffer::shared(&self.0, OUTBOX_AT..OUTBOX_AT + outbox::CAPACITY)
    }

    /// How far the conversation is.
    pub(super) fn progress(&self) -> Progress {
        let at = PROGRESS_AT + (self.load(VALID_AT) % 2) as usize * PROGRESS_LEN;
        let words: [u64; 11] = std::array::from_fn(|index| self.load(at + index * 8));
        let small = |word: u64| usize::try_from(word).unwrap_or(usize::MAX);
        let [flags, a, b, c, d, e, f, g, h, i, _] = words;
        Progress {
            negotiated: flags & 1 != 0,
            writing: flags & 2 != 0,
            mediated: flags & 4 != 0,
            inbox: (small(a), small(b), c),
            unconsumed: small(d),
            outbox: (small(e), small(f), small(g)),
            multi: (small(h), i),
        }
    }

    /// Makes this how far it is.
    pub(super) fn set_progress(&self, progress: &Progress) {
        let next = self.load(VALID_AT) + 1;
        let at = PROGRESS_AT + (next % 2) as usize * PROGRESS_LEN;
        let flags = u64::from(progress.negotiated)
            | u64::from(progress.writing) << 1
            | u64::from(progress.mediated) << 2;
        let words = [
            flags,
            progress.inbox.0 as u64,
            progress.inbox.1 as u64,
            progress.inbox.2,
            progress.unconsumed as u64,
            progress.outbox.0 as u64,
            progress.outbox.1 as u64,
            progress.outbox.2 as u64,
            progress.multi.0 as u64,
            progress.multi.1,
        ];
        for (index, word) in words.into_iter().enumerate() {
            self.store(at + index * 8, word);
        }
        self.store(VALID_AT, next);
    }

    fn window_at(place: usize) -> usize {
        WINDOWS_AT + place.min(MAX_WINDOWS) * WINDOW_LEN
    }

    /// A window is mapped; `place` is any that has none.
    pub(crate) fn set_window(&self, place: usize, window: &WindowRecord) {
        let at = Self::window_at(place);
        let (file, offset) = window.file.map_or((0, 0), |(id, at)| (id + 1, at));
        let write = u64::from(window.access == DmaAccess::ReadWrite);
        self.store(at, window.iova.0);
        self.store(at + 8, offset);
        self.store(at + 16, file << 1 | write);
        self.store(at + 24, window.size);
    }

    /// It is no longer.
    pub(crate) fn clear_window(&self, place: usize) {
        self.store(Self::window_at(place) + 24, 0);
    }

    /// All windows, by their places.
    pub(crate) fn windows(&self) -> Vec<(usize, WindowRecord)> {
        let window = |place| {
            let at = Self::window_at(place);
            let (size, file) = (self.load(at + 24), self.load(at + 16));
            let record = WindowRecord {
                iova: Iova(self.load(at)),
                size,
                access: if file & 1 != 0 {
                    DmaAccess::ReadWrite
                } else {
                    DmaAccess::Read
                },
                file: (file >> 1).checked_sub(1).map(|id| (id, self.load(at + 8))),
            };
            (size > 0).then_some((place, record))
        };
        (0..=MAX_WINDOWS).filter_map(window).collect()
    }

    fn vector_at(vector: u32) -> usize {
        VECTORS_AT + (vector as usize).min(MAX_VECTORS - 1) * VECTOR_LEN
    }

    /// An entry of a mediated MSI-X table: address, data, whether it is masked.
    pub(super) fn set_vector(&self, vector: u32, address: u64, data: u32, masked: bool) {
        let at = Self::vector_at(vector);
        self.store(at, address);
        self.store(at + 8, u64::from(data) << 1 | u64::from(!masked));
    }

    /// As [`Self::set_vector`] had it, or as after a reset.
    pub(super) fn vector(&self, vector: u32) -> (u64, u32, bool) {
        let at = Self::vector_at(vector);
        let data = self.load(at + 8);
        (self.load(at), (data >> 1) as u32, data & 1 == 0)
    }

    /// All entries are as after a reset.
    pub(super) fn clear_vectors(&self) {
        for vector in 0..MAX_VECTORS as u32 {
            if self.vector(vector) != (0, 0, true) {
                self.set_vector(vector, 0, 0, true);
            }
        }
    }

    /// Nobody is connected, and nothing is mapped.
    pub(super) fn clear(&self) {
        self.clear_vectors();
        for (place, _) in self.windows() {
            self.clear_window(place);
        }
        self.set_progress(&Progress::default());
    }
}
