//! A [`Function`] of this host.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::VfioError;
use super::bar::{self, MappedBar, Missed};
use super::device::{Device, Group, IrqAction, Region};
use super::dma::Dma;
use super::interrupts::Interrupts;
use super::msix;
use super::open::{Opened, open};
use crate::PciAddress;
use crate::config::{EXTENDED_SIZE, LEGACY_SIZE, command, header};
use crate::function::{
    DmaWindow, Function, FunctionError, FunctionInfo, InterruptKind, Iova, Notice, RegionIndex,
    RegionInfo,
};
use crate::sysfs::Host;

/// How a function can be reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reset {
    /// By itself: a function level reset, or what else the kernel knows for it.
    Function,
    /// With its slot or bus, where nothing else is.
    Slot,
    /// Not at all.
    None,
}

/// A region and its mapping, if it has one.
struct OpenRegion {
    region: Region,
    bar: Option<MappedBar>,
}

/// A function that the kernel has handed over.
///
/// What goes beyond [`Function`]: [`Self::unplug_requested`] and [`Self::error_reported`].
/// Dropping it gives the function back to the kernel, which ends its DMA and resets it. When it has
/// vanished without the kernel's knowledge, that takes more than a minute, for which the kernel waits
/// for it to come back.
pub struct VfioFunction {
    address: PciAddress,
    info: FunctionInfo,
    // From here on the order matters: mappings before the device, which they keep open; the
    // device before its group, and both before the memory that the device reaches.
    regions: [OpenRegion; RegionIndex::COUNT as usize],
    config: Region,
    interrupts: Interrupts,
    unplug: EventFd,
    error: EventFd,
    reset: Reset,
    device: Device,
    group: Option<Group>,
    dma: Dma,
    /// Gone when all of the above is closed.
    open: Arc<()>,
}

impl VfioFunction {
    /// Takes the function with this address from the kernel. Its driver must be vfio-pci. The kernel
    /// resets it on the way.
    ///
    /// # Errors
    /// Says what is in the way and what to do about it.
    pub fn open(address: PciAddress) -> Result<Self, VfioError> {
        let failed = |what| {
            move |source| VfioError::Io {
                address,
                what,
                source,
            }
        };
        let Opened {
            device,
            group,
            space,
        } = open(&Host::new(), address)?;
        let device_info = device
            .info()
            .map_err(failed("asking what the function is"))?;
        if !device_info.is_pci {
            return Err(VfioError::NotPci { address });
        }
        let dma = Dma::new(space).map_err(failed("asking for the IOMMU's addresses"))?;
        let config = device
            .region(VFIO_PCI_CONFIG_REGION_INDEX)
            .map_err(failed("asking for the configuration space"))?;
        let regions = open_regions(&device, config).map_err(failed("asking for the regions"))?;
        // A kernel refuses to tell of interrupts that cannot exist.
        let irqs = |index| device.irqs(index).unwrap_or_default();
        let interrupts = Interrupts::new(
            irqs(VFIO_PCI_INTX_IRQ_INDEX),
            irqs(VFIO_PCI_MSI_IRQ_INDEX),
            irqs(VFIO_PCI_MSIX_IRQ_INDEX),
        );
        let what = "setting the eventfds for errors and unplugging";
        let listen = |index: u32| -> io::Result<EventFd> {
            let event = EventFd::new(EFD_NONBLOCK)?;
            let exists = index < device_info.irqs && irqs(index).count > 0;
            if exists {
                device.set_irqs(index, 0, IrqAction::Signal(&[event.as_raw_fd()]))?;
            }
            Ok(event)
        };
        let reset = match device_info.resettable {
            true => Reset::Function,
            false if device.is_alone(address) => Reset::Slot,
            false => Reset::None,
        };
        let sizes = regions.iter().map(|open| open.region.size);
        let info = FunctionInfo {
            label: format!("vfio {address}"),
            config_size: if config.size < EXTENDED_SIZE as u64 {
                LEGACY_SIZE as u16
            } else {
                EXTENDED_SIZE as u16
            },
            regions: (0..)
                .map(RegionIndex)
                .zip(sizes)
                .filter(|(_, size)| *size > 0)
                .map(|(index, size)| RegionInfo { index, size })
                .collect(),
            interrupts: interrupts.counts(),
            resettable: reset != Reset::None,
            iova_ranges: dma.ranges().to_vec(),
        };
        Ok(Self {
            address,
            info,
            regions,
            config,
            interrupts,
            unplug: listen(VFIO_PCI_REQ_IRQ_INDEX).map_err(failed(what))?,
            error: listen(VFIO_PCI_ERR_IRQ_INDEX).map_err(failed(what))?,
            reset,
            device,
            group,
            dma,
            open: Arc::default(),
        })
    }

    /// The function's address.
    pub fn address(&self) -> PciAddress {
        self.address
    }

    /// Whether it was opened by its own node, with iommufd, and not by its group's.
    pub fn has_iommufd(&self) -> bool {
        self.group.is_none()
    }

    /// Can be upgraded until the function is closed: dropping it only begins that, and may take long.
    pub fn open_mark(&self) -> Weak<()> {
        Arc::downgrade(&self.open)
    }

    /// Is signalled when the kernel wants the function back, because it is to be unplugged or its
    /// driver is to change, and again and again until it is dropped: the kernel waits for that.
    pub fn unplug_requested(&self) -> &EventFd {
        &self.unplug
    }

    /// Is signalled when the function has reported an uncorrectable error (PCIe AER). It does not
    /// recover without a reset. Never signalled for a function that cannot report any.
    pub fn error_reported(&self) -> &EventFd {
        &self.error
    }

    /// Whether the function still answers: one that has been pulled out reads as all ones.
    pub fn is_present(&self) -> bool {
        // Revision and class: the kernel makes up the ids, and answers for them itself.
        let mut class = [0; 4];
        let at = self.config.offset + header::REVISION as u64;
        self.device.read(at, &mut class).is_ok() && class != [0xff; 4]
    }

    /// The error for an access that the kernel refused, or whose outcome is unknown.
    fn refused(&self, what: String, source: io::Error) -> FunctionError {
        let gone = matches!(source.raw_os_error(), Some(libc::ENODEV | libc::ENXIO));
        if gone || !self.is_present() {
            return FunctionError::Gone(format!("{what} failed and {} is absent", self.address));
        }
        FunctionError::Io { what, source }
    }

    fn config_place(&self, offset: u16, len: usize) -> Result<u64, FunctionError> {
        let end = u64::from(offset).saturating_add(len as u64);
        if end > u64::from(self.info.config_size) {
            return Err(FunctionError::OutOfBounds {
                what: "configuration space".to_owned(),
                offset: offset.into(),
                len,
            });
        }
        Ok(self.config.offset + u64::from(offset))
    }

    fn region(
        &self,
        index: RegionIndex,
        offset: u64,
        len: usize,
    ) -> Result<(&OpenRegion, u64), FunctionError> {
        let region = self.regions.get(usize::from(index.0));
        let Some(open) = region.filter(|open| open.region.size > 0) else {
            return Err(FunctionError::Unsupported(format!(
                "{} has no {index}",
                self.address
            )));
        };
        let end = offset.checked_add(len as u64);
        if end.is_none_or(|end| end > open.region.size) {
            return Err(FunctionError::OutOfBounds {
                what: index.to_string(),
                offset,
                len,
            });
        }
        Ok((open, open.region.offset + offset))
    }

    /// Brings a mapping back whose pages were lost, now that the kernel's way works again.
    fn repair(&self, open: &OpenRegion) {
        let Some(bar) = &open.bar else { return };
        if let Err(error) = bar.repair(self.device.file(), open.region.offset) {
            log::debug!("{}: a BAR stays unmapped: {error}", self.address);
        }
    }

    /// Sets and clears bits of the Command register (PCI 3.0 §6.2.2).
    fn change_command(&self, set: u16, clear: u16) -> Result<(), FunctionError> {
        let mut value = [0; 2];
        self.config_read(header::COMMAND as u16, &mut value)?;
        let value = u16::from_le_bytes(value) & !clear | set;
        self.config_write(header::COMMAND as u16, &value.to_le_bytes())
    }
}

fn open_regions(
    device: &Device,
    config: Region,
) -> io::Result<[OpenRegion; RegionIndex::COUNT as usize]> {
    let table = msix::table_of(|at, data| device.read(config.offset + u64::from(at), data));
    let mut regions = [const {
        OpenRegion {
            region: Region {
                size: 0,
                offset: 0,
                mappable: false,
            },
            bar: None,
        }
    }; RegionIndex::COUNT as usize];
    for (index, open) in (0..).map(RegionIndex).zip(&mut regions) {
        let region = device.region(index.0.into())?;
        let kept_off = table.clone().filter(|(bar, _)| *bar == index);
        let kept_off = kept_off.map_or(0..0, |(_, bytes)| bytes);
        open.region = region;
        if region.mappable && region.size > 0 && bar::POSSIBLE {
            let mapped = MappedBar::new(device.file(), region.offset, region.size, kept_off);
            // The kernel does the accesses then, only slower.
            open.bar = mapped
                .inspect_err(|error| log::info!("{index} is used without a mapping: {error}"))
                .ok();
        }
    }
    Ok(regions)
}

impl Function for VfioFunction {
    fn info(&self) -> &FunctionInfo {
        &self.info
    }

    fn pci_address(&self) -> Option<PciAddress> {
        Some(self.address)
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), FunctionError> {
        let place = self.config_place(offset, data.len())?;
        self.device.read(place, data).map_err(|source| {
            let what = format!("reading configuration space at {offset:#x}");
            self.refused(what, source)
        })
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), FunctionError> {
        let place = self.config_place(offset, data.len())?;
        self.device.write(place, data).map_err(|source| {
            let what = format!("writing configuration space at {offset:#x}");
            self.refused(what, source)
        })
    }

    /// Without a mapping, kernels before 6.11 do an access of 8 bytes as two of 4. The MSI-X table reads as
    /// all ones: it is the kernel's.
    fn region_read(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError> {
        let (open, place) = self.region(region, offset, data.len())?;
        let mapped = open.bar.as_ref().map(|bar| bar.load(offset, data));
        if !matches!(mapped, Some(Ok(()))) {
            self.device.read(place, data).map_err(|source| {
                self.refused(format!("reading {region} at {offset:#x}"), source)
            })?;
            self.repair(open);
        }
        // What a function that was pulled out says of everything.
        if data.len() >= 4 && data.iter().all(|byte| *byte == 0xff) && !self.is_present() {
            return Err(FunctionError::Gone(format!(
                "{} reads as all ones",
                self.address
            )));
        }
        Ok(())
    }

    /// Widths as in [`Self::region_read`]. Writes to the MSI-X table are ignored.
    fn region_write(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError> {
        let (open, place) = self.region(region, offset, data.len())?;
        let what = || format!("writing {region} at {offset:#x}");
        match open.bar.as_ref().map(|bar| bar.store(offset, data)) {
            Some(Ok(())) => return Ok(()),
            // To try again could be once too often.
            Some(Err(Missed::Lost)) => {
                let source = io::Error::other("its memory decoding is off, or it was just reset");
                return Err(self.refused(what(), source));
            }
            Some(Err(Missed::NotTried)) | None => {}
        }
        self.device
            .write(place, data)
            .map_err(|source| self.refused(what(), source))?;
        self.repair(open);
        Ok(())
    }

    fn map_dma(&self, window: &DmaWindow) -> Result<(), FunctionError> {
        self.dma.map(window)
    }

    fn unmap_dma(&self, iova: Iova, len: u64) -> Result<(), FunctionError> {
        self.dma.unmap(iova, len)
    }

    /// One kind at a time. INTx is masked whenever it fires; unmask it once it is served.
    fn set_interrupts(
        &self,
        kind: InterruptKind,
        first: u32,
        events: &[Option<Arc<EventFd>>],
    ) -> Result<(), FunctionError> {
        self.interrupts.set(&self.device, kind, first, events)
    }

    fn mask_interrupt(
        &self,
        kind: InterruptKind,
        vector: u32,
        masked: bool,
    ) -> Result<(), FunctionError> {
        self.interrupts.mask(&self.device, kind, vector, masked)
    }

    /// The kernel restores what it had in configuration space; memory decoding and bus mastering
    /// are off afterwards all the same, as after power-on.
    fn reset(&self) -> Result<(), FunctionError> {
        // The kernel would wait more than a minute for it to come back.
        if !self.is_present() {
            return Err(FunctionError::Gone(format!("{} is absent", self.address)));
        }
        // Bus mastering is off first, so that the kernel does not restore it. Memory decoding is on:
        // the kernel restores the MSI-X table, and does not look whether its writes arrive.
        self.change_command(command::MEMORY, command::BUS_MASTER)?;
        let outcome = match self.reset {
            Reset::Function => self.device.reset(),
            Reset::Slot => self.device.hot_reset(self.group.as_ref()),
            Reset::None => {
                return Err(FunctionError::Unsupported(format!(
                    "{} has no reset of its own, and no slot that can be reset without others",
                    self.address
                )));
            }
        };
        outcome.map_err(|source| self.refused(format!("resetting {}", self.address), source))?;
        self.change_command(0, command::IO | command::MEMORY | command::BUS_MASTER)
    }

    fn notices(&self) -> Vec<(Notice, &EventFd)> {
        vec![
            (Notice::UnplugRequested, &self.unplug),
            (Notice::ErrorReported, &self.error),
        ]
    }
}
