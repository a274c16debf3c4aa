//! The virtual controller of a portion: its registers, its queues, and its life.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::admin::Counters;
use super::drive::SharedDrive;
use super::identify;
use super::io::Scratch;
use super::queues::{Cq, Own, Pair, Shape, Slots, Sq};
use super::windows::Windows;
use crate::config::ConfigSpace;
use crate::nvme::{cap, cc, csts, reg};
use crate::soft_nvme::{Features, Identity};

/// `CAP.TO` in units of 500 ms: what waits for the drive waits no longer.
const TIMEOUT_UNITS: u64 = 20;

/// The virtual controller.
pub(super) struct Controller {
    pub(super) config: ConfigSpace,
    pub(super) cc: u32,
    pub(super) csts: u32,
    pub(super) aqa: u32,
    pub(super) asq: u64,
    pub(super) acq: u64,
    /// The drive's generation that this one's queues are of.
    pub(super) generation: u64,
    /// Most entries of a queue.
    pub(super) max_entries: u16,
    pub(super) windows: Windows,
    pub(super) own: Own,
    /// By id; 0 is the admin queue.
    pub(super) sqs: Vec<Option<Sq>>,
    pub(super) cqs: Vec<Option<Cq>>,
    /// The drive's queue pairs, by the id of the submission queue, less one.
    pub(super) pairs: Vec<Option<Pair>>,
    pub(super) slots: Slots,
    pub(super) scratch: Scratch,
    pub(super) features: Features,
    /// Identifiers of Asynchronous Event Requests.
    pub(super) requests: Vec<u16>,
    /// Who listens to which interrupt.
    pub(super) listeners: Vec<Option<Arc<EventFd>>>,
    pub(super) identity: Identity,
    pub(super) counters: Counters,
    /// The queue that was last looked at.
    pub(super) turn_of: usize,
    /// Completions of commands that were never sent.
    pub(super) strays: u64,
    pub(super) write_cache: bool,
}

pub(super) fn set_low(register: &mut u64, value: u32) {
    *register = (*register & !0xffff_ffff) | u64::from(value);
}

pub(super) fn set_high(register: &mut u64, value: u32) {
    *register = (*register & 0xffff_ffff) | u64::from(value) << 32;
}

impl Controller {
    pub(super) fn is_ready(&self) -> bool {
        self.csts & (csts::RDY | csts::CFS) == csts::RDY
    }

    /// The drive was reset since, and this one's queues are no more.
    pub(super) fn is_lost(&self, drive: &SharedDrive) -> bool {
        self.generation != drive.generation()
    }

    /// Whether commands may go to and fro.
    pub(super) fn may_work(&mut self, drive: &SharedDrive) -> bool {
        if self.is_lost(drive) && self.is_ready() {
            self.fail("the drive was reset");
        }
        self.is_ready()
    }

    /// Only a reset of this controller helps.
    pub(super) fn fail(&mut self, why: &str) {
        log::debug!("a portion's controller is in fatal status: {why}");
        self.csts |= csts::CFS;
    }

    /// Signals whoever listens to an interrupt.
    pub(super) fn signal(&self, vector: Option<u16>) {
        let listener = vector.and_then(|v| self.listeners.get(usize::from(v)));
        if let Some(Some(event)) = listener {
            // A counter that is full has been signalled.
            let _ = event.write(1);
        }
    }

    pub(super) fn register_file(&self, status: u32) -> [u8; 0x40] {
        let mut file = [0; 0x40];
        let mut put = |at: u64, bytes: &[u8]| {
            for (to, from) in file.iter_mut().skip(at as usize).zip(bytes) {
                *to = *from;
            }
        };
        let capabilities = u64::from(self.max_entries - 1)
            | cap::CQR
            | TIMEOUT_UNITS << cap::TO_SHIFT
            | cap::CSS_NVM;
        put(reg::CAP, &capabilities.to_le_bytes());
        put(reg::VS, &identify::VERSION.to_le_bytes());
        put(reg::CC, &self.cc.to_le_bytes());
        put(reg::CSTS, &status.to_le_bytes());
        put(reg::AQA, &self.aqa.to_le_bytes());
        put(reg::ASQ, &self.asq.to_le_bytes());
        put(reg::ACQ, &self.acq.to_le_bytes());
        file
    }

    pub(super) fn configure(&mut self, drive: &SharedDrive, new: u32) {
        let old = std::mem::replace(&mut self.cc, new);
        if new & cc::SHN_MASK != 0 {
            // Nothing of the drive's is shut down: what was flushed stays.
            self.csts |= csts::SHST_COMPLETE;
        }
        match (old & cc::EN != 0, new & cc::EN != 0) {
            (false, true) => self.enable(drive),
            // One that cannot be stopped does not say that it has.
            (true, false) if !self.stop(drive) => self.csts |= csts::CFS,
            (true, false) => self.csts = 0,
            _ => {}
        }
    }

    fn enable(&mut self, drive: &SharedDrive) {
        let shape = |base, size: u32| Shape {
            base,
            entries: (size & 0xfff) as u16 + 1,
        };
        let (sq, cq) = (shape(self.asq, self.aqa), shape(self.acq, self.aqa >> 16));
        let wrong = self.cc & (cc::CSS_MASK | cc::MPS_MASK | cc::AMS_MASK) != 0
            || sq.entries < 2
            || cq.entries < 2;
        if wrong || self.is_lost(drive) {
            return self.fail("it cannot be enabled as it is configured");
        }
        self.sqs[0] = Some(Sq::new(sq, 0));
        self.cqs[0] = Some(Cq::new(cq, Some(0)));
        self.csts = csts::RDY;
    }

    /// Ends everything that is under way; whether that has worked. A drive that was reset has
    /// nothing under way.
    pub(super) fn stop(&mut self, drive: &SharedDrive) -> bool {
        if !self.is_lost(drive) {
            for id in 1..self.sqs.len() as u16 {
                if !self.end_pair(drive, id) && !self.is_lost(drive) {
                    return false;
                }
            }
        }
        self.sqs.fill(None);
        self.cqs.fill(None);
        self.pairs.fill(None);
        for id in 1..self.sqs.len() as u16 {
            while self.slots.take_of(id).is_some() {}
        }
        self.requests.clear();
        self.features.reset();
        self.features.write_cache = self.write_cache;
        true
    }

    /// A doorbell was written: `index` counts dwords, even ones are submission queues.
    pub(super) fn ring(&mut self, drive: &SharedDrive, index: usize, doorbell: u64, value: u16) {
        if !self.may_work(drive) {
            return;
        }
        let id = (doorbell / 2) as usize;
        let possible = match doorbell % 2 {
            0 => match self.sqs.get_mut(id) {
                Some(Some(sq)) if value < sq.shape.entries => {
                    sq.tail = value;
                    true
                }
                _ => false,
            },
            _ => match self.cqs.get_mut(id) {
                Some(Some(cq)) => cq.set_head(value),
                _ => false,
            },
        };
        if !possible {
            log::debug!("doorbell {doorbell} of a portion was set to {value}, which it cannot be");
        } else if id == 0 {
            self.run_admin(drive, index);
        } else {
            self.submit(drive, index);
        }
    }
}
