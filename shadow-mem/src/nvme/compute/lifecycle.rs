//! Enabling, disabling and resetting: what the guest wants, what the device is known to be,
//! and the messages that bring the one to the other.
//!
//! The guest may change its mind at any time; the device is asked for one change at a time and
//! each has one answer. So an answer never belongs to something that was asked before.

use farbus_fabric::FabricError;
use farbus_fabric::wire::{Data, Message, RequestId};
use farbus_vfio::RegionIndex;
use farbus_vfio::nvme::{cc, csts, reg};
use log::warn;

use super::ComputeHalf;
use super::queues::{CompletionQueue, SubmissionQueue};
use super::tags::State;
use crate::session::Session;

/// Where the guest's controller is in its life (NVMe 1.4 §7.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
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

/// What the device is known to be, or was last asked to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Device {
    /// Reset or disabled, without any command.
    Off,
    /// Asked to enable.
    Starting,
    /// Enabled and ready.
    On,
    /// Failed; still to be disabled.
    Failed,
    /// Asked to disable.
    Stopping,
    /// Asked for a function level reset.
    Resetting(RequestId),
}

/// See the module's own description.
pub(super) struct Lifecycle {
    pub(super) phase: Phase,
    pub(super) device: Device,
    /// The device must be off before anything else.
    stop: bool,
    /// The function must be reset before anything else.
    reset: bool,
    /// The rest of CC has changed under an enabled controller.
    configure: bool,
    last_reset: RequestId,
}

impl Lifecycle {
    pub(super) fn new() -> Self {
        Self {
            phase: Phase::Disabled,
            device: Device::Off,
            stop: false,
            reset: false,
            configure: false,
            last_reset: RequestId(0),
        }
    }

    /// Whether commands can be sent: both sides are ready, and nothing is to change first.
    pub(super) fn takes_commands(&self) -> bool {
        self.phase == Phase::Ready && self.device == Device::On && !self.stop && !self.reset
    }
}

impl ComputeHalf {
    /// The guest set `CC.EN`.
    pub(super) fn enable(&mut self) {
        let queues = self.registers.admin_queues();
        let [(asq, asq_size), (acq, acq_size)] = match queues {
            Some(queues) if self.registers.is_configuration_supported() => queues,
            _ => return self.fail("the guest enabled the controller with an invalid CC or AQA"),
        };
        // A guest that has not waited for the last disable to end waits now.
        self.registers.csts &= !(csts::RDY | csts::SHST_MASK);
        self.begin_era();
        self.queues.clear();
        self.features.clear();
        let sq = SubmissionQueue::new(asq, asq_size, 0);
        self.queues.submission.insert(0, sq);
        let cq = CompletionQueue::new(acq, acq_size, Some(0));
        self.queues.completion.insert(0, cq);
        self.record_new_submission(0);
        self.record_new_completion(0);
        self.life.phase = Phase::Enabling;
    }

    /// The guest cleared `CC.EN`. Its queues are gone at once; that the device has stopped, and
    /// so that the guest may reuse its memory, CSTS says later.
    pub(super) fn disable(&mut self) {
        self.registers.controller_reset();
        self.drop_commands();
        self.registers.csts &= !csts::CFS;
        self.life.configure = false;
        if self.life.device == Device::Off && !self.life.reset {
            self.disabled();
        } else {
            self.life.phase = Phase::Disabling;
            self.life.stop = true;
        }
    }

    pub(super) fn disabled(&mut self) {
        self.life.phase = Phase::Disabled;
        self.registers.csts &= !(csts::RDY | csts::SHST_MASK);
    }

    /// The guest changed `CC` in another way.
    pub(super) fn configure(&mut self) {
        self.life.configure = self.life.phase == Phase::Ready;
    }

    /// A function level reset, or a new VMM: back to the state after power-on, at once. The
    /// device follows; what it still sends until then is dropped.
    pub fn reset(&mut self) {
        self.drop_commands();
        self.interrupts.reset();
        self.registers.reset();
        self.life.phase = Phase::Disabled;
        self.life.stop = false;
        self.life.configure = false;
        self.life.reset = true;
        self.commit();
    }

    /// The controller cannot go on: the guest sees CSTS.CFS, and resets it.
    pub(super) fn fail(&mut self, why: &str) {
        if self.life.phase != Phase::Fatal {
            warn!("the guest's controller failed: {why}");
            self.life.phase = Phase::Fatal;
            self.registers.csts |= csts::CFS;
            self.changed = true;
        }
    }

    /// The device is off, and with it every command that it had.
    fn device_is_off(&mut self) {
        self.changed = true;
        self.life.device = Device::Off;
        self.life.stop = false;
        self.release(|state| state == State::Dropped);
        if self.life.phase == Phase::Disabling {
            self.disabled();
        }
    }

    /// The device's registers have changed.
    pub(super) fn register_update(&mut self, region: RegionIndex, offset: u64, data: &[u8]) {
        let (RegionIndex::BAR0, reg::CSTS, Ok(value)) = (region, offset, data.try_into()) else {
            return;
        };
        self.changed = true;
        let status = u32::from_le_bytes(value);
        let ready = status & csts::RDY != 0;
        match self.life.device {
            // Of before the reset.
            Device::Resetting(_) | Device::Off => {}
            _ if status & csts::CFS != 0 => self.device_failed("it reports a fatal status"),
            Device::Stopping if !ready => self.device_is_off(),
            Device::Starting if ready => {
                self.life.device = Device::On;
                if let Some(replay) = &mut self.replay {
                    replay.controller_is_ready();
                } else if self.life.phase == Phase::Enabling && !self.life.stop {
                    self.life.phase = Phase::Ready;
                    self.registers.csts = status & (csts::RDY | csts::SHST_MASK);
                }
            }
            Device::On if !ready => self.device_failed("it is no longer ready"),
            Device::On if self.life.phase == Phase::Ready && !self.life.stop => {
                self.registers.csts = status & (csts::RDY | csts::SHST_MASK);
            }
            _ => {}
        }
    }

    /// The device side says that the device failed.
    pub(super) fn device_failed(&mut self, why: &str) {
        if matches!(self.life.device, Device::Resetting(_) | Device::Off) {
            return;
        }
        self.life.device = Device::Failed;
        if matches!(self.life.phase, Phase::Enabling | Phase::Ready) && !self.life.stop {
            self.fail(&format!("the device failed: {why}"));
        }
    }

    /// The function has been reset, or could not be.
    pub(super) fn reset_done(&mut self, request: RequestId, error: Option<&str>) {
        if self.life.device != Device::Resetting(request) {
            return;
        }
        self.device_is_off();
        if let Some(error) = error {
            warn!("the device could not be reset: {error}");
        }
    }

    /// The link is gone; the device server resets the function before its next claim.
    pub(super) fn device_is_lost(&mut self) {
        self.life.reset = false;
        self.life.configure = false;
        self.device_is_off();
    }

    /// Asks for the next change, if the device is to change and has answered the last one.
    pub(super) fn send_changes(&mut self, session: &mut Session) -> Result<(), FabricError> {
        // A guest that changes its mind again and again adds nothing to what waits.
        if session.is_congested() {
            return Ok(());
        }
        if std::mem::take(&mut self.life.reset) {
            let request = RequestId(self.life.last_reset.0.wrapping_add(1));
            self.life.last_reset = request;
            self.life.device = Device::Resetting(request);
            return session.send(&Message::Reset { request });
        }
        let wanted = matches!(self.life.phase, Phase::Enabling | Phase::Ready);
        match self.life.device {
            Device::On | Device::Failed if self.life.stop => {
                self.life.device = Device::Stopping;
                self.send_cc(session, 0)
            }
            Device::Off if wanted => {
                self.life.device = Device::Starting;
                // A shutdown that the guest has asked for comes when the device is there.
                self.life.configure = self.registers.cc & cc::SHN_MASK != 0;
                self.send_cc(session, self.registers.cc & !cc::SHN_MASK | cc::EN)
            }
            Device::On if self.replay.is_none() && std::mem::take(&mut self.life.configure) => {
                self.send_cc(session, self.registers.cc)
            }
            _ => Ok(()),
        }
    }

    fn send_cc(&self, session: &mut Session, cc: u32) -> Result<(), FabricError> {
        session.send(&Message::RegisterWrite {
            region: RegionIndex::BAR0.0,
            offset: reg::CC,
            data: Data::new(&cc.to_le_bytes())?,
        })
    }
}
