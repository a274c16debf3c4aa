//! The memory that a portion's commands may name: the windows that its driver has mapped, at the
//! drive's own addresses.

use std::ops::RangeInclusive;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, VolatileMemory, VolatileSlice};

use crate::function::{DmaAccess, DmaWindow, FunctionError, Iova};
use crate::nvme::PAGE_SIZE;
use crate::soft_nvme::Unreachable;

/// Most windows of one portion. A device half has three.
const MAX_WINDOWS: usize = 256;

/// The windows of one portion, ascending.
pub(super) struct Windows {
    /// Where they may be.
    range: RangeInclusive<u64>,
    windows: Vec<DmaWindow>,
}

impl Windows {
    pub(super) fn new(range: RangeInclusive<u64>) -> Self {
        Self {
            range,
            windows: Vec::with_capacity(MAX_WINDOWS),
        }
    }

    /// Whether a window may be added.
    pub(super) fn check(&self, window: &DmaWindow) -> Result<(), FunctionError> {
        let len = window.len as u64;
        let refuse = |why| {
            Err(FunctionError::BadWindow {
                iova: window.iova,
                len,
                why,
            })
        };
        let page = PAGE_SIZE as u64;
        if len == 0 || window.iova.0 % page != 0 || len % page != 0 {
            return refuse("its address and length must be multiples of 4096, and not zero");
        }
        let Some(last) = window.iova.0.checked_add(len - 1) else {
            return refuse("it wraps around");
        };
        if !self.range.contains(&window.iova.0) || !self.range.contains(&last) {
            return refuse("it is not within the addresses of this portion");
        }
        let inside = window.offset.checked_add(window.len);
        if inside.is_none_or(|end| end > window.memory.size()) {
            return refuse("it ends past its memory");
        }
        if self
            .windows
            .iter()
            .any(|other| other.iova.0 <= last && window.iova.0 < end(other))
        {
            return refuse("it overlaps another one");
        }
        if self.windows.len() >= MAX_WINDOWS {
            return refuse("there are 256 windows already");
        }
        Ok(())
    }

    /// Adds a window that was checked.
    pub(super) fn add(&mut self, window: &DmaWindow) {
        let at = self
            .windows
            .partition_point(|other| other.iova < window.iova);
        self.windows.insert(at, window.clone());
    }

    /// Whether a range has whole windows only.
    pub(super) fn check_removal(&self, iova: Iova, len: u64) -> Result<(), FunctionError> {
        let refuse = |why| Err(FunctionError::BadWindow { iova, len, why });
        let Some(beyond) = iova.0.checked_add(len).filter(|_| len > 0) else {
            return refuse("it is empty or wraps around");
        };
        // What is not this portion's own is never passed on.
        if !self.range.contains(&iova.0) || !self.range.contains(&(beyond - 1)) {
            return refuse("it is not within the addresses of this portion");
        }
        Ok(())
    }

    /// Takes out every window that lies within a range; the function has let go of them.
    pub(super) fn remove(&mut self, iova: Iova, len: u64) {
        let beyond = iova.0.saturating_add(len);
        self.windows
            .retain(|window| window.iova < iova || end(window) > beyond);
    }

    /// All of them.
    pub(super) fn all(&self) -> &[DmaWindow] {
        &self.windows
    }

    fn find(&self, address: u64, len: usize, write: bool) -> Option<(&DmaWindow, usize)> {
        let at = self.windows.partition_point(|w| w.iova.0 <= address);
        let window = self.windows.get(at.checked_sub(1)?)?;
        let last = address.checked_add(len as u64)?;
        let allowed = last <= end(window) && (!write || window.access == DmaAccess::ReadWrite);
        allowed.then(|| (window, window.offset + (address - window.iova.0) as usize))
    }

    /// Whether `len` bytes at `address` are this portion's, all in one window.
    pub(super) fn contains(
        &self,
        address: u64,
        len: usize,
        write: bool,
    ) -> Result<(), Unreachable> {
        self.find(address, len, write)
            .map(|_| ())
            .ok_or(Unreachable)
    }

    fn slice(
        &self,
        address: u64,
        len: usize,
        write: bool,
    ) -> Result<VolatileSlice<'_>, Unreachable> {
        let (window, offset) = self.find(address, len, write).ok_or(Unreachable)?;
        window
            .memory
            .get_slice(offset, len)
            .map_err(|_| Unreachable)
    }

    /// Copies out, once.
    pub(super) fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Unreachable> {
        self.slice(address, bytes.len(), false)?.copy_to(bytes);
        Ok(())
    }

    /// Copies in.
    pub(super) fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Unreachable> {
        self.slice(address, bytes.len(), true)?.copy_from(bytes);
        Ok(())
    }

    /// Stores a completion entry, its phase last.
    pub(super) fn store_pair(
        &self,
        address: u64,
        [low, high]: [u64; 2],
    ) -> Result<(), Unreachable> {
        let slice = self.slice(address, 16, true)?;
        slice
            .store(low.to_le(), 0, Ordering::Relaxed)
            .and_then(|()| slice.store(high.to_le(), 8, Ordering::Release))
            .map_err(|_| Unreachable)
    }
}

fn end(window: &DmaWindow) -> u64 {
    window.iova.0 + window.len as u64
}
