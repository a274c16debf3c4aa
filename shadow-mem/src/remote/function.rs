//! A remote function towards a VMM: everything is answered from here.

use std::sync::Arc;

use farbus_vfio::nvme::DOORBELL_BASE;
use farbus_vfio::{
    DmaWindow, Function, FunctionError, FunctionInfo, InterruptKind, Iova, RegionIndex,
};
use vmm_sys_util::eventfd::EventFd;

use super::RemoteFunction;

impl RemoteFunction {
    fn out_of_bounds(&self, what: String, offset: u64, len: usize) -> FunctionError {
        FunctionError::OutOfBounds { what, offset, len }
    }

    fn check_region(
        &self,
        region: RegionIndex,
        offset: u64,
        len: usize,
    ) -> Result<(), FunctionError> {
        let size = self.info.region(region).map_or(0, |region| region.size);
        match offset.checked_add(len as u64) {
            Some(end) if end <= size => Ok(()),
            _ => Err(self.out_of_bounds(region.to_string(), offset, len)),
        }
    }

    fn check_msix(&self, kind: InterruptKind) -> Result<(), FunctionError> {
        match kind {
            InterruptKind::Msix => Ok(()),
            other => Err(FunctionError::Unsupported(format!(
                "the function has no {other:?} interrupts"
            ))),
        }
    }
}

impl Function for RemoteFunction {
    fn info(&self) -> &FunctionInfo {
        &self.info
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), FunctionError> {
        self.state().config.read(offset, data).map_err(|_| {
            self.out_of_bounds("configuration space".into(), offset.into(), data.len())
        })
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), FunctionError> {
        let mut state = self.state();
        let effect = state.config.write(offset, data).map_err(|_| {
            self.out_of_bounds("configuration space".into(), offset.into(), data.len())
        })?;
        state.record_config();
        if effect.flr {
            state.reset();
        }
        Ok(())
    }

    fn region_read(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError> {
        self.check_region(region, offset, data.len())?;
        match region {
            RegionIndex::BAR0 => self.state().half.register_read(offset, data),
            _ => data.fill(0),
        }
        Ok(())
    }

    fn region_write(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError> {
        self.check_region(region, offset, data.len())?;
        if region == RegionIndex::BAR0 {
            let mut state = self.state();
            state.half.register_write(offset, data);
            if offset < DOORBELL_BASE || !state.gathers_doorbells {
                state.pump();
            }
        }
        Ok(())
    }

    fn map_dma(&self, window: &DmaWindow) -> Result<(), FunctionError> {
        let mut state = self.state();
        state.half.map(window)?;
        state.with_session(|_, session| session.register(window, window.iova.0));
        Ok(())
    }

    fn unmap_dma(&self, iova: Iova, len: u64) -> Result<(), FunctionError> {
        let mut state = self.state();
        let gone = state.half.unmap(iova, len)?;
        state.with_session(|_, session| session.let_go(&gone));
        Ok(())
    }

    fn set_interrupts(
        &self,
        kind: InterruptKind,
        first: u32,
        events: &[Option<Arc<EventFd>>],
    ) -> Result<(), FunctionError> {
        self.check_msix(kind)?;
        self.state().half.set_interrupts(first, events)
    }

    fn mask_interrupt(
        &self,
        kind: InterruptKind,
        vector: u32,
        masked: bool,
    ) -> Result<(), FunctionError> {
        self.check_msix(kind)?;
        self.state().half.mask_interrupt(vector, masked)
    }

    fn reset(&self) -> Result<(), FunctionError> {
        self.state().reset();
        Ok(())
    }
}
