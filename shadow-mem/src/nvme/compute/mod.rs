//! The compute half: the controller that the guest sees.
//!
//! It owns the registers and the guest's side of every queue. A command is fetched from the
//! guest once, checked, given a tag and sent; its completion comes back by tag, with the data
//! landing straight in guest memory. Registers are answered here, always at once. The half
//! survives its link: while there is none, commands wait as on a slow disk, and on a new
//! link the controller is rebuilt from what the guest had set up ([`replay`]).

mod admin;
mod complete;
mod interrupts;
mod queues;
mod registers;
mod replay;
mod submit;
mod tags;

pub use replay::Changed;

use std::sync::Arc;

use farbus_fabric::wire::{Data, Message, RequestId, Tag};
use farbus_fabric::{FabricError, Span};
use farbus_vfio::nvme::{DOORBELL_BASE, SubmissionEntry, csts, reg};
use farbus_vfio::{DmaWindow, FunctionError, Iova, RegionIndex};
use log::{debug, warn};
use vm_memory::MmapRegion;
use vmm_sys_util::eventfd::EventFd;

use self::interrupts::Interrupts;
use self::queues::{CompletionQueue, Queues, SubmissionQueue};
use self::registers::{Change, Registers};
use self::replay::Replay;
use self::tags::{State, Tags};
use super::description::NvmeDescription;
use crate::guest::GuestMemory;
use crate::session::{Session, SubmitBatch};
use crate::shadow::{ShadowAllocator, shared_memory};

/// Where the guest's controller is in its life (NVMe 1.4 §7.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Not enabled.
    Disabled,
    /// Enabled by the guest; the device is not ready yet.
    Enabling,
    /// Takes commands.
    Ready,
    /// Disabled by the guest; the device has not stopped yet.
    Disabling,
    /// Failed; the guest must disable it.
    Fatal,
}

/// Control messages that wait to be sent, in this order. Each is a state to reach, so a guest
/// that repeats itself adds nothing.
#[derive(Default)]
struct Outbox {
    reset: bool,
    disable: bool,
    configure: bool,
}

/// One guest's controller. See the module's own description.
pub struct ComputeHalf {
    description: NvmeDescription,
    registers: Registers,
    phase: Phase,
    memory: GuestMemory,
    queues: Queues,
    tags: Tags,
    shadow: ShadowAllocator,
    shadow_len: u32,
    interrupts: Interrupts,
    outbox: Outbox,
    /// The last function reset that was sent, and whether it is still to be acknowledged.
    reset_request: RequestId,
    reset_pending: bool,
    /// What the guest set with Set Features, to be set again on a rebuilt controller.
    features: Vec<SubmissionEntry>,
    replay: Option<Replay>,
    /// The submission queue that fetching goes on with.
    next_queue: u16,
    batch: SubmitBatch,
    /// Where data lands that the guest no longer wants.
    scratch: Arc<MmapRegion>,
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
            phase: Phase::Disabled,
            memory: GuestMemory::default(),
            queues: Queues::new(),
            tags: Tags::new(tags),
            shadow: ShadowAllocator::new(shadow_len),
            shadow_len,
            interrupts: Interrupts::new(vectors),
            outbox: Outbox::default(),
            reset_request: RequestId(0),
            reset_pending: false,
            features: Vec::new(),
            replay: None,
            next_queue: 0,
            batch: SubmitBatch::new(),
            scratch: shared_memory("farbus-scratch", description.max_transfer as usize)?,
            description,
        })
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
            if let (Ok(value), 0) = (<[u8; 4]>::try_from(data), offset % 4) {
                let index = (offset - DOORBELL_BASE) / 4;
                self.doorbell(
                    (index / 2) as u16,
                    index % 2 == 1,
                    u32::from_le_bytes(value),
                );
            }
            return;
        }
        match self.registers.write(offset, data) {
            Change::None => {}
            Change::Enable => self.enable(),
            Change::Disable => self.disable(),
            Change::Configure => self.outbox.configure = true,
        }
    }

    /// A doorbell: values that the ring cannot have, and doorbells of queues that do not
    /// exist, are ignored (NVMe 1.4 §3.1.24 leaves them undefined).
    fn doorbell(&mut self, queue: u16, completion: bool, value: u32) {
        if self.phase != Phase::Ready {
            return;
        }
        if completion {
            let valid = self
                .queues
                .cq(queue)
                .is_some_and(|cq| cq.ring.set_head(value));
            if valid {
                self.post_held(queue);
                self.interrupts.signal();
            } else {
                debug!("ignored head {value} for completion queue {queue}");
            }
        } else if !self
            .queues
            .sq(queue)
            .is_some_and(|sq| sq.ring.set_tail(value))
        {
            debug!("ignored tail {value} for submission queue {queue}");
        }
    }

    fn enable(&mut self) {
        let queues = self.registers.admin_queues();
        let [(asq, asq_size), (acq, acq_size)] = match queues {
            Some(queues) if self.registers.is_configuration_supported() => queues,
            _ => return self.fail("the guest enabled the controller with an invalid CC or AQA"),
        };
        self.queues.clear();
        self.features.clear();
        self.queues.submission[0] = Some(SubmissionQueue::new(asq, asq_size, 0));
        self.queues.completion[0] = Some(CompletionQueue::new(acq, acq_size, Some(0)));
        self.phase = Phase::Enabling;
        self.outbox.configure = true;
    }

    /// The guest resets the controller. Its queues are gone at once; that the device has
    /// stopped, and so that the guest may reuse its memory, CSTS says later.
    fn disable(&mut self) {
        self.registers.controller_reset();
        self.drop_commands();
        self.registers.csts &= !csts::CFS;
        self.phase = Phase::Disabling;
        self.outbox.disable = true;
        self.outbox.configure = false;
    }

    /// A function level reset, or a new VMM: back to the state after power-on, at once. The
    /// device follows; what it still sends until then is dropped.
    pub fn reset(&mut self) {
        self.drop_commands();
        self.interrupts.reset();
        self.registers.reset();
        self.phase = Phase::Disabled;
        self.outbox = Outbox {
            reset: true,
            ..Outbox::default()
        };
    }

    fn drop_commands(&mut self) {
        self.queues.clear();
        self.replay = None;
        let mut at_device = 0;
        for (_, command) in self.tags.in_use() {
            if matches!(command.state, State::Sent) {
                command.state = State::Dropped;
                at_device += 1;
            } else if command.state != State::Dropped {
                command.state = State::Queued;
            }
        }
        self.release_all(State::Queued);
        debug!("dropped {at_device} commands that are at the device");
    }

    /// Frees all commands in `state`.
    fn release_all(&mut self, state: State) {
        for tag in (0..self.tags.len()).map(Tag) {
            if let Some(command) = self.tags.get(tag) {
                if command.state == state {
                    self.shadow.release(command.shadow);
                    self.tags.free(tag);
                }
            }
        }
    }

    /// The controller cannot go on: the guest sees CSTS.CFS, and resets it.
    fn fail(&mut self, why: &str) {
        if self.phase != Phase::Fatal {
            warn!("controller failed: {why}");
            self.phase = Phase::Fatal;
            self.registers.set_fatal();
        }
    }

    /// The device's registers have changed.
    fn register_update(&mut self, region: RegionIndex, offset: u64, data: &[u8]) {
        let (RegionIndex::BAR0, reg::CSTS, Ok(value)) = (region, offset, data.try_into()) else {
            return;
        };
        // Of before the reset that is on its way.
        if self.reset_pending {
            return;
        }
        let value = u32::from_le_bytes(value);
        if value & csts::CFS != 0 && self.phase != Phase::Disabled {
            return self.fail("the device reports a fatal status");
        }
        let ready = value & csts::RDY != 0;
        if !ready {
            self.release_all(State::Dropped);
        }
        match (self.phase, ready) {
            (Phase::Enabling, true) => self.phase = Phase::Ready,
            (Phase::Disabling, false) => self.phase = Phase::Disabled,
            (Phase::Ready, _) if self.replay.is_some() => {
                // Rebuilt behind a guest that is to notice nothing.
                if let (Some(replay), true) = (&mut self.replay, ready) {
                    replay.controller_is_ready();
                }
                return;
            }
            (Phase::Ready, false) => return self.fail("the device left the ready state"),
            (Phase::Ready, true) | (Phase::Enabling, false) => {}
            // Of a state that the guest has left already.
            (Phase::Disabled | Phase::Fatal, _) | (Phase::Disabling, true) => return,
        }
        self.registers.csts = value & (csts::RDY | csts::SHST_MASK);
    }

    /// Gives the guest's memory to the engine.
    pub fn map(&mut self, window: &DmaWindow) -> Result<(), FunctionError> {
        self.memory.map(window)
    }

    /// Takes guest memory back: when this returns, nothing of it is read or written. Returns
    /// the windows that went.
    pub fn unmap(&mut self, iova: Iova, len: u64) -> Result<Vec<DmaWindow>, FunctionError> {
        self.memory.unmap(iova, len)
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
        self.interrupts.mask(vector, masked)
    }

    /// Sends all that waits: resets, register writes, then new commands while the link takes
    /// them.
    pub fn pump(&mut self, session: &mut Session) -> Result<(), FabricError> {
        self.send_outbox(session)?;
        if self.phase == Phase::Ready && !self.reset_pending {
            self.send_commands(session)?;
        }
        self.interrupts.signal();
        Ok(())
    }

    fn send_outbox(&mut self, session: &mut Session) -> Result<(), FabricError> {
        if std::mem::take(&mut self.outbox.reset) {
            self.reset_request.0 = self.reset_request.0.wrapping_add(1);
            self.reset_pending = true;
            session.send(&Message::Reset {
                request: self.reset_request,
            })?;
        }
        if std::mem::take(&mut self.outbox.disable) {
            let cc = self.registers.cc & !farbus_vfio::nvme::cc::EN;
            self.send_cc(session, cc)?;
        }
        if std::mem::take(&mut self.outbox.configure) {
            self.send_cc(session, self.registers.cc)?;
        }
        Ok(())
    }

    fn send_cc(&self, session: &mut Session, cc: u32) -> Result<(), FabricError> {
        session.send(&Message::RegisterWrite {
            region: RegionIndex::BAR0.0,
            offset: reg::CC,
            data: Data::new(&cc.to_le_bytes())?,
        })
    }

    fn reset_done(&mut self, request: RequestId) {
        if request == self.reset_request {
            self.reset_pending = false;
            self.release_all(State::Dropped);
        }
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
