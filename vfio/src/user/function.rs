//! A [`Function`] behind a vfio-user socket.

use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::body::{
    DEVICE_RESET, DMA_READ, DMA_WRITE, IRQ_INDEX_INTX, IRQ_INDEX_MSI, IRQ_INDEX_MSIX, IrqAction,
    IrqData, REGION_INDEX_CONFIG, SetIrqs,
};
use super::event::borrow;
use super::{Client, ClientError};
use crate::{
    DmaAccess, DmaWindow, Function, FunctionError, FunctionInfo, InterruptCounts, InterruptKind,
    Iova, RegionIndex, RegionInfo,
};

/// A function that a vfio-user server offers. Windows for DMA must be file-backed, since
/// the server gets at them by their file.
pub struct UserFunction {
    info: FunctionInfo,
    client: Mutex<Client>,
}

impl UserFunction {
    /// Asks the server what its function is like.
    pub fn new(mut client: Client, label: String) -> Result<Self, ClientError> {
        let device = client.device_info()?;
        let mut regions = Vec::new();
        for index in 0..RegionIndex::COUNT {
            let size = client.region_info(u32::from(index))?.size;
            if size != 0 {
                regions.push(RegionInfo {
                    index: RegionIndex(index),
                    size,
                });
            }
        }
        let config_size = client.region_info(REGION_INDEX_CONFIG)?.size;
        let info = FunctionInfo {
            label,
            config_size: u16::try_from(config_size).unwrap_or(4096).min(4096),
            regions,
            interrupts: InterruptCounts {
                intx: client.irq_info(IRQ_INDEX_INTX)?.count,
                msi: client.irq_info(IRQ_INDEX_MSI)?.count,
                msix: client.irq_info(IRQ_INDEX_MSIX)?.count,
            },
            resettable: device.flags & DEVICE_RESET != 0,
            iova_ranges: vec![RangeInclusive::new(0, u64::MAX)],
        };
        Ok(Self {
            info,
            client: Mutex::new(client),
        })
    }

    /// A client is whole between calls, so one that a panic left behind can still be used.
    fn client(&self) -> MutexGuard<'_, Client> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_irqs(&self, request: &SetIrqs<'_>, fds: &[BorrowedFd<'_>]) -> Result<(), FunctionError> {
        self.client()
            .set_irqs(request, fds)
            .map_err(|e| to_function_error("SET_IRQS", e))
    }
}

fn to_function_error(what: &str, error: ClientError) -> FunctionError {
    match error {
        ClientError::Refused { errno, .. } => FunctionError::Io {
            what: format!("vfio-user {what}"),
            source: std::io::Error::from_raw_os_error(errno as i32),
        },
        other => FunctionError::Gone(other.to_string()),
    }
}

fn irq_index(kind: InterruptKind) -> u32 {
    match kind {
        InterruptKind::Intx => IRQ_INDEX_INTX,
        InterruptKind::Msi => IRQ_INDEX_MSI,
        InterruptKind::Msix => IRQ_INDEX_MSIX,
    }
}

impl Function for UserFunction {
    fn info(&self) -> &FunctionInfo {
        &self.info
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), FunctionError> {
        self.client()
            .region_read(REGION_INDEX_CONFIG, u64::from(offset), data)
            .map_err(|e| to_function_error("configuration read", e))
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), FunctionError> {
        self.client()
            .region_write(REGION_INDEX_CONFIG, u64::from(offset), data)
            .map_err(|e| to_function_error("configuration write", e))
    }

    fn region_read(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError> {
        self.client()
            .region_read(u32::from(region.0), offset, data)
            .map_err(|e| to_function_error("REGION_READ", e))
    }

    fn region_write(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError> {
        self.client()
            .region_write_posted(u32::from(region.0), offset, data)
            .map_err(|e| to_function_error("REGION_WRITE", e))
    }

    fn map_dma(&self, window: &DmaWindow) -> Result<(), FunctionError> {
        let file = window
            .memory
            .file_offset()
            .ok_or(FunctionError::BadWindow {
                iova: window.iova,
                len: window.len as u64,
                why: "its memory has no file, and only files can be sent through a socket",
            })?;
        let flags = match window.access {
            DmaAccess::Read => DMA_READ,
            DmaAccess::ReadWrite => DMA_READ | DMA_WRITE,
        };
        let offset = file.start().saturating_add(window.offset as u64);
        self.client()
            .dma_map(
                window.iova,
                window.len as u64,
                flags,
                Some((file.file().as_fd(), offset)),
            )
            .map_err(|e| to_function_error("DMA_MAP", e))
    }

    fn unmap_dma(&self, iova: Iova, len: u64) -> Result<(), FunctionError> {
        self.client()
            .dma_unmap(iova, len)
            .map_err(|e| to_function_error("DMA_UNMAP", e))
    }

    fn set_interrupts(
        &self,
        kind: InterruptKind,
        first: u32,
        events: &[Option<Arc<EventFd>>],
    ) -> Result<(), FunctionError> {
        let batch = self.client().max_msg_fds();
        let mut start = first;
        // One message has descriptors for all of its interrupts or for none of them.
        for run in events.chunk_by(|a, b| a.is_some() == b.is_some()) {
            for part in run.chunks(batch) {
                let request = SetIrqs {
                    index: irq_index(kind),
                    start,
                    count: part.len() as u32,
                    action: IrqAction::Trigger,
                    data: IrqData::EventFd,
                };
                let files: Vec<BorrowedFd<'_>> =
                    part.iter().flatten().map(|event| borrow(event)).collect();
                self.set_irqs(&request, &files)?;
                start += part.len() as u32;
            }
        }
        Ok(())
    }

    fn mask_interrupt(
        &self,
        kind: InterruptKind,
        vector: u32,
        masked: bool,
    ) -> Result<(), FunctionError> {
        let action = if masked {
            IrqAction::Mask
        } else {
            IrqAction::Unmask
        };
        let request = SetIrqs {
            index: irq_index(kind),
            start: vector,
            count: 1,
            action,
            data: IrqData::None,
        };
        self.set_irqs(&request, &[])
    }

    fn reset(&self) -> Result<(), FunctionError> {
        self.client()
            .reset()
            .map_err(|e| to_function_error("DEVICE_RESET", e))
    }
}
