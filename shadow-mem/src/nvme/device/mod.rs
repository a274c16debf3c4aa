//! The device half: drives the real controller for one claim.
//!
//! What the peer sends is not trusted: every command is checked against the same table that
//! the compute half uses, and the device only ever gets addresses of the buffer shadow and of
//! the `arena`. A message is acted on where it is received: from the link's receive to the
//! device's doorbell there is no queue and no other thread.

mod arena;
mod complete;
mod controller;
mod host_memory;
mod identity;
mod lane;
mod lanes;
mod probe;
mod queues;
mod rate;
mod segments;
mod settings;
mod submit;
mod tags;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_fabric::wire::{
    Data, FaultCode, Header, Kind, Message, RateLimits, RequestId, Submit, Text, WireError,
};
use farbus_fabric::{FabricError, Sink, Span};
use farbus_vfio::nvme::{DOORBELL_BASE, PCI_CLASS, reg};
use farbus_vfio::{
    DmaAccess, DmaWindow, Function, FunctionError, FunctionInfo, InterruptKind, Iova, Notice,
    PciAddress, RegionIndex,
};
use log::{debug, warn};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::arena::Arena;
use self::controller::Controller;
pub use self::identity::Identity;
pub use self::lane::{Lane, Round};
use self::lanes::Lanes;
use self::queues::Io;
pub use self::settings::Settings;
use super::description::{MAX_QUEUE_PAIRS, NvmeDescription};
use crate::session::Session;
use crate::shadow::shared_memory;

/// Pieces of memory that one message takes data from, or brings it to.
const MAX_SPANS: usize = 1024;
/// Answers that wait for the network before nothing more is received.
const MAX_OUTBOX: usize = 64;

/// What a claim gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Size of the buffer shadow in bytes.
    pub shadow_len: u32,
    /// Commands that may be outstanding.
    pub tags: u16,
    /// Largest transfer of one command in bytes, a power of two of pages.
    pub max_transfer: u32,
}

impl Default for Limits {
    /// 16 MiB, 1024 commands, 1 MiB.
    fn default() -> Self {
        Self {
            shadow_len: 16 << 20,
            tags: 1024,
            max_transfer: 1 << 20,
        }
    }
}

/// Why a device half cannot serve a function.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The function refused.
    #[error(transparent)]
    Function(#[from] FunctionError),
    /// Memory could not be had.
    #[error("memory for the buffer shadow and the queues could not be had")]
    Memory(#[source] io::Error),
    /// The function is of another device class: its registers mean something else.
    #[error(
        "no engine carries devices of class {class:06x}; there is one for NVMe ({PCI_CLASS:06x})"
    )]
    NoEngine {
        /// Class, subclass and programming interface.
        class: u32,
    },
    /// The function has no interrupts that a server can wait for.
    #[error("the function has neither MSI-X nor MSI interrupts")]
    NoInterrupts,
    /// No IOVA range of the function has room.
    #[error("the function's IOVA ranges have no room for {len:#x} bytes")]
    NoIova {
        /// How many bytes were to be mapped.
        len: u64,
    },
    /// Nothing of the function answers.
    #[error(
        "the function does not answer: its {what}; it has lost its power or its link without the \
         kernel's knowledge, or its firmware hangs{}", remedy(*.address)
    )]
    NoAnswer {
        /// What shows it, as a clause.
        what: &'static str,
        /// Where it sits, if it is a PCI function of this host.
        address: Option<PciAddress>,
    },
    /// The controller did not do what the specification says.
    #[error("the controller {0}")]
    Controller(String),
}

/// One claim's hold on an NVMe function. Dropping it resets the function and takes its memory
/// away.
pub struct DeviceHalf {
    function: Arc<dyn Function>,
    description: NvmeDescription,
    settings: Settings,
    identity: Identity,
    io: Io,
    lanes: Lanes,
    host_memory: Option<DmaWindow>,
    limits: Limits,
    controller: Controller,
    vectors: u32,
    event: Arc<EventFd>,
    /// See [`Self::look_at_queues`].
    is_looked_at: bool,
    /// Why the function cannot be used any more, once it is known to be gone.
    gone: Option<String>,
    /// Answers and updates to be sent: see [`Self::is_backlogged`].
    outbox: VecDeque<Message>,
}

impl DeviceHalf {
    /// Takes hold of a function: resets it, gives it the claim's fresh memory, and asks it
    /// what it is.
    pub fn open(function: Arc<dyn Function>, limits: Limits) -> Result<Self, DeviceError> {
        Self::open_as(function, limits, None)
    }

    /// As [`Self::open`], of a function that had [`Self::settings`] before its first tenant:
    /// it has them again.
    pub fn open_as(
        function: Arc<dyn Function>,
        limits: Limits,
        settings: Option<&Settings>,
    ) -> Result<Self, DeviceError> {
        check_class(function.as_ref())?;
        let info = function.info();
        if info.resettable {
            function.reset()?;
        }
        let (kind, vectors) = match info.interrupts {
            counts if counts.msix > 0 => (InterruptKind::Msix, counts.msix),
            counts if counts.msi > 0 => (InterruptKind::Msi, counts.msi),
            _ => return Err(DeviceError::NoInterrupts),
        };
        let shadow_len = limits.shadow_len as usize;
        let arena_len = Arena::len_for(MAX_QUEUE_PAIRS, limits.tags);
        let base = find_iova(info, Iova(0), (shadow_len + arena_len) as u64)?;
        let memory = shared_memory("farbus-shadow", shadow_len).map_err(DeviceError::Memory)?;
        let shadow = DmaWindow {
            iova: base,
            memory,
            offset: 0,
            len: shadow_len,
            access: DmaAccess::ReadWrite,
        };
        let arena_base = Iova(base.0 + shadow_len as u64);
        let arena =
            Arena::new(arena_base, MAX_QUEUE_PAIRS, limits.tags).map_err(DeviceError::Memory)?;
        let event = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(DeviceError::Memory)?);
        let events = vec![Some(event.clone()); vectors as usize];
        let controller = Controller::new(function.clone())?;
        let mut half = Self {
            io: Io::new(controller.doorbells(), Arc::new(arena), shadow, &limits),
            lanes: Lanes::none(event.clone()),
            controller,
            description: NvmeDescription {
                cap: 0,
                vs: 0,
                max_transfer: limits.max_transfer,
                queue_pairs: 1,
                namespaces: super::description::Namespaces::default(),
            },
            settings: Settings::default(),
            identity: Identity::default(),
            host_memory: None,
            limits,
            vectors,
            event,
            is_looked_at: false,
            gone: None,
            outbox: VecDeque::with_capacity(2 * MAX_OUTBOX),
            function,
        };
        half.function.map_dma(&half.io.shadow)?;
        half.function.map_dma(&half.io.arena.window())?;
        half.function.set_interrupts(kind, 0, &events)?;
        half.probe(settings)?;
        Ok(half)
    }

    /// What was set in the controller before its first tenant.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Holds the claim to limits from now on.
    pub fn limit(&mut self, limits: RateLimits) {
        self.io.rate.limit(limits, Instant::now());
    }

    /// When [`Self::pump`] is to be called at the latest, for commands that wait for the claim's
    /// limits.
    pub fn due(&self) -> Option<Instant> {
        // A controller that is off gets nothing.
        self.io.rate.due().filter(|_| self.controller.is_on())
    }

    /// Commands that were given to the device so far.
    pub fn commands(&self) -> u64 {
        self.io.commands + self.lanes.commands()
    }

    /// Which drive it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The controller as the guest will see it.
    pub fn description(&self) -> &NvmeDescription {
        &self.description
    }

    /// The caller never sleeps, but calls [`Self::pump`] all the time: I/O queues that are made
    /// from now on have no interrupts, which would only get in its way.
    pub fn look_at_queues(&mut self) {
        self.is_looked_at = true;
    }

    /// The buffer shadow, as the device sees it.
    pub fn shadow(&self) -> &DmaWindow {
        &self.io.shadow
    }

    /// Is signalled with the device's interrupts; [`Self::pump`] then. Nobody needs to read it
    /// who takes each signal for an event (edge-triggered).
    pub fn interrupt(&self) -> &EventFd {
        &self.event
    }

    /// What the function or its host may say, and the eventfds that tell of it. The claim's
    /// owner listens, and calls [`Self::fail`].
    pub fn notices(&self) -> Vec<(Notice, &EventFd)> {
        self.function.notices()
    }

    /// The function has failed: the guest sees a fatal status. It gets no further command to
    /// the device before a reset.
    pub fn fail(&mut self, code: FaultCode, text: &str) {
        let update = self.controller.fail(code, text.to_owned());
        self.report(update);
    }

    /// Why the function cannot be used any more, once it is known to be gone. The claim can
    /// only be ended then.
    pub fn gone(&self) -> Option<&str> {
        self.gone.as_deref()
    }

    /// Sends answers, updates, what the device has completed, and whatever else waited for the
    /// network.
    pub fn pump(&mut self, session: &mut Session) -> Result<(), FabricError> {
        if !self.lanes.is_empty() {
            self.hear_lanes()?;
        }
        self.send_outbox(session)?;
        if self.controller.is_on() {
            self.io.release();
            self.report_failure();
        }
        self.function.service();
        self.send_completions(session)?;
        // The device may have turned out to be gone meanwhile.
        self.send_outbox(session)
    }

    fn send_outbox(&mut self, session: &mut Session) -> Result<(), FabricError> {
        while let Some(message) = self.outbox.front() {
            if session.is_congested() {
                return Ok(());
            }
            session.send(message)?;
            self.outbox.pop_front();
        }
        Ok(())
    }

    /// Whether so many answers wait for the network that no more questions must be received.
    pub fn is_backlogged(&self) -> bool {
        self.outbox.len() >= MAX_OUTBOX
    }

    /// Looks after a controller that changes its state, and notices one that has failed.
    pub fn tick(&mut self) {
        let update = self.settle_controller();
        self.report(update);
    }

    /// How long after one [`Self::tick`] the next one is due.
    pub fn next_tick(&self) -> Duration {
        self.controller.next_tick()
    }

    fn report(&mut self, update: controller::Update) {
        match update {
            controller::Update::None => {}
            controller::Update::Started => {
                self.lend_host_memory();
                self.tell_lanes(true);
                self.push_status();
            }
            controller::Update::Stopped => {
                self.forget_commands();
                self.push_status();
            }
            controller::Update::Status => self.push_status(),
            controller::Update::Failed { code, text } => {
                warn!("{}: {text}", self.function.info().label);
                self.halt_lanes();
                if code == FaultCode::Gone {
                    self.gone = Some(text.clone());
                }
                self.outbox.push_back(Message::Fault {
                    code,
                    text: Text::truncated(&text),
                });
            }
        }
    }

    fn push_status(&mut self) {
        let status = self.controller.status().to_le_bytes();
        if let Ok(data) = Data::new(&status) {
            self.outbox.push_back(Message::RegisterUpdate {
                region: RegionIndex::BAR0.0,
                offset: reg::CSTS,
                data,
            });
        }
    }

    /// The controller has stopped: nothing is at the device any more.
    fn forget_commands(&mut self) {
        self.io.forget_commands();
        self.tell_lanes(false);
    }

    fn register_write(&mut self, region: u8, offset: u64, data: &[u8]) {
        let (RegionIndex::BAR0, reg::CC, Ok(value)) =
            (RegionIndex(region), offset, <[u8; 4]>::try_from(data))
        else {
            // All other registers of the device belong to this half.
            debug!("ignored a write to {} at {offset:#x}", RegionIndex(region));
            return;
        };
        let update = self.configure(u32::from_le_bytes(value));
        self.report(update);
    }

    fn register_read(&mut self, request: RequestId, region: u8, offset: u64, len: u8) {
        let mut value = [0; 8];
        let value = &mut value[..usize::from(len.min(8))];
        let allowed = region == RegionIndex::BAR0.0 && offset < DOORBELL_BASE;
        let ok = allowed
            && self
                .function
                .region_read(RegionIndex(region), offset, value)
                .is_ok();
        self.answer(request, ok, value);
    }

    fn config_read(&mut self, request: RequestId, offset: u16, len: u16) {
        let mut value = [0; Data::MAX];
        let value = &mut value[..usize::from(len).min(Data::MAX)];
        let ok = self.function.config_read(offset, value).is_ok();
        self.answer(request, ok, value);
    }

    fn answer(&mut self, request: RequestId, ok: bool, value: &[u8]) {
        if let Ok(data) = Data::new(if ok { value } else { &[] }) {
            self.outbox.push_back(Message::Value {
                request,
                status: u16::from(!ok),
                data,
            });
        }
    }

    fn reset(&mut self, request: RequestId) {
        let outcome = self.reset_function();
        if let Err(error) = &outcome {
            warn!("{}: reset failed: {error}", self.function.info().label);
        }
        self.outbox.push_back(Message::ResetDone {
            request,
            outcome: outcome.map_err(|error| Text::truncated(&error.to_string())),
        });
    }
}

impl Sink for DeviceHalf {
    fn land(
        &mut self,
        header: &Header,
        control: &[u8],
        spans: &mut Vec<Span>,
    ) -> Result<(), FabricError> {
        for entry in Submit::decode(header, control)?.entries() {
            self.io.landing(&entry.placement, spans)?;
        }
        Ok(())
    }

    fn deliver(&mut self, header: &Header, control: &[u8]) -> Result<(), FabricError> {
        if header.kind == Kind::Submit {
            return self.submit(Submit::decode(header, control)?);
        }
        match Message::decode(header, control)? {
            Message::RegisterWrite {
                region,
                offset,
                data,
            } => self.register_write(region, offset, &data),
            Message::RegisterRead {
                request,
                region,
                offset,
                len,
            } => self.register_read(request, region, offset, len),
            Message::ConfigRead {
                request,
                offset,
                len,
            } => self.config_read(request, offset, len),
            // The function's configuration belongs to the device server.
            Message::ConfigWrite { offset, .. } => {
                debug!("ignored a write to configuration space at {offset:#x}");
            }
            Message::Reset { request } => self.reset(request),
            Message::Ping { nonce } => self.outbox.push_back(Message::Pong { nonce }),
            Message::Pong { .. } => {}
            Message::Release => return Err(FabricError::Closed),
            other => {
                return Err(FabricError::Malformed(WireError::WrongPhase {
                    kind: other.kind(),
                    epoch: header.epoch,
                }));
            }
        }
        Ok(())
    }
}

impl Drop for DeviceHalf {
    /// The order matters: a function that is reset does no more DMA, so its memory can go.
    fn drop(&mut self) {
        self.close_lanes();
        let label = &self.function.info().label;
        if let Err(error) = self.controller.stop_now() {
            warn!("{label}: could not be disabled: {error}");
        }
        if self.function.info().resettable {
            if let Err(error) = self.function.reset() {
                warn!("{label}: could not be reset: {error}");
            }
        }
        let silent = vec![None; self.vectors as usize];
        for kind in [InterruptKind::Msix, InterruptKind::Msi] {
            if self.function.info().interrupts.of(kind) > 0 {
                let _ = self.function.set_interrupts(kind, 0, &silent);
                break;
            }
        }
        let arena = self.io.arena.window();
        for window in [&self.io.shadow, &arena]
            .into_iter()
            .chain(&self.host_memory)
        {
            if let Err(error) = self.function.unmap_dma(window.iova, window.len as u64) {
                warn!("{label}: could not take memory back: {error}");
            }
        }
    }
}

/// How a function of this host that does not answer is brought back: the kernel has to set up
/// its registers anew, and does that only for a function that it has just found.
fn remedy(address: Option<PciAddress>) -> String {
    let Some(address) = address else {
        return String::new();
    };
    format!(
        "; once it has power, `echo 1 >/sys/bus/pci/devices/{address}/remove` and then \
         `echo 1 >/sys/bus/pci/rescan` bring it back (docs/runbooks/device-failed.md)"
    )
}

/// Looks before anything is written whether this is an NVMe controller (PCI 3.0 §6.2.1: class
/// code at offset 9).
fn check_class(function: &dyn Function) -> Result<(), DeviceError> {
    let mut code = [0; 4];
    function.config_read(0x08, &mut code)?;
    match u32::from_le_bytes(code) >> 8 {
        PCI_CLASS => Ok(()),
        // The ids may be the kernel's, who answers for them; revision and class are not.
        0xff_ffff => Err(DeviceError::NoAnswer {
            what: "configuration space reads as all ones",
            address: function.pci_address(),
        }),
        class => Err(DeviceError::NoEngine { class }),
    }
}

/// A place for `len` bytes in the function's address space at `from` or behind, away from
/// address 0.
fn find_iova(info: &FunctionInfo, from: Iova, len: u64) -> Result<Iova, DeviceError> {
    const ALIGN: u64 = 2 << 20;
    let from = from.0.max(ALIGN);
    info.iova_ranges
        .iter()
        .find_map(|range| {
            let base = range.start().max(&from).checked_next_multiple_of(ALIGN)?;
            let end = base.checked_add(len - 1)?;
            (end <= *range.end()).then_some(Iova(base))
        })
        .ok_or(DeviceError::NoIova { len })
}

/// The code for a function that refused.
fn fault_of(error: &FunctionError) -> FaultCode {
    match error {
        FunctionError::Gone(_) => FaultCode::Gone,
        _ => FaultCode::Internal,
    }
}
