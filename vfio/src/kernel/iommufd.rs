//! The address space of a function that is opened by its own device node: an IOAS of iommufd
//! (Linux 6.6 and newer, where it is configured). Layouts are those of `linux/iommufd.h`.

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use iommufd_bindings::iommufd::{
    iommu_ioas_alloc, iommu_ioas_map, iommu_ioas_unmap,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA as FIXED,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE as READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE as WRITEABLE,
};
use vfio_bindings::bindings::vfio::{vfio_device_attach_iommufd_pt, vfio_device_bind_iommufd};
use vm_memory::VolatileSlice;

use super::device::{Device, IommuInfo};
use super::sys::{Args, Structured, iova_ranges, structured};
use crate::function::{DmaAccess, Iova};

/// Ranges that are asked for at first; most IOMMUs have two or three.
const RANGES: usize = 16;

/// iommufd, with one address space for one function.
pub(super) struct AddressSpace {
    iommufd: File,
    ioas: u32,
}

impl AddressSpace {
    /// An address space that no function is in.
    pub(super) fn new(node: &Path) -> io::Result<Self> {
        let iommufd = OpenOptions::new().read(true).write(true).open(node)?;
        let mut args = Args::new(size_of::<iommu_ioas_alloc>());
        structured(iommufd.as_fd(), Structured::IoasAllocate, &mut args)?;
        let ioas = args.u32(offset_of!(iommu_ioas_alloc, out_ioas_id));
        Ok(Self { iommufd, ioas })
    }

    /// Becomes the owner of a function's DMA. Before that the function can be asked nothing.
    pub(super) fn bind(&self, device: &Device) -> io::Result<()> {
        type Bind = vfio_device_bind_iommufd;
        let mut args = Args::new(size_of::<Bind>());
        args.set_u32(offset_of!(Bind, iommufd), self.iommufd.as_raw_fd() as u32);
        structured(
            device.file().as_fd(),
            Structured::DeviceBindIommufd,
            &mut args,
        )
        .map(drop)
    }

    /// Has the function see this address space and nothing else.
    pub(super) fn attach(&self, device: &Device) -> io::Result<()> {
        type Attach = vfio_device_attach_iommufd_pt;
        // The structure grows with newer kernels; this is all that the first one has.
        let mut args = Args::new(offset_of!(Attach, pt_id) + size_of::<u32>());
        args.set_u32(offset_of!(Attach, pt_id), self.ioas);
        structured(
            device.file().as_fd(),
            Structured::DeviceAttachIoas,
            &mut args,
        )
        .map(drop)
    }

    /// What can be mapped, now that a function is attached.
    pub(super) fn iommu_info(&self) -> io::Result<IommuInfo> {
        let mut ranges = vec![[0; 2]; RANGES];
        let alignment = match iova_ranges(self.iommufd.as_fd(), self.ioas, &mut ranges) {
            // There is room for all of them now.
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                iova_ranges(self.iommufd.as_fd(), self.ioas, &mut ranges)?
            }
            answer => answer?,
        };
        Ok(IommuInfo {
            page_sizes: alignment,
            ranges: Some(ranges.iter().map(|[first, last]| *first..=*last).collect()),
        })
    }

    /// See [`super::space::Space::map_dma`].
    pub(super) fn map_dma(
        &self,
        iova: Iova,
        memory: &VolatileSlice<'_>,
        access: DmaAccess,
    ) -> io::Result<()> {
        type Map = iommu_ioas_map;
        let flags = match access {
            DmaAccess::Read => FIXED | READABLE,
            DmaAccess::ReadWrite => FIXED | READABLE | WRITEABLE,
        };
        let mut args = Args::new(size_of::<Map>());
        args.set_u32(offset_of!(Map, flags), flags);
        args.set_u32(offset_of!(Map, ioas_id), self.ioas);
        let address = memory.ptr_guard_mut().as_ptr() as u64;
        args.set_u64(offset_of!(Map, user_va), address);
        args.set_u64(offset_of!(Map, length), memory.len() as u64);
        args.set_u64(offset_of!(Map, iova), iova.0);
        structured(self.iommufd.as_fd(), Structured::IoasMap, &mut args).map(drop)
    }

    /// See [`super::space::Space::unmap_dma`].
    pub(super) fn unmap_dma(&self, iova: Iova, len: u64) -> io::Result<u64> {
        type Unmap = iommu_ioas_unmap;
        let mut args = Args::new(size_of::<Unmap>());
        args.set_u32(offset_of!(Unmap, ioas_id), self.ioas);
        args.set_u64(offset_of!(Unmap, iova), iova.0);
        args.set_u64(offset_of!(Unmap, length), len);
        structured(self.iommufd.as_fd(), Structured::IoasUnmap, &mut args)?;
        Ok(args.u64(offset_of!(Unmap, length)))
    }
}
