//! A portion of a shared drive: a virtual controller's registers, configuration space and memory.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::admin::Counters;
use super::drive::SharedDrive;
use super::identify::{self, LIMIT};
use super::io::Scratch;
use super::queues::{Cq, Own, Pair, Shape, Slots, Sq};
use super::slices::SharedError;
use super::windows::Windows;
use crate::config::{BarKind, ConfigEffect, ConfigImage, ConfigSpace, MsixLayout};
use crate::driver::DmaMemory;
use crate::function::{
    DmaWindow, Function, FunctionError, FunctionInfo, InterruptCounts, InterruptKind, Iova, Notice,
    RegionIndex, RegionInfo,
};
use crate::nvme::{DOORBELL_BASE, PAGE_SIZE, PCI_CLASS, cap, cc, csts, reg};
use crate::soft_nvme::{Features, Identity, VENDOR};

/// PCI device id of a portion.
const DEVICE: u16 = 0x0002;
/// BAR 0: registers, doorbells, then the MSI-X table and pending bits, which mean nothing here.
const BAR_SIZE: u64 = 0x4000;
const MSIX_TABLE: u64 = 0x2000;
const MSIX_PBA: u64 = 0x3000;
/// `CAP.TO` in units of 500 ms: what waits for the drive waits no longer.
const TIMEOUT_UNITS: u64 = 20;

/// A part of a drive that several share: a controller with one namespace.
///
/// It is driven by one thread at a time, which calls [`Function::service`] when it looks for
/// completions.
pub struct Portion {
    drive: Arc<SharedDrive>,
    index: usize,
    info: FunctionInfo,
    state: Mutex<Controller>,
}

/// The virtual controller.
pub(super) struct Controller {
    config: ConfigSpace,
    pub(super) cc: u32,
    csts: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    /// The drive's generation that this one's queues are of.
    generation: u64,
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
    write_cache: bool,
}

impl Portion {
    pub(super) fn new(drive: Arc<SharedDrive>, index: usize) -> Result<Self, SharedError> {
        let slice = drive.slice(index);
        let vectors = slice.pairs + 1;
        let bar0 = RegionInfo {
            index: RegionIndex::BAR0,
            size: BAR_SIZE,
        };
        let layout = MsixLayout {
            vectors,
            table: (RegionIndex::BAR0, MSIX_TABLE),
            pba: (RegionIndex::BAR0, MSIX_PBA),
        };
        let image = ConfigImage::new(VENDOR, DEVICE, PCI_CLASS)
            .bar(0, BarKind::Memory64)
            .power_management()
            .msix(layout)
            .express()
            .build();
        let config = ConfigSpace::from_image(&image, &[bar0]).map_err(FunctionError::from)?;
        let own_len = Own::len_for(slice.pairs);
        let own_at = slice.addresses.end() + 1 - own_len as u64;
        let range = *slice.addresses.start()..=own_at - 1;
        let own = DmaMemory::new(Iova(own_at), own_len)?.window();
        drive.note(drive.function.map_dma(&own))?;
        let queues = usize::from(slice.pairs) + 1;
        let write_cache = drive.has_write_cache();
        let mut controller = Controller {
            cc: 0,
            csts: 0,
            aqa: 0,
            asq: 0,
            acq: 0,
            generation: drive.generation(),
            max_entries: drive.entries,
            windows: Windows::new(range.clone()),
            own: Own::new(own),
            sqs: vec![None; queues],
            cqs: vec![None; queues],
            pairs: vec![None; queues - 1],
            slots: Slots::new(),
            scratch: Scratch::new(),
            features: Features::new(slice.pairs),
            requests: Vec::with_capacity(LIMIT),
            listeners: vec![None; vectors.into()],
            identity: identify::identity(&drive, slice),
            counters: Counters::default(),
            turn_of: 0,
            strays: 0,
            write_cache,
            config,
        };
        controller.features.write_cache = write_cache;
        let info = FunctionInfo {
            label: format!("slice {} of {}", slice.name, drive.function.info().label),
            config_size: controller.config.size(),
            regions: vec![bar0],
            interrupts: InterruptCounts {
                msix: vectors.into(),
                ..Default::default()
            },
            resettable: true,
            iova_ranges: vec![range],
        };
        Ok(Self {
            index,
            info,
            state: Mutex::new(controller),
            drive,
        })
    }

    /// The state is whole whenever the lock is free, so a panic elsewhere does not matter.
    fn state(&self) -> MutexGuard<'_, Controller> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_access(
        &self,
        region: RegionIndex,
        offset: u64,
        len: usize,
    ) -> Result<(), FunctionError> {
        let inside = offset
            .checked_add(len as u64)
            .is_some_and(|end| end <= BAR_SIZE);
        if region == RegionIndex::BAR0 && inside {
            return Ok(());
        }
        Err(FunctionError::OutOfBounds {
            what: region.to_string(),
            offset,
            len,
        })
    }

    fn check_vectors(
        &self,
        kind: InterruptKind,
        first: u32,
        count: usize,
    ) -> Result<(), FunctionError> {
        let available = self.info.interrupts.of(kind);
        let end = u64::from(first) + count as u64;
        if end > u64::from(available) {
            return Err(FunctionError::Unsupported(format!(
                "{kind:?} vectors {first} to {end} were asked for, but there are {available}"
            )));
        }
        Ok(())
    }

    fn write_dword(&self, offset: u64, value: u32) {
        let mut state = self.state();
        let drive = &self.drive;
        match offset {
            reg::CC => state.configure(drive, value),
            reg::AQA => state.aqa = value & 0x0fff_0fff,
            reg::ASQ => set_low(&mut state.asq, value & !(PAGE_SIZE as u32 - 1)),
            reg::ACQ => set_low(&mut state.acq, value & !(PAGE_SIZE as u32 - 1)),
            at if at == reg::ASQ + 4 => set_high(&mut state.asq, value),
            at if at == reg::ACQ + 4 => set_high(&mut state.acq, value),
            DOORBELL_BASE..MSIX_TABLE => {
                let index = (offset - DOORBELL_BASE) / 4;
                state.ring(drive, self.index, index, value as u16);
            }
            _ => {}
        }
    }
}

fn set_low(register: &mut u64, value: u32) {
    *register = (*register & !0xffff_ffff) | u64::from(value);
}

fn set_high(register: &mut u64, value: u32) {
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

    fn register_file(&self, status: u32) -> [u8; 0x40] {
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

    fn configure(&mut self, drive: &SharedDrive, new: u32) {
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
    fn ring(&mut self, drive: &SharedDrive, index: usize, doorbell: u64, value: u16) {
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

impl Function for Portion {
    fn info(&self) -> &FunctionInfo {
        &self.info
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), FunctionError> {
        Ok(self.state().config.read(offset, data)?)
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), FunctionError> {
        let ConfigEffect { flr, .. } = self.state().config.write(offset, data)?;
        if flr { self.reset() } else { Ok(()) }
    }

    fn region_read(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError> {
        self.check_access(region, offset, data.len())?;
        let mut state = self.state();
        let mut status = state.csts;
        if (reg::CSTS..reg::CSTS + 4).contains(&offset) {
            state.may_work(&self.drive);
            status = match self.drive.status()? {
                u32::MAX => u32::MAX,
                of_drive if state.csts & csts::RDY != 0 => state.csts | of_drive & csts::CFS,
                _ => state.csts,
            };
        }
        let file = state.register_file(status);
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = file.get(at).copied().unwrap_or(0);
        }
        Ok(())
    }

    fn region_write(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError> {
        self.check_access(region, offset, data.len())?;
        if !matches!(data.len(), 4 | 8) || offset % data.len() as u64 != 0 {
            log::debug!("a write of {} bytes at {offset:#x} is ignored", data.len());
            return Ok(());
        }
        for (at, bytes) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
            let value = bytes
                .iter()
                .rev()
                .fold(0, |value, &byte| value << 8 | u32::from(byte));
            self.write_dword(at, value);
        }
        Ok(())
    }

    fn map_dma(&self, window: &DmaWindow) -> Result<(), FunctionError> {
        let mut state = self.state();
        state.windows.check(window)?;
        self.drive.note(self.drive.function.map_dma(window))?;
        state.windows.add(window);
        Ok(())
    }

    fn unmap_dma(&self, iova: Iova, len: u64) -> Result<(), FunctionError> {
        let mut state = self.state();
        state.windows.check_removal(iova, len)?;
        self.drive.note(self.drive.function.unmap_dma(iova, len))?;
        state.windows.remove(iova, len);
        Ok(())
    }

    fn set_interrupts(
        &self,
        kind: InterruptKind,
        first: u32,
        events: &[Option<Arc<EventFd>>],
    ) -> Result<(), FunctionError> {
        self.check_vectors(kind, first, events.len())?;
        let mut state = self.state();
        for (listener, event) in state.listeners.iter_mut().skip(first as usize).zip(events) {
            listener.clone_from(event);
        }
        for (sq, pair) in state.sqs.iter().skip(1).zip(&state.pairs) {
            let (Some(sq), Some(pair)) = (sq, pair) else {
                continue;
            };
            if let Some(Some(cq)) = state.cqs.get(usize::from(sq.cq)) {
                state.route(&self.drive, pair.id, cq.vector)?;
            }
        }
        Ok(())
    }

    fn mask_interrupt(
        &self,
        _kind: InterruptKind,
        _vector: u32,
        _masked: bool,
    ) -> Result<(), FunctionError> {
        Err(FunctionError::Unsupported(
            "interrupts of a shared drive's portion cannot be masked".into(),
        ))
    }

    /// Ends what this portion has under way, and nobody else's, as long as the drive works. One
    /// that has failed is reset as a whole.
    fn reset(&self) -> Result<(), FunctionError> {
        let mut state = self.state();
        let status = self.drive.status()?;
        if status == u32::MAX {
            return Err(FunctionError::Gone(
                "its registers read as all ones, or its host wants it back".into(),
            ));
        }
        if status & csts::CFS != 0 || !state.stop(&self.drive) {
            self.drive.recover()?;
            // Everything of before is no more, also where the drive was reset by another.
            state.stop(&self.drive);
        }
        state.generation = self.drive.generation();
        (state.cc, state.csts, state.aqa, state.asq, state.acq) = (0, 0, 0, 0, 0);
        state.config.reset();
        Ok(())
    }

    fn service(&self) {
        self.state().turn(&self.drive, self.index);
    }

    fn notices(&self) -> Vec<(Notice, &EventFd)> {
        self.drive.slice(self.index).bells.all()
    }
}

impl Drop for Portion {
    /// Memory that the drive may still reach is taken away from it at the end, whatever it does.
    fn drop(&mut self) {
        if let Err(error) = self.reset() {
            log::debug!("{}: could not be reset: {error}", self.info.label);
        }
        let state = self.state();
        for window in state.windows.all().iter().chain([state.own.window()]) {
            let unmapped = self
                .drive
                .function
                .unmap_dma(window.iova, window.len as u64);
            if let Err(error) = unmapped {
                log::warn!("{}: could not take memory back: {error}", self.info.label);
            }
        }
        self.drive.give_back(self.index);
    }
}
