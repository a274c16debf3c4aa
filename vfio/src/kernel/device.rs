//! The three kinds of descriptors of VFIO: container, group and device.
//!
//! Everything that the kernel says arrives here as a value or an error; layouts are those of
//! `linux/vfio.h`.

#![forbid(unsafe_code)]

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::{offset_of, size_of};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_DMA_MAP_FLAG_READ,
    VFIO_DMA_MAP_FLAG_WRITE, VFIO_GROUP_FLAGS_VIABLE, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
    VFIO_IRQ_INFO_NORESIZE, VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE, VFIO_TYPE1v2_IOMMU, vfio_device_info, vfio_group_status,
    vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap, vfio_iommu_type1_info,
    vfio_iommu_type1_info_cap_iova_range, vfio_irq_info, vfio_irq_set, vfio_pci_dependent_device,
    vfio_pci_hot_reset, vfio_pci_hot_reset_info, vfio_region_info,
};
use vm_memory::VolatileSlice;

use super::sys::{Args, Plain, Structured, device_of, plain, set_container, structured};
use crate::PciAddress;
use crate::function::{DmaAccess, Iova};

/// Longer answers than this one are none that a kernel gives.
const MAX_ANSWER: usize = 1 << 16;

/// An address space for DMA.
pub(super) struct Container(File);

/// What the kernel says of a container's IOMMU.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct IommuInfo {
    /// Bit n is set when pages of 2^n bytes can be mapped.
    pub(super) page_sizes: u64,
    /// Valid IOVAs; `None` with a kernel that does not tell.
    pub(super) ranges: Option<Vec<RangeInclusive<u64>>>,
}

impl Container {
    pub(super) fn open(node: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(node)?;
        Ok(Self(file))
    }

    /// What the kernel lacks, if it lacks something.
    pub(super) fn lacks(&self) -> io::Result<Option<&'static str>> {
        if plain(self.0.as_fd(), Plain::GetApiVersion, 0)? != VFIO_API_VERSION {
            return Ok(Some("version 0 of the interface"));
        }
        let type1 = plain(self.0.as_fd(), Plain::CheckExtension, VFIO_TYPE1v2_IOMMU)?;
        Ok((type1 == 0).then_some("the type 1 v2 IOMMU driver (module vfio_iommu_type1)"))
    }

    pub(super) fn set_iommu(&self) -> io::Result<()> {
        plain(self.0.as_fd(), Plain::SetIommu, VFIO_TYPE1v2_IOMMU).map(drop)
    }

    pub(super) fn iommu_info(&self) -> io::Result<IommuInfo> {
        type Info = vfio_iommu_type1_info;
        let args = |args: &mut Args| structured(self.0.as_fd(), Structured::IommuGetInfo, args);
        let answer = with_capabilities(size_of::<Info>(), args)?;
        let capabilities = answer.u32(offset_of!(Info, cap_offset)) as usize;
        Ok(IommuInfo {
            page_sizes: answer.u64(offset_of!(Info, iova_pgsizes)),
            ranges: capability(&answer, capabilities, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE)
                .map(|at| iova_ranges(&answer, at)),
        })
    }

    /// See [`super::space::Space::map_dma`].
    pub(super) fn map_dma(
        &self,
        iova: Iova,
        memory: &VolatileSlice<'_>,
        access: DmaAccess,
    ) -> io::Result<()> {
        type Map = vfio_iommu_type1_dma_map;
        let flags = match access {
            DmaAccess::Read => VFIO_DMA_MAP_FLAG_READ,
            DmaAccess::ReadWrite => VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        };
        let mut args = Args::new(size_of::<Map>());
        args.set_u32(offset_of!(Map, flags), flags);
        args.set_u64(
            offset_of!(Map, vaddr),
            memory.ptr_guard_mut().as_ptr() as u64,
        );
        args.set_u64(offset_of!(Map, iova), iova.0);
        args.set_u64(offset_of!(Map, size), memory.len() as u64);
        structured(self.0.as_fd(), Structured::IommuMapDma, &mut args).map(drop)
    }

    /// See [`super::space::Space::unmap_dma`].
    pub(super) fn unmap_dma(&self, iova: Iova, len: u64) -> io::Result<u64> {
        type Unmap = vfio_iommu_type1_dma_unmap;
        let mut args = Args::new(size_of::<Unmap>());
        args.set_u64(offset_of!(Unmap, iova), iova.0);
        args.set_u64(offset_of!(Unmap, size), len);
        structured(self.0.as_fd(), Structured::IommuUnmapDma, &mut args)?;
        Ok(args.u64(offset_of!(Unmap, size)))
    }
}

/// An IOMMU group: functions that the IOMMU cannot keep apart.
pub(super) struct Group(File);

impl Group {
    pub(super) fn open(node: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(node)?;
        Ok(Self(file))
    }

    pub(super) fn is_viable(&self) -> io::Result<bool> {
        let mut args = Args::new(size_of::<vfio_group_status>());
        structured(self.0.as_fd(), Structured::GroupGetStatus, &mut args)?;
        let flags = args.u32(offset_of!(vfio_group_status, flags));
        Ok(flags & VFIO_GROUP_FLAGS_VIABLE != 0)
    }

    pub(super) fn enter(&self, container: &Container) -> io::Result<()> {
        set_container(self.0.as_fd(), container.0.as_fd())
    }

    pub(super) fn device(&self, name: &CStr) -> io::Result<Device> {
        device_of(self.0.as_fd(), name).map(Device)
    }
}

/// A function.
pub(super) struct Device(File);

/// What the kernel says of a function.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeviceInfo {
    pub(super) is_pci: bool,
    pub(super) resettable: bool,
    pub(super) irqs: u32,
}

/// What the kernel says of a region.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Region {
    /// In bytes; 0 when there is no such region.
    pub(super) size: u64,
    /// Where in the device's descriptor it begins.
    pub(super) offset: u64,
    /// All of it can be mapped, for reading and writing.
    pub(super) mappable: bool,
}

/// What the kernel says of the interrupts of one index.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Irqs {
    pub(super) count: u32,
    /// All that are to be used have to be enabled at once.
    pub(super) fixed: bool,
}

/// What to do with the interrupts `start ..` of an index.
#[derive(Clone, Copy, Debug)]
pub(super) enum IrqAction<'a> {
    /// Signal these descriptors; -1 for none.
    Signal(&'a [RawFd]),
    /// Mask one.
    Mask,
    /// Unmask one.
    Unmask,
    /// Disable all of the index.
    Disable,
}

impl Device {
    /// By its own node. It answers only once it is bound to an iommufd.
    pub(super) fn open(node: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(node)?;
        Ok(Self(file))
    }

    pub(super) fn info(&self) -> io::Result<DeviceInfo> {
        let mut args = Args::new(size_of::<vfio_device_info>());
        structured(self.0.as_fd(), Structured::DeviceGetInfo, &mut args)?;
        let flags = args.u32(offset_of!(vfio_device_info, flags));
        Ok(DeviceInfo {
            is_pci: flags & VFIO_DEVICE_FLAGS_PCI != 0,
            resettable: flags & VFIO_DEVICE_FLAGS_RESET != 0,
            irqs: args.u32(offset_of!(vfio_device_info, num_irqs)),
        })
    }

    pub(super) fn region(&self, index: u32) -> io::Result<Region> {
        type Info = vfio_region_info;
        const ALL: u32 =
            VFIO_REGION_INFO_FLAG_MMAP | VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
        let answer = with_capabilities(size_of::<Info>(), |args| {
            args.set_u32(offset_of!(Info, index), index);
            structured(self.0.as_fd(), Structured::DeviceGetRegionInfo, args)
        })?;
        let capabilities = answer.u32(offset_of!(Info, cap_offset)) as usize;
        let sparse = capability(&answer, capabilities, VFIO_REGION_INFO_CAP_SPARSE_MMAP);
        Ok(Region {
            size: answer.u64(offset_of!(Info, size)),
            offset: answer.u64(offset_of!(Info, offset)),
            mappable: answer.u32(offset_of!(Info, flags)) & ALL == ALL && sparse.is_none(),
        })
    }

    pub(super) fn irqs(&self, index: u32) -> io::Result<Irqs> {
        type Info = vfio_irq_info;
        let mut args = Args::new(size_of::<Info>());
        args.set_u32(offset_of!(Info, index), index);
        structured(self.0.as_fd(), Structured::DeviceGetIrqInfo, &mut args)?;
        Ok(Irqs {
            count: args.u32(offset_of!(Info, count)),
            fixed: args.u32(offset_of!(Info, flags)) & VFIO_IRQ_INFO_NORESIZE != 0,
        })
    }

    pub(super) fn set_irqs(&self, index: u32, start: u32, action: IrqAction<'_>) -> io::Result<()> {
        type Set = vfio_irq_set;
        let (flags, count) = match action {
            IrqAction::Signal(fds) => (
                VFIO_IRQ_SET_ACTION_TRIGGER | VFIO_IRQ_SET_DATA_EVENTFD,
                fds.len() as u32,
            ),
            IrqAction::Mask => (VFIO_IRQ_SET_ACTION_MASK | VFIO_IRQ_SET_DATA_NONE, 1),
            IrqAction::Unmask => (VFIO_IRQ_SET_ACTION_UNMASK | VFIO_IRQ_SET_DATA_NONE, 1),
            IrqAction::Disable => (VFIO_IRQ_SET_ACTION_TRIGGER | VFIO_IRQ_SET_DATA_NONE, 0),
        };
        let fds = match action {
            IrqAction::Signal(fds) => fds,
            _ => &[],
        };
        let data = offset_of!(Set, data);
        let mut args = Args::new(data + size_of_val(fds));
        args.set_u32(offset_of!(Set, flags), flags);
        args.set_u32(offset_of!(Set, index), index);
        args.set_u32(offset_of!(Set, start), start);
        args.set_u32(offset_of!(Set, count), count);
        for (at, fd) in (data..).step_by(size_of::<RawFd>()).zip(fds) {
            args.set_u32(at, *fd as u32);
        }
        // A positive answer is how many vectors the kernel could have had.
        match structured(self.0.as_fd(), Structured::DeviceSetIrqs, &mut args)? {
            0 => Ok(()),
            available => Err(io::Error::new(
                io::ErrorKind::OutOfMemory,
                format!("the kernel has only {available} interrupt vectors for the function"),
            )),
        }
    }

    pub(super) fn reset(&self) -> io::Result<()> {
        plain(self.0.as_fd(), Plain::DeviceReset, 0).map(drop)
    }

    /// Whether a reset of its slot or bus would reset the function and nothing else.
    pub(super) fn is_alone(&self, address: PciAddress) -> bool {
        type Info = vfio_pci_hot_reset_info;
        type Dependent = vfio_pci_dependent_device;
        let first = offset_of!(Info, devices);
        // With room for one, more than one are refused (ENOSPC).
        let mut args = Args::new(first + size_of::<Dependent>());
        if structured(self.0.as_fd(), Structured::DeviceGetHotResetInfo, &mut args).is_err() {
            return false;
        }
        let segment = args.u16(first + offset_of!(Dependent, segment));
        let [bus, devfn] = args.u16(first + offset_of!(Dependent, bus)).to_ne_bytes();
        args.u32(offset_of!(Info, count)) == 1
            && Some(address) == PciAddress::new(segment.into(), bus, devfn >> 3, devfn & 7)
    }

    /// Resets the slot or the bus of the function, all of whose functions are in `group`. With
    /// iommufd no group has to prove whose they are.
    pub(super) fn hot_reset(&self, group: Option<&Group>) -> io::Result<()> {
        type Reset = vfio_pci_hot_reset;
        let fds = offset_of!(Reset, group_fds);
        let mut args = Args::new(fds + group.map_or(0, |_| size_of::<RawFd>()));
        if let Some(group) = group {
            args.set_u32(offset_of!(Reset, count), 1);
            args.set_u32(fds, group.0.as_raw_fd() as u32);
        }
        structured(self.0.as_fd(), Structured::DeviceHotReset, &mut args).map(drop)
    }

    /// Reads all of `data` from `offset` of the descriptor on.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(data, offset)
    }

    /// Writes all of `data` from `offset` of the descriptor on.
    pub(super) fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }

    /// The file, for mapping its regions.
    pub(super) fn file(&self) -> &File {
        &self.0
    }
}

/// Calls with room for what the kernel says first, and again with as much as it has to say.
fn with_capabilities(len: usize, call: impl Fn(&mut Args) -> io::Result<u32>) -> io::Result<Args> {
    let mut args = Args::new(len);
    call(&mut args)?;
    let wanted = args.wanted();
    if wanted > len {
        args = Args::new(wanted.min(MAX_ANSWER));
        call(&mut args)?;
    }
    Ok(args)
}

/// Where in an answer the capability with this id is (`struct vfio_info_cap_header`: id,
/// version, offset of the next one; 0 ends the chain).
fn capability(answer: &Args, first: usize, id: u32) -> Option<usize> {
    let mut at = first;
    // Each has at least 8 bytes, which bounds a chain that runs in circles.
    for _ in 0..MAX_ANSWER / 8 {
        if at == 0 {
            return None;
        }
        if u32::from(answer.u16(at)) == id {
            return Some(at);
        }
        at = answer.u32(at.saturating_add(4)) as usize;
    }
    None
}

fn iova_ranges(answer: &Args, at: usize) -> Vec<RangeInclusive<u64>> {
    type Capability = vfio_iommu_type1_info_cap_iova_range;
    let count = answer.u32(at + offset_of!(Capability, nr_iovas)) as usize;
    (0..count.min(MAX_ANSWER / 16))
        .map(|n| at + offset_of!(Capability, iova_ranges) + 16 * n)
        .map(|range| answer.u64(range)..=answer.u64(range + 8))
        .filter(|range| !range.is_empty() && *range.end() != 0)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer with a chain of two capabilities: 7 at 24, IOVA ranges at 32.
    fn answer() -> Args {
        let mut args = Args::new(32 + 16 + 2 * 16);
        args.set_u32(24, 7 | 1 << 16);
        args.set_u32(28, 32);
        args.set_u32(32, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE | 1 << 16);
        args.set_u32(32 + 8, 2);
        args.set_u64(48 + 8, 0xfedf_ffff);
        args.set_u64(64, 0xfef0_0000);
        args.set_u64(64 + 8, 0x7f_ffff_ffff);
        args
    }

    #[test]
    fn iova_ranges_are_found_behind_other_capabilities() {
        let answer = answer();
        let at = capability(&answer, 24, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE).unwrap();
        let ranges = iova_ranges(&answer, at);
        assert_eq!(ranges, [0..=0xfedf_ffff, 0xfef0_0000..=0x7f_ffff_ffff]);
        assert_eq!(capability(&answer, 24, 9), None);
        assert_eq!(capability(&answer, 0, 7), None);
    }

    #[test]
    fn chain_in_a_circle_and_ranges_behind_the_end_are_survived() {
        let mut answer = answer();
        answer.set_u32(28, 24);
        assert_eq!(capability(&answer, 24, 9), None);
        answer.set_u32(32 + 8, u32::MAX);
        assert_eq!(iova_ranges(&answer, 32).len(), 2);
    }
}
