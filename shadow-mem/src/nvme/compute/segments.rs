//! The guest memory of every outstanding command's data, as its PRPs named it when the command
//! was fetched. All room for it is set aside at the start, so that no command waits for an
//! allocator: a command that holds `n` pages of the buffer shadow has at most `n + 1` segments,
//! hence twice as many places as the shadow has pages are enough for all.

use std::ops::Range;

use farbus_vfio::Iova;
use farbus_vfio::nvme::{PAGE_SIZE, Status, SubmissionEntry};

use super::super::prp;
use crate::guest::{GuestMemory, Segment};
use crate::shadow::ShadowRange;

/// Places for each page of the buffer shadow.
const PLACES: usize = 2;

/// See the module's own description.
pub(super) struct Segments {
    /// Where the part of the shadow begins, in bytes.
    base: u32,
    /// A command's are where its shadow pages are.
    storage: Vec<Segment>,
    walked: Vec<Segment>,
}

impl Segments {
    /// For a part of the buffer shadow and a largest transfer of so many bytes.
    pub(super) fn new(shadow: &Range<u32>, max_transfer: u32) -> Self {
        let pages = shadow.len() / PAGE_SIZE;
        let unused = Segment {
            iova: Iova(0),
            len: 0,
        };
        Self {
            base: shadow.start,
            storage: vec![unused; pages * PLACES],
            walked: Vec::with_capacity(max_transfer as usize / PAGE_SIZE + 1),
        }
    }

    /// Keeps the memory that a command's PRPs name for `len` bytes, which are as long as
    /// `shadow`; says of how many segments it is.
    pub(super) fn walk(
        &mut self,
        memory: &GuestMemory,
        sqe: &SubmissionEntry,
        len: u32,
        shadow: ShadowRange,
    ) -> Result<usize, Status> {
        prp::walk(memory, sqe.prp1(), sqe.prp2(), len, &mut self.walked)?;
        let count = self.walked.len();
        let start = self.place(shadow);
        match self.storage.get_mut(start..start + count) {
            Some(places) if count <= shadow.pages as usize * PLACES => {
                places.copy_from_slice(&self.walked);
                Ok(count)
            }
            _ => Err(Status::INTERNAL_ERROR),
        }
    }

    /// What was kept for a command with these shadow pages.
    pub(super) fn of(&self, shadow: ShadowRange, count: usize) -> &[Segment] {
        let start = self.place(shadow);
        self.storage.get(start..start + count).unwrap_or_default()
    }

    /// An empty range may be anywhere.
    fn place(&self, shadow: ShadowRange) -> usize {
        shadow.offset.saturating_sub(self.base) as usize / PAGE_SIZE * PLACES
    }
}
