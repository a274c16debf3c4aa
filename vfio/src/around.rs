//! Functions that stand around another one, and do some of what they are asked differently.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::function::{
    DmaWindow, Function, FunctionError, FunctionInfo, InterruptKind, Iova, Notice, RegionIndex,
};
use crate::pci::PciAddress;

/// A function around another one: what it does not define itself, the other one does. Whoever implements
/// this has a [`Function`]; the methods are those of that trait, and mean the same.
///
/// ```
/// use farbus_vfio::{Around, Function, FunctionError};
///
/// /// Cannot be reset.
/// struct Lasting<F>(F);
///
/// impl<F: Function> Around for Lasting<F> {
///     fn inner(&self) -> &dyn Function {
///         &self.0
///     }
///
///     fn reset(&self) -> Result<(), FunctionError> {
///         Err(FunctionError::Unsupported("it lasts".into()))
///     }
/// }
/// ```
#[allow(missing_docs, reason = "they are those of `Function`")]
pub trait Around: Send + Sync {
    /// The other one.
    fn inner(&self) -> &dyn Function;

    fn info(&self) -> &FunctionInfo {
        self.inner().info()
    }

    fn pci_address(&self) -> Option<PciAddress> {
        self.inner().pci_address()
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), FunctionError> {
        self.inner().config_read(offset, data)
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), FunctionError> {
        self.inner().config_write(offset, data)
    }

    fn region_read(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError> {
        self.inner().region_read(region, offset, data)
    }

    fn region_write(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError> {
        self.inner().region_write(region, offset, data)
    }

    fn map_dma(&self, window: &DmaWindow) -> Result<(), FunctionError> {
        self.inner().map_dma(window)
    }

    fn unmap_dma(&self, iova: Iova, len: u64) -> Result<(), FunctionError> {
        self.inner().unmap_dma(iova, len)
    }

    fn set_interrupts(
        &self,
        kind: InterruptKind,
        first: u32,
        events: &[Option<Arc<EventFd>>],
    ) -> Result<(), FunctionError> {
        self.inner().set_interrupts(kind, first, events)
    }

    fn mask_interrupt(
        &self,
        kind: InterruptKind,
        vector: u32,
        masked: bool,
    ) -> Result<(), FunctionError> {
        self.inner().mask_interrupt(kind, vector, masked)
    }

    fn reset(&self) -> Result<(), FunctionError> {
        self.inner().reset()
    }

    fn service(&self) {
        self.inner().service();
    }

    fn wants_one_thread(&self) -> bool {
        self.inner().wants_one_thread()
    }

    fn completes_at_once(&self) -> bool {
        self.inner().completes_at_once()
    }

    fn notices(&self) -> Vec<(Notice, &EventFd)> {
        self.inner().notices()
    }
}

impl<T: Around> Function for T {
    fn info(&self) -> &FunctionInfo {
        Around::info(self)
    }

    fn pci_address(&self) -> Option<PciAddress> {
        Around::pci_address(self)
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), FunctionError> {
        Around::config_read(self, offset, data)
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), FunctionError> {
        Around::config_write(self, offset, data)
    }

    fn region_read(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError> {
        Around::region_read(self, region, offset, data)
    }

    fn region_write(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError> {
        Around::region_write(self, region, offset, data)
    }

    fn map_dma(&self, window: &DmaWindow) -> Result<(), FunctionError> {
        Around::map_dma(self, window)
    }

    fn unmap_dma(&self, iova: Iova, len: u64) -> Result<(), FunctionError> {
        Around::unmap_dma(self, iova, len)
    }

    fn set_interrupts(
        &self,
        kind: InterruptKind,
        first: u32,
        events: &[Option<Arc<EventFd>>],
    ) -> Result<(), FunctionError> {
        Around::set_interrupts(self, kind, first, events)
    }

    fn mask_interrupt(
        &self,
        kind: InterruptKind,
        vector: u32,
        masked: bool,
    ) -> Result<(), FunctionError> {
        Around::mask_interrupt(self, kind, vector, masked)
    }

    fn reset(&self) -> Result<(), FunctionError> {
        Around::reset(self)
    }

    fn service(&self) {
        Around::service(self);
    }

    fn wants_one_thread(&self) -> bool {
        Around::wants_one_thread(self)
    }

    fn completes_at_once(&self) -> bool {
        Around::completes_at_once(self)
    }

    fn notices(&self) -> Vec<(Notice, &EventFd)> {
        Around::notices(self)
    }
}
