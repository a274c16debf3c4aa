//! From the guest's submission queues to the link: fetch, check, give a tag, send.

use farbus_fabric::wire::{Direction, Placement, QueueId, Tag};
use farbus_fabric::{FabricError, Span};
use farbus_vfio::nvme::{SQE_SIZE, Status, SubmissionEntry, admin};

use super::super::description::ADMIN_QUEUE_ENTRIES;
use super::super::record::Slot;
use super::super::transfer::{self, Transfer};
use super::ComputeHalf;
use super::admin::Verdict;
use super::lifecycle::Phase;
use super::tags::{Origin, State};
use crate::session::Session;

/// Admin commands kept outstanding: fewer than the device's admin queue holds, with room for
/// the device half's own.
const ADMIN_OUTSTANDING: u32 = ADMIN_QUEUE_ENTRIES - 8;
/// Pages of the buffer shadow that I/O leaves to admin commands.
const ADMIN_SHADOW_PAGES: u32 = 16;
/// Commands taken from one queue before the next has its turn.
const BURST: usize = 32;

/// What became of one attempt to fetch.
#[derive(PartialEq, Eq)]
enum Fetch {
    /// The queue has nothing that can be fetched now.
    Empty,
    /// One command was taken, and sent or answered.
    Taken,
    /// There is no room for the command at the head; all fetching waits, so that small
    /// commands do not starve a large one.
    NoRoom,
}

impl ComputeHalf {
    /// Sends new commands while the link takes them.
    pub(super) fn send_commands(&mut self, session: &mut Session) -> Result<(), FabricError> {
        self.send_replay(session)?;
        while self.replay.is_none() && !session.is_congested() {
            self.fill_batch();
            if self.batch.is_empty() {
                break;
            }
            session.submit(&mut self.batch)?;
        }
        Ok(())
    }

    pub(super) fn batch_is_full(&self) -> bool {
        self.batch.is_full(self.description.max_transfer)
    }

    /// Fetches from all queues in turn until the batch is full or nothing is left.
    fn fill_batch(&mut self) {
        let queues = self.queues.submission.end();
        // A guest whose I/O is stuck can still abort and delete.
        if self.fetch_burst(0) == Fetch::NoRoom {
            return;
        }
        let mut idle = 0;
        while idle < queues && !self.batch_is_full() && self.life.takes_commands() {
            let queue = self.next_queue % queues;
            match self.fetch_burst(queue) {
                Fetch::Taken => idle = 0,
                Fetch::Empty => idle += 1,
                Fetch::NoRoom => return,
            }
            self.next_queue = (queue + 1) % queues;
        }
    }

    fn fetch_burst(&mut self, queue: u16) -> Fetch {
        let mut outcome = Fetch::Empty;
        for _ in 0..BURST {
            if self.batch_is_full() {
                break;
            }
            match self.fetch(queue) {
                Fetch::Taken => outcome = Fetch::Taken,
                Fetch::Empty => break,
                Fetch::NoRoom => return Fetch::NoRoom,
            }
        }
        outcome
    }

    fn fetch(&mut self, queue: u16) -> Fetch {
        let Some(sq) = self.queues.submission.get(queue) else {
            return Fetch::Empty;
        };
        let limit = match queue {
            0 => ADMIN_OUTSTANDING.min(sq.ring.size() - 1),
            _ => sq.ring.size() - 1,
        };
        let stopped = sq.deleting || self.life.phase != Phase::Ready;
        if stopped || sq.outstanding >= limit || !self.tags.is_available(queue) {
            return Fetch::Empty;
        }
        let sqe = match sq.peek(&self.memory) {
            Ok(Some(sqe)) => sqe,
            Ok(None) => return Fetch::Empty,
            Err(error) => {
                self.fail(&format!("submission queue {queue}: {error}"));
                return Fetch::Empty;
            }
        };
        // Never a valid admin command, but what memory shows that the VMM does not share.
        if queue == 0 && sqe.0 == [0; SQE_SIZE] {
            self.fail(
                "its admin queue reads as zeroes; is the guest's memory shared (QEMU: share=on)?",
            );
            return Fetch::Empty;
        }
        let completion_queue = sq.completion_queue;
        let transfer = match queue {
            // Its PRPs are no data: this half looks there from now on.
            0 if sqe.opcode() == admin::DOORBELL_BUFFER => Ok(Transfer::None),
            0 => transfer::of_admin(&sqe),
            _ => transfer::of_nvm(&sqe, &self.description.namespaces),
        };
        let transfer = transfer.and_then(|transfer| {
            if transfer.len() > self.description.max_transfer {
                return Err(Status::INVALID_FIELD);
            }
            Ok(transfer)
        });
        let len = transfer.map_or(0, Transfer::len);
        let reserve = if queue == 0 { 0 } else { ADMIN_SHADOW_PAGES };
        let Some(shadow) = self.shadow.allocate(len, reserve) else {
            return Fetch::NoRoom;
        };
        let Some((tag, command)) = self.tags.take() else {
            self.shadow.release(shadow);
            return Fetch::Empty;
        };
        command.state = State::Queued;
        command.origin = Origin::Guest;
        command.sqe = sqe;
        command.queue = queue;
        command.completion_queue = completion_queue;
        command.transfer = transfer.unwrap_or(Transfer::None);
        command.shadow = shadow;
        let walked = self.segments.walk(&self.memory, &sqe, len, shadow);
        command.segments = walked.unwrap_or(0);
        if let Some(sq) = self.queues.submission.get_mut(queue) {
            if let Some(record) = &self.record {
                record.fetched(
                    tag,
                    &Slot {
                        queue,
                        completion_queue,
                        era: self.era,
                        position: sq.fetched,
                        shadow,
                        sqe,
                    },
                );
                record.set_fetched(queue, sq.fetched + 1);
            }
            sq.fetched += 1;
            sq.ring.advance();
            sq.outstanding += 1;
        }
        match transfer.and(walked) {
            Ok(_) => self.queue_command(tag),
            Err(status) => self.complete(tag, status, 0),
        }
        Fetch::Taken
    }

    /// Puts a command into the batch, or answers it here.
    pub(super) fn queue_command(&mut self, tag: Tag) {
        let Some(command) = self.tags.get(tag) else {
            return;
        };
        let (mut sqe, queue) = (command.sqe, command.queue);
        if queue == 0 && command.origin == Origin::Guest {
            match self.admit(sqe) {
                Verdict::Forward(changed) => sqe = changed,
                Verdict::Complete(status, result) => return self.complete(tag, status, result),
            }
        }
        if let Err(status) = self.append(tag, &sqe) {
            self.complete(tag, status, 0);
        }
    }

    /// Appends a command to the batch: data to the device is gathered straight from guest
    /// memory when the batch is sent.
    fn append(&mut self, tag: Tag, sqe: &SubmissionEntry) -> Result<(), Status> {
        let Some(command) = self.tags.get_mut(tag) else {
            return Err(Status::INTERNAL_ERROR);
        };
        let direction = match command.transfer {
            Transfer::None => Direction::None,
            Transfer::ToDevice(_) => Direction::ToDevice,
            Transfer::FromDevice(_) => Direction::FromDevice,
        };
        let before = self.batch.payload.len();
        for segment in self.segments.of(command.shadow, command.segments) {
            let mapped = match direction {
                Direction::ToDevice => self
                    .memory
                    .spans(*segment, false, &mut self.batch.payload)
                    .is_ok(),
                // Where it lands is looked up again when it comes, unless the peer writes it.
                _ => {
                    self.batch.push_segment(segment.iova.0, segment.len);
                    self.memory.covers(segment.iova, segment.len.into(), true)
                }
            };
            if !mapped {
                self.batch.truncate(before);
                return Err(Status::DATA_TRANSFER_ERROR);
            }
        }
        let placement = Placement {
            tag,
            queue: QueueId(command.queue),
            shadow_offset: command.shadow.offset,
            data_len: command.transfer.len(),
            direction,
        };
        if self.batch.push(&placement, &sqe.0).is_err() {
            self.batch.truncate(before);
            return Err(Status::INTERNAL_ERROR);
        }
        command.state = State::Sent;
        Ok(())
    }

    /// Where the data of a completion lands: in guest memory as it is mapped now.
    pub(super) fn landing(&mut self, tag: Tag, len: u32, spans: &mut Vec<Span>) -> bool {
        let Some(command) = self.tags.get_mut(tag) else {
            return false;
        };
        match command.state {
            State::Sent if command.transfer == Transfer::FromDevice(len) => {}
            State::Dropped if command.transfer == Transfer::FromDevice(len) => {
                self.discard(len, spans);
                return true;
            }
            _ => return false,
        }
        self.landing.push(tag);
        let before = spans.len();
        for segment in self.segments.of(command.shadow, command.segments) {
            if self.memory.spans(*segment, true, spans).is_err() {
                command.landing_failed = true;
                spans.truncate(before);
                self.discard(len, spans);
                break;
            }
        }
        true
    }
}
