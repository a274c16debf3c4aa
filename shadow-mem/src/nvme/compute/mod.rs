//! The compute half: the controller that the guest sees.
//!
//! It owns the registers and the guest's side of every queue. A command is fetched from the
//! guest once, checked, given a tag and sent; its completion comes back by tag, with the data
//! landing straight in guest memory. Registers are answered here, always at once. The half
//! survives its link: while there is none, commands wait as on a slow disk, and on a new
//! link the controller is rebuilt from what the guest had set up (`replay`).

mod admin;
mod coalescing;
mod complete;
mod doorbells;
mod interrupts;
mod lifecycle;
mod queues;
mod recover;
mod registers;
mod replay;
mod segments;
mod submit;
mod tags;

pub use replay::Changed;

use std::sync::Arc;
use std::time::Instant;

use farbus_fabric::wire::{self, Message, Tag};
use farbus_fabric::{FabricError, Span};
use farbus_vfio::nvme::{DOORBELL_BASE, SubmissionEntry};
use farbus_vfio::{DmaWindow, FunctionError, Iova};
use log::debug;
use vm_memory::MmapRegion;
use vmm_sys_util::eventfd::EventFd;

use self::doorbells::ShadowDoorbells;
use self::interrupts::Interrupts;
use self::lifecycle::{Lifecycle, Phase};
use self::queues::Queues;
use self::registers::{Change, Registers};
use self::replay::Replay;
use self::segments::Segments;
use self::tags::{State, Tags};
use super::description::NvmeDescription;
use super::record::Record;
use crate::guest::{GuestMemory, Segment};
use crate::session::{Session, SubmitBatch};
use crate::shadow::{ShadowAllocator, shared_memory};

/// What the commands that are not answered yet hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outstanding {
    /// Commands, each with a tag.
    pub commands: u16,
    /// Pages of the buffer shadow.
    pub shadow_pages: u32,
}

/// One guest's controller. See the module's own description.
pub struct ComputeHalf {
    description: NvmeDescription,
    registers: Registers,
    life: Lifecycle,
    memory: GuestMemory,
    queues: Queues,
    offers_shadow_doorbells: bool,
    shadow_doorbells: Option<ShadowDoorbells>,
    tags: Tags,
    shadow: ShadowAllocator,
    segments: Segments,
    shadow_len: u32,
    interrupts: Interrupts,
    /// What the guest set with Set Features, to be set again on a rebuilt controller.
    features: Vec<SubmissionEntry>,
    replay: Option<Replay>,
    /// The submission queue that fetching goes on with.
    next_queue: u16,
    /// The device side asked for a sign of life.
    pong: Option<u64>,
    batch: SubmitBatch,
    /// The commands whose data is arriving.
    landing: Vec<Tag>,
    /// Where data lands that the guest no longer wants.
    scratch: Arc<MmapRegion>,
    /// Where the next process finds what this one knows, if there is to be one.
    record: Option<Record>,
    /// Which life of the controller this is, for the record.
    era: u32,
    /// Something is set up in another way than the record has it.
    changed: bool,
}

impl ComputeHalf {
    /// A controller after power-on. `shadow_len` (bytes) and `tags` are what the claim
    /// granted; `vectors` is the number of MSI-X vectors.
    pub fn new(
        description: NvmeDescription,
        shadow_len: u32,
        tags: u16,
        vectors: u32,
    ) -> std::io::Result<Self> {
        Ok(Self {
            registers: Registers::new(description.cap, description.vs),
            life: Lifecycle::new(),
            memory: GuestMemory::default(),
            queues: Queues::new(),
            offers_shadow_doorbells: false,
            shadow_doorbells: None,
            tags: Tags::new(tags),
            shadow: ShadowAllocator::new(shadow_len),
            segments: Segments::new(shadow_len, description.max_transfer),
            shadow_len,
            interrupts: Interrupts::new(vectors),
            features: Vec::new(),
            replay: None,
            next_queue: 0,
            pong: None,
            batch: SubmitBatch::new(),
            landing: Vec::with_capacity(wire::MAX_ENTRIES.into()),
            scratch: shared_memory("farbus-scratch", description.max_transfer as usize)?,
            record: None,
            era: 0,
            changed: true,
            description,
        })
    }

    /// From now on the guest may keep its doorbells in its own memory: whoever runs this half
    /// calls [`Self::arm_doorbells`] before each sleep.
    pub fn offer_shadow_doorbells(&mut self) {
        self.offers_shadow_doorbells = true;
    }

    /// Reads BAR0; never waits. Doorbells and what the mirror does not hold read as 0.
    pub fn register_read(&self, offset: u64, data: &mut [u8]) {
        if offset < DOORBELL_BASE {
            self.registers.read(offset, data);
        } else {
            data.fill(0);
        }
    }

    /// Takes a write to BAR0. What it sets off is sent by the next [`Self::pump`].
    pub fn register_write(&mut self, offset: u64, data: &[u8]) {
        if offset >= DOORBELL_BASE {
            let index = (offset - DOORBELL_BASE) / 4;
            let queue = u16::try_from(index / 2);
            if let (Ok(queue), Ok(value), 0) = (queue, <[u8; 4]>::try_from(data), offset % 4) {
                self.doorbell(queue, index % 2 == 1, u32::from_le_bytes(value));
            }
            return;
        }
        self.changed = true;
        match self.registers.write(offset, data) {
            Change::None => {}
            Change::Enable => self.enable(),
            Change::Disable => self.disable(),
            Change::Configure => self.configure(),
        }
        self.commit();
    }

    /// A doorbell: values that the ring cannot have, and doorbells of queues that do not
    /// exist, are ignored (NVMe 1.4 §3.1.24 leaves them undefined).
    fn doorbell(&mut self, queue: u16, completion: bool, value: u32) {
        if self.life.phase != Phase::Ready {
            return;
        }
        // With a shadow doorbell it says that there is something to look at; its value may be
        // older than what was seen there already.
        let is_hint = queue > 0 && self.shadow_doorbells.is_some();
        if completion {
            let cq = self.queues.completion.get_mut(queue);
            let moved = !is_hint && cq.is_some_and(|cq| cq.ring.set_head(value));
            if let (true, Some(record)) = (moved, &self.record) {
                record.set_head(queue, value);
            }
            if is_hint || moved {
                self.post_held(queue);
                self.interrupts.signal();
            } else {
                debug!("ignored head {value} for completion queue {queue}");
            }
        } else if !is_hint {
            let sq = self.queues.submission.get_mut(queue);
            if sq.is_some_and(|sq| sq.ring.set_tail(value)) {
                if let Some(record) = &self.record {
                    record.set_tail(queue, value);
                }
            } else {
                debug!("ignored tail {value} for submission queue {queue}");
            }
        }
    }

    fn drop_commands(&mut self) {
        self.begin_era();
        self.queues.clear();
        self.shadow_doorbells = None;
        self.interrupts.forget_coalescing();
        self.replay = None;
        self.release(|state| matches!(state, State::Queued | State::Held { .. }));
        for (_, command) in self.tags.in_use() {
            command.state = State::Dropped;
        }
    }

    /// Frees all commands in certain states.
    fn release(&mut self, which: impl Fn(State) -> bool) {
        for tag in (0..self.tags.len()).map(Tag) {
            if let Some(command) = self.tags.get(tag) {
                if which(command.state) {
                    self.shadow.release(command.shadow);
                    self.tags.free(tag);
                }
            }
        }
    }

    /// What is held now; nothing, once every command has had its answer.
    pub fn outstanding(&self) -> Outstanding {
        Outstanding {
            commands: self.tags.in_use_count(),
            shadow_pages: self.shadow.used_pages(),
        }
    }

    /// Gives the guest's memory to the engine.
    pub fn map(&mut self, window: &DmaWindow) -> Result<(), FunctionError> {
        self.memory.map(window)
    }

    /// Takes guest memory back: nothing is fetched from it or lands in it any more. Returns the
    /// windows that went.
    pub fn unmap(&mut self, iova: Iova, len: u64) -> Result<Vec<DmaWindow>, FunctionError> {
        let gone = self.memory.unmap(iova, len)?;
        // Data that is arriving there is dropped from here on, and its command must say so.
        for tag in &self.landing {
            let Some(command) = self.tags.get_mut(*tag) else {
                continue;
            };
            let segments = self.segments.of(command.shadow, command.segments);
            let lost = |s: &Segment| !self.memory.covers(s.iova, s.len.into(), true);
            command.landing_failed |= segments.iter().any(lost);
        }
        Ok(gone)
    }

    /// The guest memory that is mapped.
    pub fn windows(&self) -> &[DmaWindow] {
        self.memory.windows()
    }

    /// See [`farbus_vfio::Function::set_interrupts`], for MSI-X.
    pub fn set_interrupts(
        &mut self,
        first: u32,
        events: &[Option<Arc<EventFd>>],
    ) -> Result<(), FunctionError> {
        self.interrupts.set(first, events)
    }

    /// See [`farbus_vfio::Function::mask_interrupt`], for MSI-X.
    pub fn mask_interrupt(&mut self, vector: u32, masked: bool) -> Result<(), FunctionError> {
        self.changed = true;
        let masked = self.interrupts.mask(vector, masked);
        self.commit();
        masked
    }

    /// When [`Self::pump`] must be called at the latest, because an interrupt is held back as
    /// the guest asked for.
    pub fn due(&self) -> Option<Instant> {
        self.interrupts.due()
    }

    /// Signals the interrupts that are due.
    pub fn signal_interrupts(&mut self) {
        self.interrupts.signal();
    }

    /// Sends all that waits: resets, register writes, then new commands while the link takes
    /// them.
    pub fn pump(&mut self, session: &mut Session) -> Result<(), FabricError> {
        self.batch.one_sided = session.is_one_sided();
        if let (Some(nonce), false) = (self.pong, session.is_congested()) {
            self.pong = None;
            session.send(&Message::Pong { nonce })?;
        }
        self.send_changes(session)?;
        if self.life.takes_commands() {
            if let Some(record) = &mut self.record {
                record.set_time();
            }
            self.look_at_doorbells();
            self.send_commands(session)?;
        }
        self.interrupts.signal();
        self.commit();
        if let Some(record) = &self.record {
            record.set_in_flight(self.tags.in_use_count());
        }
        Ok(())
    }

    /// Spans over `len` bytes of memory that nobody reads.
    fn discard(&self, len: u32, spans: &mut Vec<Span>) {
        spans.push(Span {
            memory: self.scratch.clone(),
            offset: 0,
            len: (len as usize).min(self.scratch.size()),
        });
    }
}
