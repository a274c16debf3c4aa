//! How a function is taken hold of for a claim, and let go of at its end.

use std::collections::VecDeque;
use std::sync::Arc;

use farbus_vfio::nvme::PCI_CLASS;
use farbus_vfio::{DmaAccess, DmaWindow, Function, FunctionInfo, InterruptKind, Iova};
use log::warn;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::description::{MAX_QUEUE_PAIRS, Namespaces, NvmeDescription};
use super::arena::Arena;
use super::controller::Controller;
use super::error::DeviceError;
use super::identity::Identity;
use super::lanes::Lanes;
use super::queues::Io;
use super::settings::Settings;
use super::{DeviceHalf, Limits, MAX_OUTBOX};
use crate::shadow::shared_memory;

impl DeviceHalf {
    /// Takes hold of a function: resets it, gives it the claim's fresh memory, and asks it
    /// what it is.
    pub fn open(function: Arc<dyn Function>, limits: Limits) -> Result<Self, DeviceError> {
        Self::open_as(function, limits, None)
    }

    /// As [`Self::open`], of a function that had [`Self::settings`] before its first tenant:
    /// it has them again.
    pub fn open_as(
        function: Arc<dyn Function>,
        limits: Limits,
        settings: Option<&Settings>,
    ) -> Result<Self, DeviceError> {
        check_class(function.as_ref())?;
        let info = function.info();
        if info.resettable {
            function.reset()?;
        }
        let (kind, vectors) = match info.interrupts {
            counts if counts.msix > 0 => (InterruptKind::Msix, counts.msix),
            counts if counts.msi > 0 => (InterruptKind::Msi, counts.msi),
            _ => return Err(DeviceError::NoInterrupts),
        };
        let shadow_len = limits.shadow_len as usize;
        let arena_len = Arena::len_for(MAX_QUEUE_PAIRS, limits.tags);
        let base = find_iova(info, Iova(0), (shadow_len + arena_len) as u64)?;
        let memory = shared_memory("farbus-shadow", shadow_len).map_err(DeviceError::Memory)?;
        let shadow = DmaWindow {
            iova: base,
            memory,
            offset: 0,
            len: shadow_len,
            access: DmaAccess::ReadWrite,
        };
        let arena_base = Iova(base.0 + shadow_len as u64);
        let arena =
            Arena::new(arena_base, MAX_QUEUE_PAIRS, limits.tags).map_err(DeviceError::Memory)?;
        let event = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(DeviceError::Memory)?);
        let events = vec![Some(event.clone()); vectors as usize];
        let controller = Controller::new(function.clone())?;
        let mut half = Self {
            io: Io::new(controller.doorbells(), Arc::new(arena), shadow, &limits),
            lanes: Lanes::none(event.clone()),
            controller,
            description: NvmeDescription {
                cap: 0,
                vs: 0,
                max_transfer: limits.max_transfer,
                queue_pairs: 1,
                namespaces: Namespaces::default(),
            },
            settings: Settings::default(),
            identity: Identity::default(),
            host_memory: None,
            limits,
            vectors,
            event,
            is_looked_at: false,
            gone: None,
            outbox: VecDeque::with_capacity(2 * MAX_OUTBOX),
            function,
        };
        half.function.map_dma(&half.io.shadow)?;
        half.function.map_dma(&half.io.arena.window())?;
        half.function.set_interrupts(kind, 0, &events)?;
        half.probe(settings)?;
        Ok(half)
    }
}

impl Drop for DeviceHalf {
    /// The order matters: a function that is reset does no more DMA, so its memory can go.
    fn drop(&mut self) {
        self.close_lanes();
        let label = &self.function.info().label;
        if let Err(error) = self.controller.stop_now() {
            warn!("{label}: could not be disabled: {error}");
        }
        if self.function.info().resettable {
            if let Err(error) = self.function.reset() {
                warn!("{label}: could not be reset: {error}");
            }
        }
        let silent = vec![None; self.vectors as usize];
        for kind in [InterruptKind::Msix, InterruptKind::Msi] {
            if self.function.info().interrupts.of(kind) > 0 {
                let _ = self.function.set_interrupts(kind, 0, &silent);
                break;
            }
        }
        let arena = self.io.arena.window();
        for window in [&self.io.shadow, &arena]
            .into_iter()
            .chain(&self.host_memory)
        {
            if let Err(error) = self.function.unmap_dma(window.iova, window.len as u64) {
                warn!("{label}: could not take memory back: {error}");
            }
        }
    }
}

/// Looks before anything is written whether this is an NVMe controller (PCI 3.0 §6.2.1: class
/// code at offset 9).
fn check_class(function: &dyn Function) -> Result<(), DeviceError> {
    let mut code = [0; 4];
    function.config_read(0x08, &mut code)?;
    match u32::from_le_bytes(code) >> 8 {
        PCI_CLASS => Ok(()),
        // The ids may be the kernel's, who answers for them; revision and class are not.
        0xff_ffff => Err(DeviceError::NoAnswer {
            what: "configuration space reads as all ones",
            address: function.pci_address(),
        }),
        class => Err(DeviceError::NoEngine { class }),
    }
}

/// A place for `len` bytes in the function's address space at `from` or behind, away from
/// address 0.
pub(super) fn find_iova(info: &FunctionInfo, from: Iova, len: u64) -> Result<Iova, DeviceError> {
    const ALIGN: u64 = 2 << 20;
    let from = from.0.max(ALIGN);
    info.iova_ranges
        .iter()
        .find_map(|range| {
            let base = range.start().max(&from).checked_next_multiple_of(ALIGN)?;
            let end = base.checked_add(len - 1)?;
            (end <= *range.end()).then_some(Iova(base))
        })
        .ok_or(DeviceError::NoIova { len })
}
