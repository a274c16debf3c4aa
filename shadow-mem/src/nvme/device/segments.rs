//! Where in guest memory the data of each command at the device goes, when this side writes it there
//! itself. All room for it is set aside at the start, two places for each page of the buffer shadow:
//! a command of `n` pages has at most `n + 1` segments.

use std::ops::Range;

use farbus_fabric::wire::{self, Placement};
use farbus_fabric::{FabricError, RemoteSpan};
use farbus_vfio::nvme::PAGE_SIZE;

/// Places for each page of the buffer shadow.
const PLACES: usize = 2;

/// See the module's own description.
pub(super) struct Segments {
    /// Where the part of the shadow begins, in bytes.
    base: u32,
    places: Vec<RemoteSpan>,
}

impl Segments {
    /// For a part of the buffer shadow, in bytes.
    pub(super) fn new(shadow: &Range<u32>) -> Self {
        let pages = shadow.len() / PAGE_SIZE;
        let unused = RemoteSpan { address: 0, len: 0 };
        Self {
            base: shadow.start,
            places: vec![unused; pages * PLACES],
        }
    }

    /// An empty range may be anywhere.
    fn place(&self, offset: u32) -> usize {
        offset.saturating_sub(self.base) as usize / PAGE_SIZE * PLACES
    }

    /// Keeps a command's segments; how many there are.
    pub(super) fn keep(
        &mut self,
        placement: &Placement,
        segments: wire::Segments<'_>,
    ) -> Result<u16, FabricError> {
        let count = segments.len();
        let start = self.place(placement.shadow_offset);
        let room = (placement.data_len as usize).div_ceil(PAGE_SIZE) * PLACES;
        match self.places.get_mut(start..start + count) {
            Some(places) if count <= room => {
                for (place, segment) in places.iter_mut().zip(segments) {
                    *place = segment;
                }
                Ok(count as u16)
            }
            _ => Err(FabricError::violation(format!(
                "{count} segments for {} bytes of {}",
                placement.data_len, placement.tag
            ))),
        }
    }

    /// What was kept for a command whose data is at `offset` of the shadow.
    pub(super) fn of(&self, offset: u32, count: u16) -> &[RemoteSpan] {
        let start = self.place(offset);
        self.places
            .get(start..start + usize::from(count))
            .unwrap_or_default()
    }
}
