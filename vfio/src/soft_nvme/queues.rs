//! Submission and completion queues (NVMe 1.4 §4.1) and the table of those that exist.
//!
//! Lock order: the table, then a submission ring, then a completion ring. A command takes its
//! place in the completion queue when it is fetched; a full completion queue thus stops the
//! fetching of commands, and a completion never has to wait for room.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::controller::Scratch;
use super::dma::{Dma, Pins, Unreachable};
use super::lock;
use crate::nvme::{CQE_SIZE, CompletionEntry, SQE_SIZE, Status, SubmissionEntry};

/// Where a queue is and how long it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// IOVA of entry 0, a multiple of 4096.
    pub(super) base: u64,
    /// Number of entries, 2 to 4096.
    pub(super) entries: u16,
}

impl Shape {
    fn next(self, index: u16) -> u16 {
        if index + 1 >= self.entries {
            0
        } else {
            index + 1
        }
    }

    /// How far it is from one index up to another.
    fn distance(self, from: u16, to: u16) -> u16 {
        if to >= from {
            to - from
        } else {
            self.entries - from + to
        }
    }

    fn address(self, index: u16, entry_size: usize) -> Result<u64, Unreachable> {
        self.base
            .checked_add(u64::from(index) * entry_size as u64)
            .ok_or(Unreachable)
    }
}

/// A doorbell was written with a value that its queue cannot have.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BadDoorbell;

/// What a look into a submission queue found.
pub(super) enum Fetched {
    /// A command, and whether there may be another one to fetch at once.
    Command { entry: SubmissionEntry, more: bool },
    /// Nothing to do now.
    Nothing,
}

/// A submission queue.
pub(super) struct Sq {
    pub(super) id: u16,
    pub(super) cq: Arc<Cq>,
    shape: Shape,
    ring: Mutex<SqRing>,
    /// Signalled when the last command of a closed queue has finished.
    idle: Condvar,
    /// A copy of the ring's head, for completions: they take only the other ring's lock, and
    /// the heads that they report never go backwards, since each is read under that lock.
    head: AtomicU16,
    /// What a thread needs that carries the commands out in the middle of a doorbell write,
    /// where that is how they are. Whoever holds it is the only one who does.
    inline: Option<Mutex<Scratch>>,
}

struct SqRing {
    head: u16,
    tail: u16,
    in_flight: u32,
    closed: bool,
    /// Threads that wait for `in_flight` to be none: to tell nobody takes a system call too.
    waiting: u32,
}

impl Sq {
    pub(super) fn new(id: u16, shape: Shape, cq: Arc<Cq>) -> Self {
        Self {
            id,
            cq,
            shape,
            ring: Mutex::new(SqRing {
                head: 0,
                tail: 0,
                in_flight: 0,
                closed: false,
                waiting: 0,
            }),
            idle: Condvar::new(),
            head: AtomicU16::new(0),
            inline: None,
        }
    }

    /// Has the commands carried out by whoever writes the doorbell.
    pub(super) fn inline(mut self) -> Self {
        self.inline = Some(Mutex::new(Scratch::small()));
        self
    }

    pub(super) fn is_inline(&self) -> bool {
        self.inline.is_some()
    }

    /// The exclusive right to carry the commands out, and what that takes.
    pub(super) fn lock_inline(&self) -> Option<MutexGuard<'_, Scratch>> {
        self.inline.as_ref().map(lock)
    }

    /// Number of entries.
    pub(super) fn entries(&self) -> u16 {
        self.shape.entries
    }

    /// Stores the tail doorbell.
    pub(super) fn set_tail(&self, tail: u16) -> Result<(), BadDoorbell> {
        if tail >= self.shape.entries {
            return Err(BadDoorbell);
        }
        lock(&self.ring).tail = tail;
        Ok(())
    }

    /// Copies the next command out of memory, once, if there is one, room for its completion,
    /// and `permitted` says so (asked under the ring's lock). It is under way until
    /// [`Self::finish`].
    pub(super) fn fetch(
        &self,
        dma: &Dma,
        pins: &mut Pins,
        permitted: impl FnOnce() -> bool,
    ) -> Result<Fetched, Unreachable> {
        let mut ring = lock(&self.ring);
        let fetched = self.take(&mut ring, dma, pins, permitted)?;
        if matches!(fetched, Fetched::Command { .. }) {
            ring.in_flight += 1;
        }
        Ok(fetched)
    }

    /// Commands are about to be taken in a row, all of them under way until [`Self::finish`].
    /// Says no once the queue is closed.
    pub(super) fn begin_batch(&self) -> bool {
        let mut ring = lock(&self.ring);
        if !ring.closed {
            ring.in_flight += 1;
        }
        !ring.closed
    }

    /// As [`Self::fetch`], between [`Self::begin_batch`] and [`Self::finish`].
    pub(super) fn fetch_in_batch(
        &self,
        dma: &Dma,
        pins: &mut Pins,
        permitted: impl FnOnce() -> bool,
    ) -> Result<Fetched, Unreachable> {
        self.take(&mut lock(&self.ring), dma, pins, permitted)
    }

    fn take(
        &self,
        ring: &mut SqRing,
        dma: &Dma,
        pins: &mut Pins,
        permitted: impl FnOnce() -> bool,
    ) -> Result<Fetched, Unreachable> {
        if ring.closed || ring.head == ring.tail || !permitted() || !self.cq.reserve() {
            return Ok(Fetched::Nothing);
        }
        let mut entry = SubmissionEntry([0; SQE_SIZE]);
        let address = self.shape.address(ring.head, SQE_SIZE);
        if let Err(error) = address.and_then(|address| pins.read(dma, address, &mut entry.0)) {
            self.cq.unreserve();
            return Err(error);
        }
        ring.head = self.shape.next(ring.head);
        self.head.store(ring.head, Ordering::Relaxed);
        Ok(Fetched::Command {
            entry,
            more: ring.head != ring.tail,
        })
    }

    /// The command that was fetched, or the batch, will not touch anything any more.
    pub(super) fn finish(&self) {
        let mut ring = lock(&self.ring);
        ring.in_flight = ring.in_flight.saturating_sub(1);
        if ring.in_flight == 0 && ring.waiting > 0 {
            self.idle.notify_all();
        }
    }

    /// Fetches nothing more.
    pub(super) fn close(&self) {
        lock(&self.ring).closed = true;
    }

    /// Waits until no fetched command is under way.
    pub(super) fn wait_idle(&self) {
        let mut ring = lock(&self.ring);
        while ring.in_flight != 0 {
            ring.waiting += 1;
            ring = self.idle.wait(ring).unwrap_or_else(PoisonError::into_inner);
            ring.waiting -= 1;
        }
    }
}

/// A completion queue.
pub(super) struct Cq {
    pub(super) id: u16,
    /// The vector to signal, if the queue has interrupts.
    pub(super) vector: Option<u16>,
    shape: Shape,
    ring: Mutex<CqRing>,
}

struct CqRing {
    head: u16,
    tail: u16,
    phase: bool,
    /// Entries promised to commands under way.
    reserved: u16,
    /// A command could not be fetched for want of room.
    starved: bool,
}

impl Cq {
    pub(super) fn new(id: u16, shape: Shape, vector: Option<u16>) -> Self {
        let ring = CqRing {
            head: 0,
            tail: 0,
            phase: true,
            reserved: 0,
            starved: false,
        };
        Self {
            id,
            vector,
            shape,
            ring: Mutex::new(ring),
        }
    }

    /// Sets an entry aside, if one is left. A queue holds one entry less than it has slots
    /// (NVMe 1.4 §4.1.2).
    pub(super) fn reserve(&self) -> bool {
        let mut ring = lock(&self.ring);
        let used = self.shape.distance(ring.head, ring.tail);
        let room = used + ring.reserved + 1 < self.shape.entries;
        if room {
            ring.reserved += 1;
        } else {
            ring.starved = true;
        }
        room
    }

    /// Gives an entry back.
    pub(super) fn unreserve(&self) {
        let mut ring = lock(&self.ring);
        ring.reserved = ring.reserved.saturating_sub(1);
    }

    /// Stores the head doorbell; returns whether commands wait for the room that it made.
    pub(super) fn set_head(&self, head: u16) -> Result<bool, BadDoorbell> {
        let mut ring = lock(&self.ring);
        let posted = self.shape.distance(ring.head, ring.tail);
        if head >= self.shape.entries || self.shape.distance(ring.head, head) > posted {
            return Err(BadDoorbell);
        }
        ring.head = head;
        Ok(std::mem::take(&mut ring.starved))
    }

    /// Posts the completion of a command of `sq`, for which an entry is reserved.
    pub(super) fn post(
        &self,
        (dma, pins): (&Dma, &mut Pins),
        sq: &Sq,
        cid: u16,
        status: Status,
        result: u32,
    ) -> Result<(), Unreachable> {
        let mut ring = lock(&self.ring);
        ring.reserved = ring.reserved.saturating_sub(1);
        let entry = CompletionEntry {
            result: u64::from(result),
            sq_head: sq.head.load(Ordering::Relaxed),
            sq_id: sq.id,
            cid,
            status,
            phase: ring.phase,
        };
        let address = self.shape.address(ring.tail, CQE_SIZE)?;
        pins.store_pair(dma, address, entry.to_qwords())?;
        ring.tail = self.shape.next(ring.tail);
        if ring.tail == 0 {
            ring.phase = !ring.phase;
        }
        Ok(())
    }
}

/// The queues that exist, by id; 0 is the admin pair.
pub(super) struct Queues {
    sqs: Vec<Option<Arc<Sq>>>,
    cqs: Vec<Option<Arc<Cq>>>,
}

impl Queues {
    /// Room for ids 0 to `pairs`.
    pub(super) fn new(pairs: u16) -> Self {
        let slots = usize::from(pairs) + 1;
        Self {
            sqs: vec![None; slots],
            cqs: vec![None; slots],
        }
    }

    pub(super) fn sq(&self, id: u16) -> Option<&Arc<Sq>> {
        self.sqs.get(usize::from(id))?.as_ref()
    }

    pub(super) fn cq(&self, id: u16) -> Option<&Arc<Cq>> {
        self.cqs.get(usize::from(id))?.as_ref()
    }

    /// Whether a queue of either kind may have this id.
    pub(super) fn is_valid_id(&self, id: u16) -> bool {
        usize::from(id) < self.sqs.len()
    }

    /// The submission queues that complete to `cq`.
    pub(super) fn feeding(&self, cq: u16) -> impl Iterator<Item = &Arc<Sq>> {
        self.sqs.iter().flatten().filter(move |sq| sq.cq.id == cq)
    }

    /// Whether there are I/O queues.
    pub(super) fn has_io(&self) -> bool {
        self.sqs.iter().skip(1).any(Option::is_some) || self.cqs.iter().skip(1).any(Option::is_some)
    }

    pub(super) fn insert_sq(&mut self, sq: Arc<Sq>) {
        if let Some(slot) = self.sqs.get_mut(usize::from(sq.id)) {
            *slot = Some(sq);
        }
    }

    pub(super) fn insert_cq(&mut self, cq: Arc<Cq>) {
        if let Some(slot) = self.cqs.get_mut(usize::from(cq.id)) {
            *slot = Some(cq);
        }
    }

    pub(super) fn remove_sq(&mut self, id: u16) -> Option<Arc<Sq>> {
        self.sqs.get_mut(usize::from(id))?.take()
    }

    pub(super) fn remove_cq(&mut self, id: u16) -> Option<Arc<Cq>> {
        self.cqs.get_mut(usize::from(id))?.take()
    }

    /// Takes all submission queues out and forgets all completion queues.
    pub(super) fn clear(&mut self) -> Vec<Arc<Sq>> {
        self.cqs.fill(None);
        self.sqs.iter_mut().filter_map(Option::take).collect()
    }

    pub(super) fn submission(&self) -> impl Iterator<Item = &Arc<Sq>> {
        self.sqs.iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_distance_leads_back_to_where_it_was_measured(
            entries in 2u16..=4096, from: u16, to: u16,
        ) {
            let shape = Shape { base: 0, entries };
            let (from, to) = (from % entries, to % entries);
            let mut at = from;
            for _ in 0..shape.distance(from, to) {
                at = shape.next(at);
            }
            prop_assert_eq!(at, to);
        }
    }

    #[test]
    fn a_completion_queue_promises_one_entry_less_than_it_has() {
        let cq = Cq::new(
            1,
            Shape {
                base: 0,
                entries: 4,
            },
            None,
        );
        assert_eq!(
            [cq.reserve(), cq.reserve(), cq.reserve(), cq.reserve()],
            [true, true, true, false]
        );
        cq.unreserve();
        assert!(cq.reserve());
    }

    #[test]
    fn a_head_doorbell_past_what_was_posted_is_refused() {
        let cq = Cq::new(
            1,
            Shape {
                base: 0,
                entries: 4,
            },
            None,
        );
        assert_eq!(cq.set_head(0), Ok(false));
        assert_eq!(cq.set_head(1), Err(BadDoorbell));
        assert_eq!(cq.set_head(4), Err(BadDoorbell));
    }
}
