//! Guest memory as the VMM maps it for us.
//!
//! A set of disjoint [`DmaWindow`]s, looked up by IOVA. Guest memory is hostile: it changes
//! while we look, and windows come and go. Whoever uses it copies once and works on the copy;
//! nothing here hands out a reference to it, only `vm-memory` volatile slices and spans.

use farbus_fabric::Span;
use farbus_vfio::{DmaAccess, DmaWindow, FunctionError, Iova};
use vm_memory::VolatileMemory;
use vm_memory::volatile_memory::VolatileSlice;

/// A range of guest memory by its guest address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub iova: Iova,
    /// Length in bytes.
    pub len: u32,
}

/// An access to guest memory that no window allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest memory {iova} of {len:#x} bytes is not mapped for this access")]
pub struct NotMapped {
    /// First byte that was wanted.
    pub iova: Iova,
    /// How many bytes were wanted.
    pub len: u64,
}

/// The windows of one attachment.
#[derive(Default)]
pub struct GuestMemory {
    /// Ascending by IOVA, disjoint.
    windows: Vec<DmaWindow>,
}

impl GuestMemory {
    /// Adds a window. It must be non-empty, end below 2^64 and overlap no other.
    pub fn map(&mut self, window: &DmaWindow) -> Result<(), FunctionError> {
        let bad = |why| FunctionError::BadWindow {
            iova: window.iova,
            len: window.len as u64,
            why,
        };
        let end = window
            .iova
            .0
            .checked_add(window.len as u64)
            .ok_or_else(|| bad("it ends beyond 2^64"))?;
        if window.len == 0 {
            return Err(bad("it is empty"));
        }
        if window
            .offset
            .checked_add(window.len)
            .is_none_or(|last| last > window.memory.size())
        {
            return Err(bad("it exceeds the memory that backs it"));
        }
        let at = self.windows.partition_point(|w| w.iova < window.iova);
        let overlaps_next = self.windows.get(at).is_some_and(|next| next.iova.0 < end);
        let overlaps_previous = at
            .checked_sub(1)
            .and_then(|previous| self.windows.get(previous))
            .is_some_and(|previous| window_end(previous) > window.iova.0);
        if overlaps_next || overlaps_previous {
            return Err(bad("it overlaps another window"));
        }
        self.windows.insert(at, window.clone());
        Ok(())
    }

    /// Removes and returns every window within `iova .. iova + len`. A window that lies there
    /// only in part is an error, and nothing is removed then.
    pub fn unmap(&mut self, iova: Iova, len: u64) -> Result<Vec<DmaWindow>, FunctionError> {
        let end = iova.0.saturating_add(len);
        let touches = |w: &DmaWindow| w.iova.0 < end && window_end(w) > iova.0;
        let within = |w: &DmaWindow| w.iova >= iova && window_end(w) <= end;
        if self.windows.iter().any(|w| touches(w) && !within(w)) {
            return Err(FunctionError::BadWindow {
                iova,
                len,
                why: "it would cut a window in two",
            });
        }
        let (gone, kept) = std::mem::take(&mut self.windows)
            .into_iter()
            .partition(within);
        self.windows = kept;
        Ok(gone)
    }

    /// The windows, ascending by IOVA.
    pub fn windows(&self) -> &[DmaWindow] {
        &self.windows
    }

    /// The window at `iova`, the offset of `iova` in its memory, and how many bytes follow
    /// there.
    fn locate(&self, iova: Iova) -> Option<(&DmaWindow, usize, usize)> {
        let at = self.windows.partition_point(|w| w.iova <= iova);
        let window = self.windows.get(at.checked_sub(1)?)?;
        let within = usize::try_from(iova.0 - window.iova.0).ok()?;
        let rest = window.len.checked_sub(within).filter(|rest| *rest > 0)?;
        Some((window, window.offset + within, rest))
    }

    /// A slice of guest memory that lies within one window; `write` says whether it will be
    /// written to.
    pub fn slice(
        &self,
        iova: Iova,
        len: usize,
        write: bool,
    ) -> Result<VolatileSlice<'_>, NotMapped> {
        let refused = NotMapped {
            iova,
            len: len as u64,
        };
        let (window, offset, rest) = self.locate(iova).ok_or(refused)?;
        if rest < len || (write && window.access == DmaAccess::Read) {
            return Err(refused);
        }
        window.memory.get_slice(offset, len).map_err(|_| refused)
    }

    /// Copies guest memory that lies within one window.
    pub fn read(&self, iova: Iova, into: &mut [u8]) -> Result<(), NotMapped> {
        self.slice(iova, into.len(), false)?.copy_to(into);
        Ok(())
    }

    /// Appends the spans that hold `segment`, which may lie in several windows.
    pub fn spans(
        &self,
        segment: Segment,
        write: bool,
        spans: &mut Vec<Span>,
    ) -> Result<(), NotMapped> {
        let mut iova = segment.iova;
        let mut left = segment.len as usize;
        while left > 0 {
            let refused = NotMapped {
                iova,
                len: left as u64,
            };
            let (window, offset, rest) = self.locate(iova).ok_or(refused)?;
            if write && window.access == DmaAccess::Read {
                return Err(refused);
            }
            let len = rest.min(left);
            spans.push(Span {
                memory: window.memory.clone(),
                offset,
                len,
            });
            left -= len;
            iova = Iova(iova.0 + len as u64);
        }
        Ok(())
    }

    /// Whether all of `iova .. iova + len` is mapped for the access.
    pub fn covers(&self, iova: Iova, len: u64, write: bool) -> bool {
        let mut at = iova;
        let Some(end) = iova.0.checked_add(len) else {
            return false;
        };
        while at.0 < end {
            match self.locate(at) {
                Some((window, _, rest)) if !write || window.access == DmaAccess::ReadWrite => {
                    at = Iova(at.0.saturating_add(rest as u64));
                }
                _ => return false,
            }
        }
        true
    }
}

/// The IOVA behind a window's last byte. Does not overflow: [`GuestMemory::map`] checked.
fn window_end(window: &DmaWindow) -> u64 {
    window.iova.0 + window.len as u64
}
