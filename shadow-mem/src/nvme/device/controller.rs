//! The real controller's registers and its life: enabling, disabling and shutting down take
//! time, so each is begun here and watched by [`Controller::tick`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_fabric::wire::FaultCode;
use farbus_vfio::nvme::{cap, cc, csts, reg};
use farbus_vfio::{Function, FunctionError, Iova, RegionIndex};

use log::warn;

use super::super::description::ADMIN_QUEUE_ENTRIES;
use super::super::ring::CompletionCursor;
use super::queues::{Doorbells, SubmissionQueue};
use super::{DeviceHalf, fault_of};

/// How often a change of state is looked for: CSTS has no interrupt (NVMe 1.4 §3.1.6).
const POLL: Duration = Duration::from_millis(1);
/// How often a running controller's health is looked at.
const HEALTH: Duration = Duration::from_millis(500);
/// PCI command register: memory space and bus master (PCI 3.0 §6.2.2).
const COMMAND: u16 = 0x04;
const COMMAND_ON: u16 = 0b110;
/// Revision and class code (PCI 3.0 §6.2.1).
const REVISION: u16 = 0x08;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Off,
    Starting {
        until: Instant,
    },
    On,
    /// With the configuration to start again with, if that was asked for meanwhile.
    Stopping {
        until: Instant,
        then: Option<u32>,
    },
    Failed,
}

/// What the peer must hear of.
pub(super) enum Update {
    None,
    /// The controller is ready.
    Started,
    /// The controller has stopped.
    Stopped,
    /// Its status has changed in another way.
    Status,
    Failed {
        code: FaultCode,
        text: String,
    },
}

/// See the module's own description.
pub(super) struct Controller {
    function: Arc<dyn Function>,
    state: State,
    /// Bytes between two doorbells.
    stride: u64,
    /// How long enabling or disabling may take: CAP.TO.
    timeout: Duration,
    pub(super) cap: u64,
    shutting_down: bool,
    last_status: u32,
}

impl Controller {
    pub(super) fn new(function: Arc<dyn Function>) -> Result<Self, FunctionError> {
        let mut controller = Self {
            function,
            state: State::Off,
            stride: 4,
            timeout: Duration::from_secs(1),
            cap: 0,
            shutting_down: false,
            last_status: 0,
        };
        controller.power_on()?;
        let cap = controller.read64(reg::CAP)?;
        controller.cap = cap;
        controller.stride = 4 << ((cap & cap::DSTRD_MASK) >> cap::DSTRD_SHIFT);
        if controller.read32(reg::CC)? & cc::EN != 0 {
            controller.state = State::On;
        }
        let units = (cap >> cap::TO_SHIFT & 0xff).max(2) as u32;
        controller.timeout = Duration::from_millis(500) * units;
        Ok(controller)
    }

    /// Lets the function decode its BARs and master the bus; a reset takes that away.
    fn power_on(&self) -> Result<(), FunctionError> {
        let mut command = [0; 2];
        self.function.config_read(COMMAND, &mut command)?;
        let command = u16::from_le_bytes(command) | COMMAND_ON;
        self.function.config_write(COMMAND, &command.to_le_bytes())
    }

    /// Whether even configuration space is no longer there: registers of a device that was
    /// pulled out may read as anything. The ids may be the host's; revision and class are not.
    fn is_absent(&self) -> bool {
        let mut class = [0; 4];
        self.function.config_read(REVISION, &mut class).is_ok() && class == [0xff; 4]
    }

    fn read32(&self, offset: u64) -> Result<u32, FunctionError> {
        let mut value = [0; 4];
        self.function
            .region_read(RegionIndex::BAR0, offset, &mut value)?;
        Ok(u32::from_le_bytes(value))
    }

    /// As two dwords: not every device takes 64-bit accesses.
    fn read64(&self, offset: u64) -> Result<u64, FunctionError> {
        Ok(u64::from(self.read32(offset)?) | u64::from(self.read32(offset + 4)?) << 32)
    }

    fn write32(&self, offset: u64, value: u32) -> Result<(), FunctionError> {
        self.function
            .region_write(RegionIndex::BAR0, offset, &value.to_le_bytes())
    }

    fn write64(&self, offset: u64, value: u64) -> Result<(), FunctionError> {
        self.write32(offset, value as u32)?;
        self.write32(offset + 4, (value >> 32) as u32)
    }

    pub(super) fn version(&self) -> Result<u32, FunctionError> {
        self.read32(reg::VS)
    }

    pub(super) fn doorbells(&self) -> Doorbells {
        Doorbells {
            function: self.function.clone(),
            stride: self.stride,
        }
    }

    pub(super) fn is_on(&self) -> bool {
        self.state == State::On
    }

    pub(super) fn is_off(&self) -> bool {
        self.state == State::Off
    }

    /// CSTS as last read.
    pub(super) fn status(&self) -> u32 {
        self.last_status
    }

    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Enables the controller with the admin queues at these addresses.
    fn start(&mut self, cc: u32, asq: Iova, acq: Iova) -> Result<(), FunctionError> {
        self.power_on()?;
        let entries = ADMIN_QUEUE_ENTRIES - 1;
        self.write32(reg::AQA, entries | entries << 16)?;
        self.write64(reg::ASQ, asq.0)?;
        self.write64(reg::ACQ, acq.0)?;
        self.write32(reg::CC, cc)?;
        self.shutting_down = false;
        self.state = State::Starting {
            until: Instant::now() + self.timeout,
        };
        Ok(())
    }

    /// The function was reset.
    pub(super) fn was_reset(&mut self) {
        self.state = State::Off;
        self.shutting_down = false;
        self.last_status = 0;
    }

    /// Disables the controller without waiting.
    pub(super) fn stop_now(&mut self) -> Result<(), FunctionError> {
        match std::mem::replace(&mut self.state, State::Off) {
            State::Off | State::Failed => Ok(()),
            _ => self.write32(reg::CC, 0),
        }
    }

    pub(super) fn fail(&mut self, code: FaultCode, text: String) -> Update {
        self.state = State::Failed;
        Update::Failed { code, text }
    }

    pub(super) fn failed(&mut self, error: &FunctionError) -> Update {
        self.fail(fault_of(error), error.to_string())
    }

    pub(super) fn next_tick(&self) -> Duration {
        match self.state {
            State::Starting { .. } | State::Stopping { .. } => POLL,
            State::On if self.shutting_down => POLL,
            State::On => HEALTH,
            State::Off | State::Failed => Duration::from_secs(3600),
        }
    }

    pub(super) fn tick(&mut self, now: Instant) -> Update {
        if matches!(self.state, State::Off | State::Failed) {
            return Update::None;
        }
        let status = match self.read32(reg::CSTS) {
            Ok(u32::MAX) => {
                return self.fail(
                    FaultCode::Gone,
                    "the controller's registers read as all ones: it is no longer there".into(),
                );
            }
            Ok(status) => status,
            Err(error) => return self.failed(&error),
        };
        let before = std::mem::replace(&mut self.last_status, status);
        let ready = status & csts::RDY != 0;
        match self.state {
            State::Starting { .. } if ready => {
                self.state = State::On;
                Update::Started
            }
            State::Stopping { .. } if !ready => {
                self.state = State::Off;
                Update::Stopped
            }
            // Stopping is the remedy for a fatal status, which stays until it has worked.
            State::Starting { .. } if status & csts::CFS != 0 => {
                let text = format!("the controller failed to start (CSTS {status:#x})");
                self.fail(FaultCode::Fatal, text)
            }
            State::Starting { until } | State::Stopping { until, .. } if now > until => {
                let text = format!(
                    "the controller did not change its ready state within {} ms (CSTS {status:#x})",
                    self.timeout.as_millis()
                );
                self.fail(FaultCode::Unresponsive, text)
            }
            State::On if !ready && self.is_absent() => self.fail(
                FaultCode::Gone,
                "the function's configuration space reads as all ones: it is no longer there"
                    .into(),
            ),
            State::On if !ready => {
                let text = format!("the controller is no longer ready (CSTS {status:#x})");
                self.fail(FaultCode::Fatal, text)
            }
            State::On => {
                if self.shutting_down && status & csts::SHST_MASK == csts::SHST_COMPLETE {
                    self.shutting_down = false;
                }
                if status == before {
                    Update::None
                } else {
                    Update::Status
                }
            }
            _ => Update::None,
        }
    }
}

impl DeviceHalf {
    /// Acts on the guest's CC. Page size, command set and entry sizes are this half's own;
    /// enable, arbitration and shutdown are the guest's.
    pub(super) fn configure(&mut self, guest: u32) -> Update {
        const ARBITRATION_MASK: u32 = 7 << 11;
        const ENTRY_SIZES: u32 = 6 << cc::IOSQES_SHIFT | 4 << cc::IOCQES_SHIFT;
        let wanted = ENTRY_SIZES | guest & (cc::EN | cc::SHN_MASK | ARBITRATION_MASK);
        let enable = guest & cc::EN != 0;
        let timeout = self.controller.timeout;
        let outcome = match (self.controller.state, enable) {
            (State::Off, true) => self.start_controller(wanted),
            (State::Off, false) => return Update::Stopped,
            // Nothing is known of what it still does: only a reset ends that.
            (State::Failed, true) => self
                .reset_function()
                .and_then(|()| self.start_controller(wanted)),
            (State::Failed, false) => {
                // The guest's driver must not wait for a device that is gone. Whatever it
                // does, it does to the buffer shadow, and it gets no command before a reset.
                if let Err(error) = self.reset_function() {
                    warn!("{}: {error}", self.function.info().label);
                    self.controller.last_status = 0;
                }
                return Update::Stopped;
            }
            (State::Stopping { until, .. }, _) => {
                self.controller.state = State::Stopping {
                    until,
                    then: enable.then_some(wanted),
                };
                Ok(())
            }
            (State::Starting { .. } | State::On, true) => {
                self.controller.shutting_down = wanted & cc::SHN_MASK != 0;
                self.controller.write32(reg::CC, wanted)
            }
            (State::Starting { .. } | State::On, false) => {
                self.controller.state = State::Stopping {
                    until: Instant::now() + timeout,
                    then: None,
                };
                self.controller.write32(reg::CC, wanted)
            }
        };
        match outcome {
            // Most devices, and all software ones, are there at once.
            Ok(()) => self.settle_controller(),
            Err(error) => self.controller.failed(&error),
        }
    }

    /// Resets the function; on failure the controller counts as failed.
    pub(super) fn reset_function(&mut self) -> Result<(), FunctionError> {
        self.forget_commands();
        match self.function.reset() {
            Ok(()) => {
                self.controller.was_reset();
                Ok(())
            }
            Err(error) => {
                self.controller.state = State::Failed;
                if let FunctionError::Gone(_) = &error {
                    self.gone = Some(error.to_string());
                }
                Err(error)
            }
        }
    }

    /// Looks at the controller, and goes on with what waited for it.
    pub(super) fn settle_controller(&mut self) -> Update {
        let then = match self.controller.state {
            State::Stopping { then, .. } => then,
            _ => None,
        };
        match (self.controller.tick(Instant::now()), then) {
            (Update::Stopped, Some(wanted)) => {
                self.report(Update::Stopped);
                match self.start_controller(wanted) {
                    Ok(()) => self.controller.tick(Instant::now()),
                    Err(error) => self.controller.failed(&error),
                }
            }
            (update, _) => update,
        }
    }

    pub(super) fn start_controller(&mut self, cc: u32) -> Result<(), FunctionError> {
        self.forget_commands();
        self.io.arena.clear_cq(0);
        let sq = SubmissionQueue {
            size: ADMIN_QUEUE_ENTRIES,
            tail: 0,
            released: 0,
            outstanding: 0,
            completion_queue: 0,
            dirty: false,
        };
        self.io.submission.insert(0, sq);
        let cq = CompletionCursor::new(ADMIN_QUEUE_ENTRIES);
        self.io.completion.insert(0, cq);
        self.controller
            .start(cc, self.io.arena.sq(0), self.io.arena.cq(0))
    }
}
