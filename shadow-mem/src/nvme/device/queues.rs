//! What one lane has to itself of a device half: its queues at the device, its tags, its share of
//! the buffer shadow, and what it is about to send. The admin queue is in lane 0's.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use farbus_fabric::wire::{CompleteBatch, LanePlace};
use farbus_fabric::{FabricError, RemoteSpan, Span};
use farbus_vfio::nvme::{CompletionEntry, DOORBELL_BASE};
use farbus_vfio::{DmaWindow, Function, FunctionError, RegionIndex};

use super::super::description::{MAX_QUEUE_PAIRS, Namespaces};
use super::super::ring::CompletionCursor;
use super::super::share;
use super::super::slots::Slots;
use super::arena::Arena;
use super::rate::Rate;
use super::segments::Segments;
use super::tags::Tags;
use super::{Limits, MAX_SPANS};
use crate::session::Session;

/// A submission queue of the device.
pub(super) struct SubmissionQueue {
    pub(super) size: u32,
    pub(super) tail: u32,
    /// The tail that the device may know of: what is beyond waits for the claim's limits.
    pub(super) released: u32,
    pub(super) outstanding: u32,
    pub(super) completion_queue: u16,
    /// Entries were released that the doorbell does not tell of yet.
    pub(super) dirty: bool,
}

/// The device's doorbells.
#[derive(Clone)]
pub(super) struct Doorbells {
    pub(super) function: Arc<dyn Function>,
    /// Bytes between two of them.
    pub(super) stride: u64,
}

impl Doorbells {
    pub(super) fn ring(
        &self,
        queue: u16,
        completion: bool,
        value: u32,
    ) -> Result<(), FunctionError> {
        let index = u64::from(queue) * 2 + u64::from(completion);
        let offset = DOORBELL_BASE + index * self.stride;
        self.function
            .region_write(RegionIndex::BAR0, offset, &value.to_le_bytes())
    }
}

/// See the module's own description.
pub(super) struct Io {
    pub(super) doorbells: Doorbells,
    pub(super) namespaces: Namespaces,
    /// Largest transfer of one command in bytes.
    pub(super) max_transfer: u32,
    pub(super) arena: Arc<Arena>,
    pub(super) shadow: DmaWindow,
    /// The share of it, in bytes.
    part: Range<u32>,
    pub(super) tags: Tags,
    /// What the claim is held to. A claim that is held to something has one lane.
    pub(super) rate: Rate,
    pub(super) submission: Slots<SubmissionQueue>,
    pub(super) completion: Slots<CompletionCursor>,
    /// Completions of commands that were never sent.
    pub(super) strays: u64,
    /// Commands that were given to the device.
    pub(super) commands: u64,
    pub(super) batch: CompleteBatch,
    pub(super) payload: Vec<Span>,
    /// Where the payload goes, on a one-sided link.
    pub(super) remote: Vec<RemoteSpan>,
    pub(super) segments: Segments,
    /// The device did not take a doorbell, which the controller's owner must hear of.
    pub(super) failed: Option<FunctionError>,
}

impl Io {
    /// That of a claim's only lane; [`Self::share`] makes it one of several.
    pub(super) fn new(
        doorbells: Doorbells,
        arena: Arc<Arena>,
        shadow: DmaWindow,
        limits: &Limits,
    ) -> Self {
        let part = share::shadow(LanePlace::ONLY, limits.shadow_len);
        Self {
            doorbells,
            namespaces: Namespaces::default(),
            max_transfer: limits.max_transfer,
            arena,
            shadow,
            tags: Tags::new(share::tags(LanePlace::ONLY, limits.tags)),
            rate: Rate::unlimited(limits.tags),
            segments: Segments::new(&part),
            part,
            submission: Slots::new(MAX_QUEUE_PAIRS + 1),
            completion: Slots::new(MAX_QUEUE_PAIRS + 1),
            strays: 0,
            commands: 0,
            batch: CompleteBatch::new(),
            payload: Vec::with_capacity(MAX_SPANS),
            remote: Vec::with_capacity(MAX_SPANS),
            failed: None,
        }
    }

    /// The one at this place, of the same device.
    pub(super) fn share(&self, place: LanePlace, limits: &Limits) -> Self {
        let part = share::shadow(place, limits.shadow_len);
        Self {
            namespaces: self.namespaces.clone(),
            max_transfer: self.max_transfer,
            tags: Tags::new(share::tags(place, limits.tags)),
            segments: Segments::new(&part),
            part,
            ..Self::new(
                self.doorbells.clone(),
                self.arena.clone(),
                self.shadow.clone(),
                limits,
            )
        }
    }

    pub(super) fn label(&self) -> &str {
        &self.doorbells.function.info().label
    }

    /// Whether a range of the buffer shadow is one that this lane may use.
    pub(super) fn has_range(&self, offset: u32, len: u32) -> bool {
        let end = u64::from(offset) + u64::from(len);
        // No data is nowhere.
        len == 0 || offset >= self.part.start && end <= u64::from(self.part.end)
    }

    /// Nothing is at the device any more.
    pub(super) fn forget_commands(&mut self) {
        self.tags.clear();
        self.rate.forget_all();
        self.submission.clear();
        self.completion.clear();
        self.batch.clear();
        self.payload.clear();
        self.remote.clear();
    }

    /// The next completion of a queue.
    pub(super) fn next(&mut self, id: u16) -> Option<CompletionEntry> {
        let cursor = self.completion.get_mut(id)?;
        let (index, phase) = cursor.at();
        let cqe = self.arena.load_cqe(id, index, phase)?;
        cursor.advance();
        Some(cqe)
    }

    /// Lets the device know how far a completion queue was read.
    pub(super) fn ring_completion(&mut self, id: u16) {
        let Some(head) = self.completion.get(id).map(CompletionCursor::head) else {
            return;
        };
        if let Err(error) = self.doorbells.ring(id, true, head) {
            self.failed = Some(error);
        }
    }

    /// Lets the device know of all commands that the claim's limits let through now, each queue's
    /// doorbell once.
    pub(super) fn release(&mut self) {
        if self.rate.holds() {
            let now = Instant::now();
            while let Some(queue) = self.rate.next(now) {
                if let Some(sq) = self.submission.get_mut(queue) {
                    sq.released = (sq.released + 1) % sq.size;
                    sq.dirty = true;
                }
            }
        }
        for id in 0..self.submission.end() {
            let Some(sq) = self.submission.get_mut(id) else {
                continue;
            };
            if std::mem::take(&mut sq.dirty) {
                if let Err(error) = self.doorbells.ring(id, false, sq.released) {
                    self.failed = Some(error);
                    return;
                }
            }
        }
    }

    /// Sends the completions that were gathered.
    pub(super) fn send_batch(&mut self, session: &mut Session) -> Result<(), FabricError> {
        session.complete(&mut self.batch, &mut self.payload, &mut self.remote)
    }
}
