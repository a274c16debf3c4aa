//! From the device's completion queues to the link.

use farbus_fabric::FabricError;
use farbus_fabric::wire::{CompleteEntry, QueueId, Tag};
use farbus_vfio::nvme::{CompletionEntry, PAGE_SIZE, Status, admin};
use log::warn;
use vm_memory::VolatileMemory;

use super::super::identify;
use super::super::ring::CompletionCursor;
use super::super::transfer::Transfer;
use super::tags::Command;
use super::{DeviceHalf, MAX_SPANS, SubmissionQueue};
use crate::session::Session;

impl DeviceHalf {
    /// Sends everything that the device has completed, unless the network takes no more: then
    /// it stays in the device's queues.
    pub(super) fn send_completions(&mut self, session: &mut Session) -> Result<(), FabricError> {
        for id in 0..self.completion.end() {
            self.drain(id, false, session)?;
        }
        session.complete(&mut self.batch, &mut self.payload, &mut self.remote)
    }

    /// Takes what is new in one queue; with `all`, even if the network takes no more. No more
    /// is taken than there can be commands, also if the device makes up completions.
    fn drain(&mut self, id: u16, all: bool, session: &mut Session) -> Result<(), FabricError> {
        let mut consumed = None;
        for _ in 0..self.limits.tags {
            if session.is_congested() && !all {
                break;
            }
            let Some(cursor) = self.completion.get_mut(id) else {
                break;
            };
            let (index, phase) = cursor.at();
            let Some(cqe) = self.arena.load_cqe(id, index, phase) else {
                break;
            };
            cursor.advance();
            consumed = Some(cursor.head());
            self.take(&cqe, session)?;
        }
        if let Some(head) = consumed {
            if let Err(error) = self.controller.ring(id, true, head) {
                let update = self.controller.failed(&error);
                self.report(update);
            }
        }
        Ok(())
    }

    fn take(&mut self, cqe: &CompletionEntry, session: &mut Session) -> Result<(), FabricError> {
        let tag = Tag(cqe.cid);
        let Some(command) = self.tags.take(tag, cqe.sq_id) else {
            self.strays += 1;
            if self.strays.is_power_of_two() {
                warn!(
                    "{}: completed command {} of queue {}, which was never sent ({} such so far)",
                    self.function.info().label,
                    cqe.cid,
                    cqe.sq_id,
                    self.strays
                );
            }
            return Ok(());
        };
        if let Some(sq) = self.submission.get_mut(command.queue) {
            sq.outstanding = sq.outstanding.saturating_sub(1);
        }
        let ok = cqe.status.is_success();
        if command.queue == 0 && ok {
            self.settle_admin(&command, session)?;
        }
        let data_len = match command.transfer {
            Transfer::FromDevice(len) if ok => len,
            _ => 0,
        };
        let entry = CompleteEntry {
            tag,
            queue: QueueId(command.queue),
            status: cqe.status.0,
            data_len,
            result: cqe.result,
        };
        self.append(&entry, command.offset, command.segments, session)
    }

    fn append(
        &mut self,
        entry: &CompleteEntry,
        offset: u32,
        segments: u16,
        session: &mut Session,
    ) -> Result<(), FabricError> {
        let full = self.payload.len() >= MAX_SPANS
            || self.remote.len() + usize::from(segments) > MAX_SPANS;
        if !self.batch.has_room(entry.data_len) || full {
            session.complete(&mut self.batch, &mut self.payload, &mut self.remote)?;
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
                self.completion.insert(id, CompletionCursor::new(size));
            }
            admin::CREATE_SQ => {
                let made = SubmissionQueue {
                    size,
                    tail: 0,
                    released: 0,
                    outstanding: 0,
                    completion_queue: (sqe.dword(11) >> 16) as u16,
                    dirty: false,
                };
                self.submission.insert(id, made);
            }
            admin::DELETE_SQ => {
                // What it has completed counts, and must not be found later under a tag that
                // is in use again.
                if let Some(sq) = self.submission.get(id) {
                    self.drain(sq.completion_queue, true, session)?;
                }
                // A device need not complete what it dropped (NVMe 1.4 §5.6); the guest's
                // driver and the compute half wait for it all the same.
                while let Some(tag) = self.tags.take_of_queue(id) {
                    let entry = CompleteEntry {
                        tag,
                        queue: QueueId(id),
                        status: Status::ABORTED_SQ_DELETION.0,
                        data_len: 0,
                        result: 0,
                    };
                    self.append(&entry, 0, 0, session)?;
                }
                self.rate.forget_queue(id);
                self.submission.remove(id);
            }
            admin::DELETE_CQ => {
                self.completion.remove(id);
            }
            _ if identify::is_of_controller(sqe) => {
                let data = self
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
