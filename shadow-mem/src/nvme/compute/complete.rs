//! From the link to the guest's completion queues: data lands, completions are matched to
//! their commands and posted, or held while the queue is full.

use farbus_fabric::wire::{Complete, CompleteEntry, Header, Kind, Message, Tag, Text};
use farbus_fabric::{FabricError, Sink, Span};
use farbus_vfio::RegionIndex;
use farbus_vfio::nvme::{CompletionEntry, Status};
use log::debug;

use super::super::identify;
use super::super::transfer::Transfer;
use super::ComputeHalf;
use super::tags::{Origin, State};

impl Sink for ComputeHalf {
    fn land(
        &mut self,
        header: &Header,
        control: &[u8],
        spans: &mut Vec<Span>,
    ) -> Result<(), FabricError> {
        for entry in Complete::decode(header, control)?.entries() {
            if entry.data_len > 0 && !self.landing(entry.tag, entry.data_len, spans) {
                return Err(FabricError::violation(format!(
                    "{} bytes of data that {} did not ask for",
                    entry.data_len, entry.tag
                )));
            }
        }
        Ok(())
    }

    fn deliver(&mut self, header: &Header, control: &[u8]) -> Result<(), FabricError> {
        if header.kind == Kind::Complete {
            if let Some(record) = &mut self.record {
                record.set_time();
            }
            for entry in Complete::decode(header, control)?.entries() {
                self.completed(&entry)?;
            }
            self.landing.clear();
            self.interrupts.signal();
            self.commit();
            return Ok(());
        }
        match Message::decode(header, control)? {
            Message::RegisterUpdate {
                region,
                offset,
                data,
            } => self.register_update(RegionIndex(region), offset, &data),
            Message::ResetDone { request, outcome } => {
                self.reset_done(request, outcome.as_ref().err().map(Text::as_str));
            }
            Message::Fault { code, text } => {
                self.device_failed(&format!("{code:?}: {}", text.as_str()));
            }
            Message::Ping { nonce } => self.pong = Some(nonce),
            Message::Pong { .. } => {
                if let Some(record) = &mut self.record {
                    record.pong();
                }
            }
            // Everything else is the link's own business or has no meaning to this engine.
            other => debug!("ignored {other:?}"),
        }
        self.commit();
        Ok(())
    }
}

impl ComputeHalf {
    /// One completion from the device side.
    fn completed(&mut self, entry: &CompleteEntry) -> Result<(), FabricError> {
        let Some(command) = self.tags.get_mut(entry.tag) else {
            return Err(FabricError::violation(format!(
                "{} does not exist",
                entry.tag
            )));
        };
        match command.state {
            State::Sent => {}
            State::Dropped => {
                self.shadow.release(command.shadow);
                self.tags.free(entry.tag);
                return Ok(());
            }
            _ => {
                return Err(FabricError::violation(format!(
                    "{} completes a command that is not outstanding",
                    entry.tag
                )));
            }
        }
        let mut status = Status(entry.status & 0x7fff);
        let short = matches!(command.transfer, Transfer::FromDevice(len) if entry.data_len != len);
        if status.is_success() && (short || command.landing_failed) {
            status = Status::DATA_TRANSFER_ERROR;
        }
        let (sqe, queue) = (command.sqe, command.queue);
        let data = (command.shadow, command.segments);
        if command.origin == Origin::Replay {
            self.shadow.release(command.shadow);
            self.tags.free(entry.tag);
            self.replayed(&sqe, status);
            return Ok(());
        }
        let transfer = command.transfer;
        let result = match queue {
            0 => {
                if let Some(record) = &self.record {
                    record.returned(entry.tag, status, entry.result);
                }
                if status.is_success() && identify::is_of_controller(&sqe) {
                    self.offer_doorbells(data.0, data.1);
                }
                self.settle(&sqe, status, entry.result)
            }
            _ => {
                if let Some(record) = &self.record {
                    record.count(entry.tag, sqe.opcode(), transfer, status);
                }
                entry.result
            }
        };
        self.complete(entry.tag, status, result);
        Ok(())
    }

    /// Gives the guest the outcome of a command, now or when its completion queue has room.
    pub(super) fn complete(&mut self, tag: Tag, status: Status, result: u64) {
        let Some(command) = self.tags.get_mut(tag) else {
            return;
        };
        self.shadow.release(std::mem::take(&mut command.shadow));
        let (queue, completion_queue) = (command.queue, command.completion_queue);
        command.state = State::Held { status, result };
        // What follows from an admin command is recorded before its outcome is.
        if queue == 0 {
            self.commit();
        }
        if let Some(record) = &mut self.record {
            record.held(tag, status, result);
        }
        if let Some(sq) = self.queues.sq(queue) {
            sq.outstanding = sq.outstanding.saturating_sub(1);
        }
        match self.queues.cq(completion_queue) {
            Some(cq) => {
                cq.held.push_back(tag);
                self.post_held(completion_queue);
            }
            None => self.forget(tag),
        }
    }

    /// A command is over, for the guest or for nobody.
    pub(super) fn forget(&mut self, tag: Tag) {
        if let Some(record) = &self.record {
            record.freed(tag);
        }
        self.tags.free(tag);
    }

    /// Posts held completions while there is room.
    pub(super) fn post_held(&mut self, id: u16) {
        while let Some(cq) = self.queues.cq(id) {
            if cq.held.is_empty() || cq.ring.is_full() && !self.finds_room(id) {
                return;
            }
            let Some(cq) = self.queues.completion.get_mut(id) else {
                return;
            };
            let Some(tag) = cq.held.pop_front() else {
                return;
            };
            let Some(command) = self.tags.get(tag) else {
                return;
            };
            let State::Held { status, result } = command.state else {
                return;
            };
            let sq = self.queues.submission.get(command.queue);
            let entry = CompletionEntry {
                result,
                sq_head: sq.map_or(0, |sq| sq.ring.head()),
                sq_id: command.queue,
                cid: command.sqe.cid(),
                status,
                phase: false,
            };
            let vector = cq.vector;
            if let Some(record) = &self.record {
                record.posting(tag, cq.posted);
            }
            let posted = cq.post(&self.memory, entry);
            if let Some(record) = &self.record {
                record.set_posted(id, cq.posted);
            }
            self.forget(tag);
            match posted {
                Ok(()) => vector.into_iter().for_each(|v| self.interrupts.raise(v)),
                Err(error) => return self.fail(&format!("completion queue {id}: {error}")),
            }
        }
    }
}
