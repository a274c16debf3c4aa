//! Where in guest memory the data of each command at the device goes, when this side writes it there
//! itself. All room for it is set aside at the start, two places for each page of the buffer shadow:
//! a command of `n` pages has at most `n + 1` segments.

use farbus_fabric::wire::{self, Placement};
use farbus_fabric::{FabricError, RemoteSpan};
use farbus_vfio::nvme::PAGE_SIZE;

/// Places for each page of the buffer shadow.
const PLACES: usize = 2;

/// See the module's own description.
pub(super) struct Segments(Vec<RemoteSpan>);

impl Segments {
    pub(super) fn new(shadow_len: u32) -> Self {
        let pages = shadow_len as usize / PAGE_SIZE;
        let unused = RemoteSpan { address: 0, len: 0 };
        Self(vec![unused; pages * PLACES])
    }

    /// Keeps a command's segments; how many there are.
    pub(super) fn keep(
        &mut self,
        placement: &Placement,
        segments: wire::Segments<'_>,
    ) -> Result<u16, FabricError> {
        let count = segments.len();
        let start = place(placement.shadow_offset);
        let room = (placement.data_len as usize).div_ceil(PAGE_SIZE) * PLACES;
        match self.0.get_mut(start..start + count) {
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
        let start = place(offset);
        self.0
            .get(start..start + usize::from(count))
            .unwrap_or_default()
    }
}

fn place(offset: u32) -> usize {
    offset as usize / PAGE_SIZE * PLACES
}
