//! From the link to the device's submission queues.

use farbus_fabric::wire::{Direction, Placement, Submit, SubmitEntry};
use farbus_fabric::{FabricError, Span};
use farbus_vfio::Iova;
use farbus_vfio::nvme::{PAGE_SIZE, SubmissionEntry, admin, nvm};
use log::debug;
use vm_memory::VolatileMemory;

use super::super::description::MAX_QUEUE_ENTRIES;
use super::super::prp;
use super::super::transfer::{self, Transfer};
use super::DeviceHalf;
use super::arena::Arena;
use super::queues::{Io, SubmissionQueue};
use super::tags::Command;

impl Io {
    /// Where a command's data lands in the buffer shadow.
    pub(super) fn landing(
        &self,
        placement: &Placement,
        spans: &mut Vec<Span>,
    ) -> Result<(), FabricError> {
        self.check_range(placement)?;
        if !self.tags.is_free(placement.tag) {
            return Err(FabricError::violation(format!(
                "{} is in use",
                placement.tag
            )));
        }
        if placement.direction == Direction::ToDevice {
            spans.push(self.span(placement.shadow_offset, placement.data_len));
        }
        Ok(())
    }

    pub(super) fn span(&self, offset: u32, len: u32) -> Span {
        Span {
            memory: self.shadow.memory.clone(),
            offset: offset as usize,
            len: len as usize,
        }
    }

    /// The bytes that a command of an I/O queue counts for where they are limited: also those of the
    /// medium that it is about without transferring them.
    fn work(&self, command: &SubmissionEntry, transferred: u32) -> u32 {
        if !matches!(command.opcode(), nvm::WRITE_ZEROES | nvm::VERIFY) {
            return transferred;
        }
        let shift = self
            .namespaces
            .get(command.nsid())
            .map_or(0, |n| n.block_shift);
        u32::try_from(u64::from(command.blocks()) << shift).unwrap_or(u32::MAX)
    }

    fn clear_shadow(&self, offset: u32, len: u32) {
        let zeroes = [0u8; PAGE_SIZE];
        for at in (offset..offset + len).step_by(PAGE_SIZE) {
            let part = (offset + len - at).min(PAGE_SIZE as u32) as usize;
            if let Ok(slice) = self.shadow.memory.get_slice(at as usize, part) {
                slice.copy_from(&zeroes[..part]);
            }
        }
    }

    fn check_range(&self, placement: &Placement) -> Result<(), FabricError> {
        let Placement {
            shadow_offset,
            data_len,
            ..
        } = *placement;
        let end = u64::from(shadow_offset) + u64::from(data_len);
        if shadow_offset as usize % PAGE_SIZE != 0
            || end > self.shadow.len as u64
            || !self.has_range(shadow_offset, data_len)
            || data_len > self.max_transfer
        {
            return Err(FabricError::violation(format!(
                "{data_len} bytes at {shadow_offset:#x} do not fit the buffer shadow"
            )));
        }
        Ok(())
    }

    /// Places a command in the device's queue; `rewrite` has the last word on it.
    pub(super) fn place(
        &mut self,
        entry: &SubmitEntry<'_>,
        rewrite: impl FnOnce(&Arena, &mut SubmissionEntry),
    ) -> Result<(), FabricError> {
        let placement = &entry.placement;
        let (tag, queue) = (placement.tag, placement.queue.0);
        let guest = SubmissionEntry(*entry.command);
        self.check_range(placement)?;
        if !self.tags.is_free(tag) {
            return Err(FabricError::violation(format!("{tag} is in use")));
        }
        let transfer = match queue {
            0 => transfer::of_admin(&guest),
            _ => transfer::of_nvm(&guest, &self.namespaces),
        };
        let declared = match placement.direction {
            Direction::None => Transfer::None,
            Direction::ToDevice => Transfer::ToDevice(placement.data_len),
            Direction::FromDevice => Transfer::FromDevice(placement.data_len),
        };
        if transfer != Ok(declared) {
            return Err(FabricError::violation(format!(
                "{guest:?} with {declared:?} cannot be carried"
            )));
        }
        let mut sqe = guest;
        sqe.clear_flags();
        sqe.set_cid(tag.0);
        sqe.set_mptr(0);
        let data = Iova(self.shadow.iova.0 + u64::from(placement.shadow_offset));
        let arena = &self.arena;
        let (prp1, prp2) = prp::build(
            data,
            placement.data_len,
            arena.list(tag.0),
            |index, address| {
                arena.store_list_entry(tag.0, index, address);
            },
        );
        sqe.set_prps(prp1, prp2);
        rewrite(arena, &mut sqe);
        // A device need not fill all that an admin command gives it; what was there before is
        // not for this guest. Of the I/O commands only Read brings data, and fills it.
        if let (Transfer::FromDevice(len), 0) = (declared, queue) {
            self.clear_shadow(placement.shadow_offset, len);
        }
        let bytes = self.work(&guest, placement.data_len);
        let sq = match self.submission.get_mut(queue) {
            Some(sq) if sq.outstanding < sq.size - 1 => sq,
            _ => {
                return Err(FabricError::violation(format!(
                    "submission queue {queue} does not exist or is full"
                )));
            }
        };
        let segments = self.segments.keep(placement, entry.segments.clone())?;
        self.commands += 1;
        push(sq, |index| arena.store_sqe(queue, index, &sqe.0));
        if queue != 0 && self.rate.is_limited() {
            self.rate.hold(queue, bytes);
        } else {
            sq.released = sq.tail;
            sq.dirty = true;
        }
        self.tags.insert(
            tag,
            Command {
                sqe: guest,
                queue,
                transfer: declared,
                offset: placement.shadow_offset,
                segments,
            },
        );
        Ok(())
    }
}

impl DeviceHalf {
    /// Places a batch of commands in the device's queues and rings each doorbell once.
    pub(super) fn submit(&mut self, batch: Submit<'_>) -> Result<(), FabricError> {
        if !self.controller.is_on() {
            // The guest's driver does not know yet. It resets the controller, and that ends
            // these commands too.
            debug!("dropped commands for a controller that is not enabled");
            return Ok(());
        }
        for entry in batch.entries() {
            if entry.placement.queue.0 == 0 {
                self.place_admin(&entry)?;
            } else {
                self.io.place(&entry, |_, _| {})?;
            }
        }
        self.io.release();
        self.report_failure();
        Ok(())
    }

    /// The controller has failed if a doorbell of its has.
    pub(super) fn report_failure(&mut self) {
        if let Some(error) = self.io.failed.take() {
            let update = self.controller.failed(&error);
            self.report(update);
        }
    }

    fn place_admin(&mut self, entry: &SubmitEntry<'_>) -> Result<(), FabricError> {
        let sqe = SubmissionEntry(*entry.command);
        self.check_create(&sqe)?;
        let queues = Made {
            vector: self.vector_for(&sqe),
            interrupts: !self.finds_completions(),
        };
        self.io
            .place(entry, |arena, sqe| queues.translate(arena, sqe))
    }

    /// A queue that is to be created must fit this half's own memory.
    fn check_create(&mut self, sqe: &SubmissionEntry) -> Result<(), FabricError> {
        let (id, size) = (sqe.dword(10) as u16, (sqe.dword(10) >> 16) + 1);
        let exists = match sqe.opcode() {
            admin::CREATE_CQ => self.with_cq(id, |io| io.completion.get(id).is_some()),
            // On the admin completion queue there is only the admin queue (NVMe 1.4 §5.4).
            admin::CREATE_SQ if sqe.dword(11) >> 16 == 0 => Some(true),
            admin::CREATE_SQ => self.with_sq(id, |io| io.submission.get(id).is_some()),
            _ => return Ok(()),
        };
        let possible = (1..=self.description.queue_pairs).contains(&id)
            && (2..=MAX_QUEUE_ENTRIES).contains(&size)
            && exists == Some(false);
        if !possible {
            return Err(FabricError::violation(format!(
                "queue {id} of {size} entries cannot be created"
            )));
        }
        Ok(())
    }

    /// The interrupt of a completion queue. Whatever the guest says: it is this half that waits
    /// for it; with several lanes, it is the lane's.
    fn vector_for(&self, sqe: &SubmissionEntry) -> u32 {
        let vector = match self.lanes.is_empty() {
            true => sqe.dword(11) >> 16,
            false => self.lanes.lane_of_cq(sqe.dword(10) as u16).into(),
        };
        vector.min(self.vectors - 1)
    }
}

/// How queues are made at the device.
struct Made {
    vector: u32,
    interrupts: bool,
}

impl Made {
    /// Queues are made in the device half's own memory.
    fn translate(&self, arena: &Arena, sqe: &mut SubmissionEntry) {
        let id = sqe.dword(10) as u16;
        match sqe.opcode() {
            admin::CREATE_CQ => {
                arena.clear_cq(id);
                sqe.set_prps(arena.cq(id).0, 0);
                let interrupts = if self.interrupts { 0b11 } else { 0b01 };
                sqe.set_dword(11, self.vector << 16 | interrupts);
            }
            admin::CREATE_SQ => {
                sqe.set_prps(arena.sq(id).0, 0);
                // Contiguous, whatever the peer says: else the device takes the queue itself
                // for a list of pages.
                sqe.set_dword(11, sqe.dword(11) | 1);
            }
            _ => {}
        }
    }
}

/// Puts an entry at the tail of a queue that has room; `store` gets its index.
pub(super) fn push(sq: &mut SubmissionQueue, store: impl FnOnce(u32)) {
    store(sq.tail);
    sq.tail = (sq.tail + 1) % sq.size;
    sq.outstanding += 1;
}
