//! A portion of a shared drive, as whoever drives it sees it: a [`Function`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::admin::Counters;
use super::controller::{Controller, set_high, set_low};
use super::drive::SharedDrive;
use super::identify::{self, LIMIT};
use super::io::Scratch;
use super::queues::{Own, Slots};
use super::slices::SharedError;
use super::windows::Windows;
use crate::config::ConfigEffect;
use crate::driver::DmaMemory;
use crate::function::{
    DmaWindow, Function, FunctionError, FunctionInfo, InterruptCounts, InterruptKind, Iova, Notice,
    RegionIndex,
};
use crate::nvme::{DOORBELL_BASE, PAGE_SIZE, csts, reg};
use crate::soft_nvme::Features;
use crate::soft_nvme::shape::{self, BAR_SIZE, MSIX_TABLE};

/// PCI device id of a portion.
const DEVICE: u16 = 0x0002;
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

impl Portion {
    pub(super) fn new(drive: Arc<SharedDrive>, index: usize) -> Result<Self, SharedError> {
        let slice = drive.slice(index);
        let vectors = slice.pairs + 1;
        let (bar0, config) = shape::configuration(DEVICE, vectors).map_err(FunctionError::from)?;
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
            let of_drive = self.drive.status()?;
            status = state.csts;
            if status & csts::RDY != 0 {
                status |= of_drive & csts::CFS;
            }
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
        for (at, value) in shape::dwords(offset, data) {
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
        shape::check_vectors(&self.info, kind, first, events.len())?;
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

    fn wants_one_thread(&self) -> bool {
        true
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
