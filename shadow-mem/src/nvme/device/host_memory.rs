//! Memory for devices that ask for a host memory buffer (NVMe 1.4 §8.9). A device may use it
//! at any time, so it cannot be the guest's, which is across the network: the device half
//! lends memory of the device server and the guest is told that none is wanted.

use std::sync::Arc;

use farbus_vfio::nvme::{PAGE_SIZE, SubmissionEntry, admin};
use farbus_vfio::{DmaAccess, DmaWindow, Iova};
use log::{info, warn};

use super::super::identify;
use super::super::transfer::feature;
use super::hold::find_iova;
use super::{DeviceError, DeviceHalf};
use crate::shadow::shared_memory;

/// Most that is lent to one device, in bytes.
const MAX_LEN: u64 = 32 << 20;

/// How much to lend to a device that prefers one size and needs another, in bytes; 0 for
/// nothing.
pub(super) fn len_to_lend(preferred: u64, minimum: u64) -> u64 {
    let len = preferred.min(MAX_LEN);
    if len < minimum { 0 } else { len }
}

impl DeviceHalf {
    /// Makes ready what the controller asks for, if it does.
    pub(super) fn prepare_host_memory(&mut self, controller: &[u8]) -> Result<(), DeviceError> {
        let (preferred, minimum) = identify::host_memory_wanted(controller);
        let len = len_to_lend(preferred, minimum);
        if len == 0 {
            return Ok(());
        }
        let arena = self.io.arena.window();
        let behind = Iova(arena.iova.0 + arena.len as u64);
        let memory = shared_memory("farbus-hmb", len as usize).map_err(DeviceError::Memory)?;
        let window = DmaWindow {
            iova: find_iova(self.function.info(), behind, len)?,
            memory: Arc::clone(&memory),
            offset: 0,
            len: len as usize,
            access: DmaAccess::ReadWrite,
        };
        self.function.map_dma(&window)?;
        info!(
            "{}: lends {} MiB of host memory",
            self.function.info().label,
            len >> 20
        );
        self.host_memory = Some(window);
        Ok(())
    }

    /// Tells a controller that has just become ready about its memory. It works without, only
    /// slower, so a refusal is no failure.
    pub(super) fn lend_host_memory(&mut self) {
        let Some(window) = &self.host_memory else {
            return;
        };
        let pages = (window.len / PAGE_SIZE) as u32;
        self.io
            .arena
            .write_own_page(&host_memory_descriptor(window.iova, pages));
        let list = self.io.arena.own_page().0;
        let mut sqe = SubmissionEntry::new(admin::SET_FEATURES);
        sqe.set_dword(10, feature::HOST_MEMORY_BUFFER.into());
        sqe.set_dword(11, 1);
        sqe.set_dword(12, pages);
        sqe.set_dword(13, list as u32);
        sqe.set_dword(14, (list >> 32) as u32);
        sqe.set_dword(15, 1);
        let label = &self.function.info().label.clone();
        match self.run(sqe) {
            Ok(cqe) if cqe.status.is_success() => {}
            Ok(cqe) => warn!(
                "{label}: refuses host memory with status {:#x}",
                cqe.status.0
            ),
            Err(error) => warn!("{label}: {error}"),
        }
    }
}

/// A list of one descriptor (NVMe 1.4 §5.21.1.13, figure 294): address, then size in pages.
fn host_memory_descriptor(address: Iova, pages: u32) -> [u8; 16] {
    let mut entry = [0; 16];
    entry[..8].copy_from_slice(&address.0.to_le_bytes());
    entry[8..12].copy_from_slice(&pages.to_le_bytes());
    entry
}
