//! From the device's completion queues to the link.

use farbus_fabric::FabricError;
use farbus_fabric::wire::{CompleteEntry, QueueId, Tag};
use farbus_vfio::nvme::{CompletionEntry, PAGE_SIZE, admin};
use log::warn;
use vm_memory::VolatileMemory;

use super::super::identify;
use super::super::ring::CompletionCursor;
use super::super::transfer::Transfer;
use super::queues::{Io, SubmissionQueue};
use super::tags::Command;
use super::{DeviceHalf, MAX_SPANS};
use crate::session::Session;

impl Io {
    /// Sends everything that the device has completed in I/O queues, unless the network takes no
    /// more: then it stays in the device's queues.
    pub(super) fn send_completions(&mut self, session: &mut Session) -> Result<(), FabricError> {
        for id in 1..self.completion.end() {
            self.drain(id, false, session)?;
        }
        self.send_batch(session)
    }

    /// Takes what is new in one queue; with `all`, even if the network takes no more. No more
    /// is taken than there can be commands, also if the device makes up completions.
    pub(super) fn drain(
        &mut self,
        id: u16,
        all: bool,
        session: &mut Session,
    ) -> Result<(), FabricError> {
        let mut left = self.tags.count();
        loop {
            let mut consumed = false;
            while left > 0 && (all || !session.is_congested()) {
                let Some(cqe) = self.next(id) else {
                    break;
                };
                left -= 1;
                consumed = true;
                if let Some(command) = self.take(&cqe) {
                    self.answer(&cqe, &command, session)?;
                }
            }
            if !consumed {
                return Ok(());
            }
            // There is room again, which a device may have waited for.
            self.ring_completion(id);
        }
    }

    /// The command that has completed.
    fn take(&mut self, cqe: &CompletionEntry) -> Option<Command> {
        let Some(command) = self.tags.take(Tag(cqe.cid), cqe.sq_id) else {
            self.strays += 1;
            if self.strays.is_power_of_two() {
                warn!(
                    "{}: completed command {} of queue {}, which was never sent ({} such so far)",
                    self.label(),
                    cqe.cid,
                    cqe.sq_id,
                    self.strays
                );
            }
            return None;
        };
        if let Some(sq) = self.submission.get_mut(command.queue) {
            sq.outstanding = sq.outstanding.saturating_sub(1);
        }
        Some(command)
    }

    fn answer(
        &mut self,
        cqe: &CompletionEntry,
        command: &Command,
        session: &mut Session,
    ) -> Result<(), FabricError> {
        let data_len = match command.transfer {
            Transfer::FromDevice(len) if cqe.status.is_success() => len,
            _ => 0,
        };
        let entry = CompleteEntry {
            tag: Tag(cqe.cid),
            queue: QueueId(command.queue),
            status: cqe.status.0,
            data_len,
            result: cqe.result,
        };
        self.append(&entry, command.offset, command.segments, session)
    }

    pub(super) fn append(
        &mut self,
        entry: &CompleteEntry,
        offset: u32,
        segments: u16,
        session: &mut Session,
    ) -> Result<(), FabricError> {
        let full = self.payload.len() >= MAX_SPANS
            || self.remote.len() + usize::from(segments) > MAX_SPANS;
        if !self.batch.has_room(entry.data_len) || full {
            self.send_batch(session)?;
        }
        self.batch.push(entry)?;
        if entry.data_len > 0 {
            let span = self.span(offset, entry.data_len);
            self.payload.push(span);
            if session.is_one_sided() {
                if segments == 0 {
                    return Err(FabricError::violation(format!(
                        "{} does not say where its data goes",
                        entry.tag
                    )));
                }
                let segments = self.segments.of(offset, segments);
                self.remote.extend_from_slice(segments);
            }
        }
        Ok(())
    }
}

impl DeviceHalf {
    /// Sends everything that the device has completed in this lane.
    pub(super) fn send_completions(&mut self, session: &mut Session) -> Result<(), FabricError> {
        self.drain_admin(session)?;
        self.io.send_completions(session)?;
        self.report_failure();
        Ok(())
    }

    fn drain_admin(&mut self, session: &mut Session) -> Result<(), FabricError> {
        let mut consumed = false;
        for _ in 0..self.io.tags.count() {
            if session.is_congested() {
                break;
            }
            let Some(cqe) = self.io.next(0) else {
                break;
            };
            consumed = true;
            if let Some(command) = self.io.take(&cqe) {
                if command.queue == 0 && cqe.status.is_success() {
                    self.settle_admin(&command, session)?;
                }
                self.io.answer(&cqe, &command, session)?;
            }
        }
        if consumed {
            self.io.ring_completion(0);
        }
        Ok(())
    }

    /// Follows what a successful admin command did to the device.
    fn settle_admin(
        &mut self,
        command: &Command,
        session: &mut Session,
    ) -> Result<(), FabricError> {
        let sqe = &command.sqe;
        let (id, size) = (sqe.dword(10) as u16, (sqe.dword(10) >> 16) + 1);
        match sqe.opcode() {
            admin::CREATE_CQ => {
                self.with_cq(id, |io| {
                    io.completion.insert(id, CompletionCursor::new(size));
                });
            }
            admin::CREATE_SQ => {
                let completion_queue = (sqe.dword(11) >> 16) as u16;
                let made = SubmissionQueue {
                    size,
                    tail: 0,
                    released: 0,
                    outstanding: 0,
                    completion_queue,
                    dirty: false,
                };
                self.place_sq(id, completion_queue);
                self.with_sq(id, |io| io.submission.insert(id, made));
            }
            admin::DELETE_SQ => self.end_sq(id, session)?,
            admin::DELETE_CQ => {
                self.with_cq(id, |io| io.completion.remove(id));
            }
            _ if identify::is_of_controller(sqe) => {
                let data = self
                    .io
                    .shadow
                    .memory
                    .get_slice(command.offset as usize, PAGE_SIZE);
                if let Ok(data) = data {
                    identify::reduce_controller(&data, self.description.max_transfer);
                }
            }
            _ => {}
        }
        Ok(())
    }
}
