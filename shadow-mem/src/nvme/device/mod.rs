//! The device half: drives the real controller for one claim.
//!
//! What the peer sends is not trusted: every command is checked against the same table that
//! the compute half uses, and the device only ever gets addresses of the buffer shadow and of
//! the `arena`. A message is acted on where it is received: from the link's receive to the
//! device's doorbell there is no queue and no other thread.

mod arena;
mod complete;
mod controller;
mod error;
mod hold;
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
use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_fabric::wire::{
    Data, FaultCode, Header, Kind, Message, RateLimits, RequestId, Submit, Text, WireError,
};
use farbus_fabric::{FabricError, Sink, Span};
use farbus_vfio::nvme::{DOORBELL_BASE, reg};
use farbus_vfio::{DmaWindow, Function, FunctionError, Notice, RegionIndex};
use log::{debug, warn};
use vmm_sys_util::eventfd::EventFd;

use self::controller::Controller;
pub use self::error::DeviceError;
pub use self::identity::Identity;
pub use self::lane::{Lane, Round};
use self::lanes::Lanes;
use self::queues::Io;
pub use self::settings::Settings;
use super::description::NvmeDescription;
use crate::session::Session;

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
    /// from now on have no interrupts.
    pub fn look_at_queues(&mut self) {
        self.is_looked_at = true;
    }

    /// Whether what I/O queues complete is found without interrupts, which would only get in the way.
    fn finds_completions(&self) -> bool {
        // Another thread does not look where this one has written a doorbell.
        self.is_looked_at || self.lanes.is_empty() && self.function.completes_at_once()
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

/// The code for a function that refused.
fn fault_of(error: &FunctionError) -> FaultCode {
    match error {
        FunctionError::Gone(_) => FaultCode::Gone,
        _ => FaultCode::Internal,
    }
}
