//! The guest's memory: what the VMM hands over is given to the drive at guest addresses, so that
//! the drive's commands name a request's buffers themselves, and is read here for rings and headers.

#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use farbus_vfio::{DmaAccess, DmaWindow, Function, FunctionError, Iova};
use rustix::fs::fstat;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionCollection, GuestUsize, MemoryRegionAddress, VolatileMemory, VolatileSlice,
};
use vmm_sys_util::eventfd::EventFd;

use crate::guest_memory::{GuestMemory, MapError, MapRequest};

/// Where the drive sees memory of this process (queues, PRP lists, bounce buffers). No guest
/// address is this high, and none is accepted that is.
pub const PRIVATE_IOVA: Iova = Iova(1 << 51);
/// Most regions at once.
pub const MAX_REGIONS: usize = 256;

/// Why a region is not taken or given back.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The memory cannot be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The function does not take it.
    #[error(transparent)]
    Function(#[from] FunctionError),
    /// It reaches into addresses that are not for guests.
    #[error("guest memory at {0:#x} is beyond what a guest can have")]
    TooHigh(u64),
    /// There are too many.
    #[error("there are {MAX_REGIONS} regions of guest memory already")]
    TooMany,
    /// Two regions overlap.
    #[error("regions of guest memory overlap")]
    Overlap,
    /// The region to remove is not there.
    #[error("there is no region of {size:#x} bytes at {address:#x}")]
    Unknown {
        /// Where it should be.
        address: u64,
        /// Its length in bytes.
        size: u64,
    },
}

/// What the VMM says of a region, and which file it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    address: u64,
    size: u64,
    user: u64,
    offset: u64,
    file: Option<(u64, u64)>,
}

/// One region.
#[derive(Clone, Debug)]
pub struct Region {
    identity: Identity,
    window: DmaWindow,
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.identity.size
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.identity.address)
    }

    fn bitmap(&self) {}

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_>, GuestMemoryError> {
        let invalid = GuestMemoryError::InvalidBackendAddress;
        let start = usize::try_from(offset.0).map_err(|_| invalid)?;
        let invalid = || GuestMemoryError::InvalidBackendAddress;
        let end = start.checked_add(count).ok_or_else(invalid)?;
        if end > self.window.len {
            return Err(invalid());
        }
        let at = self.window.offset + start;
        self.window
            .memory
            .get_slice(at, count)
            .map_err(|_| invalid())
    }
}

impl GuestMemoryRegionBytes for Region {}

/// Guest memory as `virtio-queue` and the parsers take it.
pub type Guest = GuestRegionCollection<Region>;

/// Where in which region the VMM has something at one of its own addresses.
pub fn by_user(guest: &Guest, user: u64) -> Option<(&Region, MemoryRegionAddress)> {
    guest.iter().find_map(|region| {
        let offset = user.checked_sub(region.identity.user)?;
        (offset < region.identity.size).then_some((region, MemoryRegionAddress(offset)))
    })
}

/// Whether the VMM has shared all of its own memory from `user` on, and `more` bytes after that.
pub fn has_user_range(guest: &Guest, user: u64, more: u64) -> bool {
    let (mut at, mut more) = (user, more);
    while let Some((region, offset)) = by_user(guest, at) {
        let here = region.identity.size - offset.0;
        if more < here {
            return true;
        }
        more -= here;
        match at.checked_add(here) {
            Some(next) => at = next,
            None => return false,
        }
    }
    false
}

/// All memory of one client.
pub struct Memory {
    function: Arc<dyn Function>,
    mapped: GuestMemory,
    regions: Vec<Arc<Region>>,
    guest: Guest,
}

impl Memory {
    /// No memory yet. `lost` is signalled when a file of it turns out to be truncated.
    pub fn new(function: Arc<dyn Function>, lost: Arc<EventFd>) -> Self {
        Self {
            function,
            mapped: GuestMemory::new(lost),
            regions: Vec::new(),
            guest: Guest::new(),
        }
    }

    /// What there is.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// Whether a file of it was truncated while it was in use.
    pub fn lost(&self) -> bool {
        self.mapped.lost()
    }

    /// The guest address of what the VMM has at one of its own addresses.
    pub fn address_of(&self, user: u64) -> Option<u64> {
        let (region, offset) = by_user(&self.guest, user)?;
        Some(region.identity.address + offset.0)
    }

    /// Replaces all regions. Those that stay are not touched, so that requests go on in them.
    pub fn replace(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        peer: Option<u32>,
    ) -> Result<(), RegionError> {
        let wanted: Vec<_> = regions.iter().map(identity).zip(files).collect();
        let identities: Vec<_> = wanted
            .iter()
            .map(|(wanted, file)| with_file(*wanted, file))
            .collect();
        let gone: Vec<_> = self
            .regions
            .iter()
            .filter(|region| !identities.contains(&region.identity))
            .map(|region| region.identity)
            .collect();
        for identity in gone {
            self.unmap(identity)?;
        }
        for (identity, file) in identities.into_iter().zip(wanted.into_iter().map(|w| w.1)) {
            if !self.regions.iter().any(|r| r.identity == identity) {
                self.map(identity, file, peer)?;
            }
        }
        Ok(())
    }

    /// Adds a region.
    pub fn add(
        &mut self,
        region: &VhostUserMemoryRegion,
        file: File,
        peer: Option<u32>,
    ) -> Result<(), RegionError> {
        self.map(with_file(identity(region), &file), file, peer)
    }

    /// Takes a region away.
    pub fn remove(&mut self, region: &VhostUserMemoryRegion) -> Result<(), RegionError> {
        let wanted = identity(region);
        // The specification names these; the offset in the file is not among them.
        let same = |known: &Identity| {
            (known.address, known.size, known.user) == (wanted.address, wanted.size, wanted.user)
        };
        let found = self.regions.iter().find(|region| same(&region.identity));
        let found = found.ok_or(RegionError::Unknown {
            address: wanted.address,
            size: wanted.size,
        })?;
        self.unmap(found.identity)
    }

    /// Takes everything away: nothing of the drive's lands in it any more.
    pub fn clear(&mut self) -> Result<(), RegionError> {
        let all: Vec<_> = self.regions.iter().map(|region| region.identity).collect();
        all.into_iter().try_for_each(|region| self.unmap(region))?;
        self.mapped.clear();
        Ok(())
    }

    fn map(
        &mut self,
        identity: Identity,
        file: File,
        peer: Option<u32>,
    ) -> Result<(), RegionError> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(RegionError::TooMany);
        }
        let end = identity.address.checked_add(identity.size);
        if end.is_none_or(|end| end > PRIVATE_IOVA.0) {
            return Err(RegionError::TooHigh(identity.address));
        }
        let prepared = self.mapped.prepare_unaligned(
            MapRequest {
                iova: Iova(identity.address),
                size: identity.size,
                access: DmaAccess::ReadWrite,
                file: Some((OwnedFd::from(file), identity.offset)),
            },
            peer,
        )?;
        let Some(window) = prepared.window.clone() else {
            return Ok(());
        };
        self.function.map_dma(&window)?;
        self.mapped.enter(prepared);
        self.regions.push(Arc::new(Region { identity, window }));
        self.regions.sort_by_key(|region| region.identity.address);
        self.collect()
    }

    fn unmap(&mut self, identity: Identity) -> Result<(), RegionError> {
        match self
            .function
            .unmap_dma(Iova(identity.address), identity.size)
        {
            Ok(()) | Err(FunctionError::Gone(_)) => {}
            Err(error) => return Err(error.into()),
        }
        self.mapped.forget(Iova(identity.address), identity.size);
        self.regions.retain(|region| region.identity != identity);
        self.collect()
    }

    fn collect(&mut self) -> Result<(), RegionError> {
        self.guest = if self.regions.is_empty() {
            Guest::new()
        } else {
            Guest::from_arc_regions(self.regions.clone()).map_err(|_| RegionError::Overlap)?
        };
        Ok(())
    }
}

fn identity(region: &VhostUserMemoryRegion) -> Identity {
    Identity {
        address: region.guest_phys_addr,
        size: region.memory_size,
        user: region.user_addr,
        offset: region.mmap_offset,
        file: None,
    }
}

fn with_file(identity: Identity, file: &File) -> Identity {
    Identity {
        file: fstat(file).ok().map(|stat| (stat.st_dev, stat.st_ino)),
        ..identity
    }
}
