//! Shadow doorbells: doorbells that the guest keeps in its own memory (NVMe 1.4 §5.7, §7.13).
//!
//! The guest stores each new tail and head in one page, and reads in a second one, EventIdx,
//! whether this side wants to be told of it by a write to the register. While this side is
//! awake it looks by itself, and no doorbell traps; before it sleeps it *arms* every queue,
//! by naming the tail that it has seen, and looks once more. Only the first new command after
//! that traps. An armed entry disarms itself, since the guest's tail moves past it.
//!
//! The admin queue keeps its registers: the drivers that know of shadow doorbells ring them.

use std::sync::atomic::{Ordering, fence};

use farbus_vfio::Iova;
use farbus_vfio::nvme::{PAGE_SIZE, Status, SubmissionEntry};
use log::debug;
use vm_memory::Bytes;
use vm_memory::volatile_memory::VolatileSlice;

use super::super::identify;
use super::ComputeHalf;
use crate::guest::GuestMemory;
use crate::shadow::ShadowRange;

/// Where the guest keeps its doorbells.
#[derive(Clone, Copy)]
pub(super) struct ShadowDoorbells {
    pub(super) values: Iova,
    pub(super) event_indices: Iova,
}

/// Where in either page the doorbell of a queue is; CAP.DSTRD is 0.
fn place(queue: u16, completion: bool) -> usize {
    (usize::from(queue) * 2 + usize::from(completion)) * 4
}

/// A page of the guest's, if it is mapped now.
fn page(memory: &GuestMemory, at: Iova) -> Option<VolatileSlice<'_>> {
    memory.slice(at, PAGE_SIZE, true).ok()
}

fn load(page: &VolatileSlice<'_>, at: usize) -> Option<u32> {
    let value: u32 = page.load(at, Ordering::Acquire).ok()?;
    Some(u32::from_le(value))
}

fn store(page: &VolatileSlice<'_>, at: usize, value: u32) {
    // In bounds: there are fewer queues than a page has places for.
    let _ = page.store(value.to_le(), at, Ordering::Relaxed);
}

impl ComputeHalf {
    /// The guest's Doorbell Buffer Config command.
    pub(super) fn configure_doorbells(&mut self, sqe: &SubmissionEntry) -> Status {
        if !self.offers_shadow_doorbells {
            return Status::INVALID_OPCODE;
        }
        let pages = [sqe.prp1(), sqe.prp2()];
        if pages.iter().any(|page| page % PAGE_SIZE as u64 != 0) {
            return Status::INVALID_PRP_OFFSET;
        }
        let [values, event_indices] = pages.map(Iova);
        let mapped = |at| page(&self.memory, at).is_some();
        if values == event_indices || !mapped(values) || !mapped(event_indices) {
            return Status::INVALID_FIELD;
        }
        self.shadow_doorbells = Some(ShadowDoorbells {
            values,
            event_indices,
        });
        debug!("the guest keeps its doorbells in memory: {values}, {event_indices}");
        // Queues that exist already have been rung by their registers so far.
        if let Some(values) = page(&self.memory, values) {
            for (id, sq) in self.queues.submission.iter().skip(1) {
                store(&values, place(id, false), sq.ring.tail());
            }
            for (id, cq) in self.queues.completion.iter().skip(1) {
                store(&values, place(id, true), cq.ring.head());
            }
        }
        Status::SUCCESS
    }

    /// Takes the tails that the guest has stored; whether one was new. Guest memory that is not
    /// mapped at the time shows nothing new, and tails that a ring cannot have are ignored.
    pub(super) fn look_at_doorbells(&mut self) -> bool {
        let Some(values) = self
            .shadow_doorbells
            .and_then(|doorbells| page(&self.memory, doorbells.values))
        else {
            return false;
        };
        let mut news = false;
        for (id, sq) in self.queues.submission.iter_mut().skip(1) {
            if let Some(tail) = load(&values, place(id, false)) {
                news |= tail != sq.ring.tail() && sq.ring.set_tail(tail);
            }
        }
        news
    }

    /// Before a sleep: asks the guest to write the registers for its next commands. Whether it
    /// has stored a new tail meanwhile; then there may be something to do, and no sleep.
    pub fn arm_doorbells(&mut self) -> bool {
        let Some(doorbells) = self.shadow_doorbells else {
            return false;
        };
        let news = self.look_at_doorbells();
        let Some(event_indices) = page(&self.memory, doorbells.event_indices) else {
            return news;
        };
        for (id, sq) in self.queues.submission.iter().skip(1) {
            store(&event_indices, place(id, false), sq.ring.tail());
        }
        // The guest stores its tail before it reads what was stored here, and this side looks
        // at the tail after: one of the two sees the other.
        fence(Ordering::SeqCst);
        self.look_at_doorbells() || news
    }

    /// Whether a completion queue that was full has room by now. If not, the guest is asked to
    /// write the register when it has made some.
    pub(super) fn finds_room(&mut self, id: u16) -> bool {
        let (Some(doorbells), 1..) = (self.shadow_doorbells, id) else {
            return false;
        };
        let at = place(id, true);
        let values = page(&self.memory, doorbells.values);
        let Some(values) = values else {
            return false;
        };
        let record = &self.record;
        let mut look = || {
            self.queues.completion.get_mut(id).is_some_and(|cq| {
                let moved = load(&values, at).is_some_and(|head| cq.ring.set_head(head));
                if let (true, Some(record)) = (moved, record) {
                    record.set_head(id, cq.ring.head());
                }
                moved && !cq.ring.is_full()
            })
        };
        if look() {
            return true;
        }
        if let Some(event_indices) = page(&self.memory, doorbells.event_indices) {
            store(&event_indices, at, load(&values, at).unwrap_or_default());
            fence(Ordering::SeqCst);
        }
        look()
    }

    /// A queue was made: what is in its places is of the last one that had its id.
    pub(super) fn clear_doorbell(&mut self, queue: u16, completion: bool) {
        let Some(doorbells) = self.shadow_doorbells else {
            return;
        };
        for at in [doorbells.values, doorbells.event_indices] {
            if let Some(page) = page(&self.memory, at) {
                store(&page, place(queue, completion), 0);
            }
        }
    }

    /// Tells the guest, in the Identify data that has landed, that there are shadow doorbells.
    pub(super) fn offer_doorbells(&self, shadow: ShadowRange, segments: usize) {
        if !self.offers_shadow_doorbells {
            return;
        }
        let mut skip = identify::DOORBELL_BUFFER_BYTE;
        for segment in self.segments.of(shadow, segments) {
            if skip >= u64::from(segment.len) {
                skip -= u64::from(segment.len);
                continue;
            }
            let at = Iova(segment.iova.0.wrapping_add(skip));
            if let Ok(byte) = self.memory.slice(at, 1, true) {
                let flags: u8 = byte.load(0, Ordering::Relaxed).unwrap_or_default();
                let flags = flags | identify::DOORBELL_BUFFER_BIT;
                let _ = byte.store(flags, 0, Ordering::Relaxed);
            }
            return;
        }
    }
}
