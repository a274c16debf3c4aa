//! What a function's DMA goes through: a container of VFIO's own, or an address space of iommufd.

#![forbid(unsafe_code)]

use std::io;

use vm_memory::VolatileSlice;

use super::device::{Container, IommuInfo};
use super::iommufd::AddressSpace;
use crate::function::{DmaAccess, Iova};

/// An address space for DMA.
pub(super) enum Space {
    /// With the group's node.
    Container(Container),
    /// With the function's own.
    Iommufd(AddressSpace),
}

impl Space {
    pub(super) fn iommu_info(&self) -> io::Result<IommuInfo> {
        match self {
            Self::Container(container) => container.iommu_info(),
            Self::Iommufd(space) => space.iommu_info(),
        }
    }

    /// Lets the function reach memory. The kernel takes hold of the pages that `memory` has now and
    /// keeps them until they are unmapped, so the function reaches these and no others, whatever
    /// becomes of the mapping.
    pub(super) fn map_dma(
        &self,
        iova: Iova,
        memory: &VolatileSlice<'_>,
        access: DmaAccess,
    ) -> io::Result<()> {
        match self {
            Self::Container(container) => container.map_dma(iova, memory, access),
            Self::Iommufd(space) => space.map_dma(iova, memory, access),
        }
    }

    /// Unmaps whole windows; returns how many bytes were mapped there.
    pub(super) fn unmap_dma(&self, iova: Iova, len: u64) -> io::Result<u64> {
        match self {
            Self::Container(container) => container.unmap_dma(iova, len),
            Self::Iommufd(space) => space.unmap_dma(iova, len),
        }
    }
}
