//! Guest memory by I/O virtual addresses.

#![forbid(unsafe_code)]

use std::iter::FusedIterator;

use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryRegion, GuestMemoryResult, Permissions,
    VolatileSlice,
};

use super::Iommu;
use super::asks::{Ask, PAGE};
use super::tlb::Mapped;
use crate::vhost_user::memory::{self, Guest};
use crate::vhost_user::space::{Found, Space};

/// See the module's own description.
#[derive(Clone, Copy, Debug)]
pub struct Behind<'a> {
    guest: &'a Guest,
    iommu: &'a Iommu,
}

impl<'a> Behind<'a> {
    /// A guest's memory behind its IOMMU.
    pub fn new(guest: &'a Guest, iommu: &'a Iommu) -> Self {
        Self { guest, iommu }
    }

    /// The translation of an address, if there is one for such an access; otherwise it is asked
    /// for, unless it was refused.
    fn translate(&self, address: u64, access: Permissions) -> Result<Mapped, Found> {
        if let Some(found) = self.iommu.find(address) {
            if found.access.allow(access) {
                return Ok(found);
            }
        }
        let ask = Ask { address, access };
        let mut asks = self.iommu.asks.borrow_mut();
        if asks.is_refused(ask) {
            return Err(Found::Refused);
        }
        asks.want(ask);
        Err(Found::Missing)
    }

    /// As much as possible of `len` bytes from `address` on.
    fn slice(
        &self,
        address: u64,
        len: usize,
        access: Permissions,
    ) -> Result<VolatileSlice<'a>, GuestMemoryError> {
        let nowhere = GuestMemoryError::InvalidGuestAddress(GuestAddress(address));
        let mapped = match self.translate(address, access) {
            Ok(mapped) => mapped,
            Err(why) => {
                let missed = self.iommu.missed.get() || why == Found::Missing;
                self.iommu.missed.set(missed);
                return Err(nowhere);
            }
        };
        let (region, at) = memory::by_user(self.guest, mapped.user).ok_or(nowhere)?;
        let more = mapped.more.min(region.len() - 1 - at.0);
        let len = usize::try_from(more).map_or(len, |more| len.min(more.saturating_add(1)));
        region.get_slice(at, len)
    }
}

impl GuestMemory for Behind<'_> {
    type PhysicalMemory = Guest;
    type Bitmap = ();

    /// Only whether there are such addresses. Each access finds whether they are mapped.
    fn check_range(&self, address: GuestAddress, count: usize, _access: Permissions) -> bool {
        let more = (count as u64).saturating_sub(1);
        address.0.checked_add(more).is_some()
    }

    fn get_slices<'a>(
        &'a self,
        address: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, ()>> {
        Ok(Slices {
            behind: *self,
            address: Some(address.0),
            left: count,
            access,
        })
    }
}

impl Space for Behind<'_> {
    const IS_GUESTS: bool = false;

    fn find(&self, address: u64, len: u64, access: Permissions) -> Found {
        let Some(more) = len.checked_sub(1) else {
            return Found::Here;
        };
        let Some(last) = address.checked_add(more) else {
            return Found::Refused;
        };
        let (mut at, mut outcome) = (address, Found::Here);
        loop {
            let after = match self.translate(at, access) {
                Ok(found) => at
                    .checked_add(found.more)
                    .and_then(|end| end.checked_add(1)),
                Err(Found::Missing) => {
                    outcome = Found::Missing;
                    if self.iommu.asks.borrow().is_full() {
                        return outcome;
                    }
                    (at / PAGE + 1).checked_mul(PAGE)
                }
                Err(why) => return why,
            };
            match after {
                Some(next) if next <= last => at = next,
                _ => return outcome,
            }
        }
    }

    fn missed(&self) -> bool {
        self.iommu.missed.take()
    }

    fn generation(&self) -> u64 {
        self.iommu.generation
    }
}

/// The parts of a range, each in one piece in this process's memory.
struct Slices<'a> {
    behind: Behind<'a>,
    address: Option<u64>,
    left: usize,
    access: Permissions,
}

impl<'a> Iterator for Slices<'a> {
    type Item = GuestMemoryResult<VolatileSlice<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let Some(address) = self.address else {
            self.left = 0;
            return Some(Err(GuestMemoryError::GuestAddressOverflow));
        };
        let slice = self.behind.slice(address, self.left, self.access);
        match &slice {
            Ok(slice) => {
                self.left -= slice.len();
                self.address = address.checked_add(slice.len() as u64);
            }
            Err(_) => self.left = 0,
        }
        Some(slice)
    }
}

impl FusedIterator for Slices<'_> {}

impl<'a> GuestMemorySliceIterator<'a, ()> for Slices<'a> {}
