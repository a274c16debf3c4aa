//! The controller as a function: registers, doorbells, memory.

use std::sync::Arc;

use farbus_vfio::nvme::{DOORBELL_BASE, PCI_CLASS, SQE_SIZE, SubmissionEntry, cap, cc, csts, reg};
use farbus_vfio::{
    DmaWindow, Function, FunctionError, FunctionInfo, InterruptKind, Iova, RegionIndex,
};
use vmm_sys_util::eventfd::EventFd;

use super::{FakeNvme, Outstanding, State, new_cq, new_sq};

impl State {
    pub(super) fn rang(&mut self, queue: usize, is_completion: bool, value: u32) {
        if self.csts & csts::RDY == 0 {
            return;
        }
        if is_completion {
            if let Some(Some(cq)) = self.completion.get_mut(queue) {
                assert!(value < cq.size, "head {value} of {} entries", cq.size);
                cq.head = value;
            }
            return;
        }
        let Some(Some(sq)) = self.submission.get_mut(queue) else {
            return;
        };
        let (base, size) = (sq.base, sq.size);
        assert!(value < size, "tail {value} of {size} entries");
        let mut head = sq.head;
        sq.head = value;
        while head != value {
            let sqe = SubmissionEntry(self.load(base + u64::from(head) * SQE_SIZE as u64));
            head = (head + 1) % size;
            self.check(queue as u16, &sqe);
            self.outstanding.push(Outstanding {
                queue: queue as u16,
                sqe,
            });
            // The device half waits for its own.
            if queue == 0 && (self.prompt || sqe.cid() == self.tags) {
                self.answer(&sqe);
            }
        }
    }

    pub(super) fn read_register(&self, offset: u64) -> u32 {
        match offset {
            reg::CAP => self.identity.cap as u32,
            0x04 => (self.identity.cap >> 32) as u32,
            reg::VS => self.identity.vs,
            reg::CC => self.cc,
            reg::CSTS => self.csts,
            reg::AQA => self.aqa,
            _ => 0,
        }
    }

    pub(super) fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            reg::CC => {
                self.cc = value;
                if self.follows {
                    self.follow();
                }
            }
            reg::AQA => self.aqa = value,
            reg::ASQ => self.asq = u64::from(value),
            0x2c => self.asq |= u64::from(value) << 32,
            reg::ACQ => self.acq = u64::from(value),
            0x34 => {
                self.acq |= u64::from(value) << 32;
                // Even a controller that the script has made deaf to CC takes these, since the
                // device half waits for its own commands.
                self.begin();
            }
            _ if offset >= DOORBELL_BASE => {
                let shift = 2 + (self.identity.cap >> cap::DSTRD_SHIFT & 0xf);
                let index = (offset - DOORBELL_BASE) >> shift;
                self.rang(index as usize / 2, index % 2 == 1, value);
            }
            _ => {}
        }
    }

    /// CSTS becomes what CC asks for.
    pub fn follow(&mut self) {
        let enabled = self.cc & cc::EN != 0;
        if enabled && self.csts & csts::RDY == 0 {
            self.forget();
            self.begin();
            self.csts |= csts::RDY;
        } else if !enabled {
            self.forget();
            self.csts = 0;
        }
        if self.cc & cc::SHN_MASK != 0 {
            self.csts = self.csts & !csts::SHST_MASK | csts::SHST_COMPLETE;
        }
    }

    pub(super) fn begin(&mut self) {
        let (sq, cq) = ((self.aqa & 0xfff) + 1, (self.aqa >> 16 & 0xfff) + 1);
        self.submission[0] = Some(new_sq(self.asq, sq, 0));
        self.completion[0] = Some(new_cq(self.acq, cq));
    }

    pub(super) fn forget(&mut self) {
        self.submission.fill_with(|| None);
        self.completion.fill_with(|| None);
        self.outstanding.clear();
    }
}

fn gone() -> FunctionError {
    FunctionError::Gone("the script says so".into())
}

impl Function for FakeNvme {
    fn info(&self) -> &FunctionInfo {
        &self.info
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), FunctionError> {
        let state = self.state();
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = match at {
                4 | 5 => state.command.get(at - 4).copied().unwrap_or(0),
                9..=11 => (PCI_CLASS >> (8 * (at - 9))) as u8,
                _ => 0,
            };
        }
        Ok(())
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), FunctionError> {
        assert_eq!(
            (offset, data.len()),
            (4, 2),
            "more than the command register"
        );
        self.state().command.copy_from_slice(data);
        Ok(())
    }

    fn region_read(
        &self,
        _region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError> {
        let state = self.state();
        if state.gone {
            return Err(gone());
        }
        for (at, byte) in (offset..).zip(data) {
            *byte = (state.read_register(at & !3) >> (at % 4 * 8)) as u8;
        }
        Ok(())
    }

    fn region_write(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError> {
        let mut state = self.state();
        if state.gone {
            return Err(gone());
        }
        let bytes: [u8; 4] = data.try_into().expect("one aligned dword");
        assert!(region == RegionIndex::BAR0 && offset % 4 == 0);
        if offset + 4 > self.info.regions[0].size {
            return Err(FunctionError::OutOfBounds {
                what: "BAR0".into(),
                offset,
                len: 4,
            });
        }
        state.write_register(offset, u32::from_le_bytes(bytes));
        Ok(())
    }

    fn map_dma(&self, window: &DmaWindow) -> Result<(), FunctionError> {
        let mut state = self.state();
        let end = window.iova.0 + window.len as u64;
        let overlaps = |w: &DmaWindow| w.iova.0 < end && w.iova.0 + w.len as u64 > window.iova.0;
        assert!(!state.windows.iter().any(overlaps), "{window:?} overlaps");
        state.windows.push(window.clone());
        Ok(())
    }

    fn unmap_dma(&self, iova: Iova, len: u64) -> Result<(), FunctionError> {
        let mut state = self.state();
        let known = |w: &DmaWindow| w.iova == iova && w.len as u64 == len;
        assert!(state.windows.iter().any(known), "{iova} is not mapped");
        // A controller that still has commands would go on writing there.
        let quiet = state.outstanding.is_empty() || state.gone || state.stuck;
        assert!(quiet, "memory was taken from a running controller");
        state.windows.retain(|w| !known(w));
        Ok(())
    }

    fn set_interrupts(
        &self,
        kind: InterruptKind,
        first: u32,
        events: &[Option<Arc<EventFd>>],
    ) -> Result<(), FunctionError> {
        assert_eq!((kind, first), (InterruptKind::Msix, 0));
        self.state().events = events.to_vec();
        Ok(())
    }

    fn mask_interrupt(&self, _: InterruptKind, _: u32, _: bool) -> Result<(), FunctionError> {
        Ok(())
    }

    fn reset(&self) -> Result<(), FunctionError> {
        let mut state = self.state();
        if state.stuck {
            return Err(gone());
        }
        state.forget();
        state.cc = 0;
        state.csts = 0;
        state.command = [0; 2];
        state.resets += 1;
        Ok(())
    }
}
