//! Guest memory by the addresses that a driver uses: the guest's own, or those that an IOMMU
//! translates ([`super::iommu`]).
//!
//! What works on rings and requests is compiled once for each. Where addresses are the guest's own
//! everything here is constant, and nothing is left of it.

#![forbid(unsafe_code)]

use vm_memory::{GuestMemory, Permissions};

use super::memory::Guest;

/// Whether a range can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// If it is memory at all.
    Here,
    /// That is not known yet. It was asked for.
    Missing,
    /// Not by this device, or not so.
    Refused,
}

/// See the module's own description.
pub trait Space: GuestMemory {
    /// Whether addresses are the guest's own: then they are the drive's, too, and can change only
    /// when all queues have stopped.
    const IS_GUESTS: bool;

    /// Whether `len` bytes can be used. All that is missing is asked for.
    fn find(&self, address: u64, len: u64, access: Permissions) -> Found;

    /// Whether an access has failed since the last call for no other reason than that a translation
    /// was missing.
    fn missed(&self) -> bool;

    /// As long as it is the same, what was found is still there.
    fn generation(&self) -> u64;
}

impl Space for Guest {
    const IS_GUESTS: bool = true;

    fn find(&self, _address: u64, _len: u64, _access: Permissions) -> Found {
        Found::Here
    }

    fn missed(&self) -> bool {
        false
    }

    fn generation(&self) -> u64 {
        0
    }
}
