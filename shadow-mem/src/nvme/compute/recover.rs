//! Surviving the process: what the record says of this half, and how a successor takes it up.
//!
//! A command is in one of a few states when its process is killed, and each says what is left to do:
//!
//! | the record has | then |
//! |---|---|
//! | nothing | the entry is still before the queue's head: it is fetched again |
//! | a slot, and the head is at its place | it was fetched: the head moves on, the command is outstanding |
//! | a slot | it is outstanding: sent again on the new link, as after the loss of one |
//! | an admin command's outcome | what follows from it is done, again perhaps: that is the same as once |
//! | an outcome | its completion is posted |
//! | the place of its completion | it is posted unless it is there: the phase tag tells |
//! | that place, and the queue is past it | nothing is left to do |

use farbus_fabric::wire::Tag;
use farbus_vfio::Iova;
use farbus_vfio::nvme::SubmissionEntry;

use super::super::description::NvmeDescription;
use super::super::record::{
    ControlReader, ControlWriter, Progress, Record, RecordError, Slot, SlotState,
};
use super::super::ring::{CompletionRing, SubmissionRing};
use super::super::transfer;
use super::ComputeHalf;
use super::coalescing;
use super::doorbells::ShadowDoorbells;
use super::lifecycle::Phase;
use super::queues::{CompletionQueue, SubmissionQueue};
use super::tags::{Origin, State};

const PHASES: [Phase; 5] = [
    Phase::Disabled,
    Phase::Enabling,
    Phase::Ready,
    Phase::Disabling,
    Phase::Fatal,
];

impl ComputeHalf {
    /// From now on everything that a successor needs is in the record.
    pub fn keep_record(&mut self, record: Record) {
        self.record = Some(record);
        self.changed = true;
        self.commit();
    }

    /// The record, if one is kept.
    pub fn record(&self) -> Option<&Record> {
        self.record.as_ref()
    }

    /// As [`Self::record`], to count in it.
    pub fn record_mut(&mut self) -> Option<&mut Record> {
        self.record.as_mut()
    }

    /// The queues and commands of before are void.
    pub(super) fn begin_era(&mut self) {
        self.era = self.era.wrapping_add(1);
        self.changed = true;
    }

    /// A queue was made, with both rings of this id at their start.
    pub(super) fn record_new_submission(&mut self, queue: u16) {
        if let Some(record) = &self.record {
            record.set_fetched(queue, 0);
            record.set_tail(queue, 0);
        }
    }

    /// As [`Self::record_new_submission`], of a completion queue.
    pub(super) fn record_new_completion(&mut self, queue: u16) {
        if let Some(record) = &self.record {
            record.set_posted(queue, 0);
            record.set_head(queue, 0);
        }
    }

    /// Has the record say what is set up, if that has changed.
    pub(super) fn commit(&mut self) {
        if !std::mem::take(&mut self.changed) {
            return;
        }
        if let Some(record) = &self.record {
            record.commit(&self.dump());
        }
    }

    fn dump(&self) -> Vec<u8> {
        let mut out = ControlWriter::default();
        let phase = PHASES.iter().position(|phase| *phase == self.life.phase);
        out.number(self.era.into())
            .number(phase.unwrap_or(0) as u64);
        for register in self.registers.dump() {
            out.number(register);
        }
        match self.shadow_doorbells {
            None => out.number(0),
            Some(at) => out.number(1).number(at.values.0).number(at.event_indices.0),
        };
        out.number(coalescing::encode(self.interrupts.coalescing()).into());
        out.bytes(&self.interrupts.dump());
        out.number(self.features.len() as u64);
        for feature in &self.features {
            out.bytes(&feature.0);
        }
        out.number(self.queues.completion.iter().count() as u64);
        for (id, cq) in self.queues.completion.iter() {
            out.number(id.into())
                .number(cq.base)
                .number(cq.ring.size().into());
            out.number(cq.vector.map_or(0, |vector| u64::from(vector) + 1));
        }
        out.number(self.queues.submission.iter().count() as u64);
        for (id, sq) in self.queues.submission.iter() {
            out.number(id.into())
                .number(sq.base)
                .number(sq.ring.size().into());
            out.number(sq.completion_queue.into())
                .number(sq.deleting.into());
        }
        out.finish()
    }

    /// The half of a predecessor, as far as its own memory tells: when the guest's memory and
    /// interrupts are there, [`Self::recover`] has the rest.
    pub fn resume(
        description: NvmeDescription,
        shadow_len: u32,
        tags: u16,
        vectors: u32,
        record: Record,
    ) -> Result<Self, RecordError> {
        let half = Self::new(description, shadow_len, tags, vectors);
        let mut half = half.map_err(RecordError::Memory)?;
        let control = record.control();
        half.record = Some(record);
        if !control.is_empty() {
            half.undump(ControlReader(&control))?;
        }
        if half.life.phase == Phase::Disabling {
            half.disabled();
        }
        Ok(half)
    }

    fn undump(&mut self, mut from: ControlReader<'_>) -> Result<(), RecordError> {
        let broken = RecordError::Broken;
        self.era = from.small()?;
        let phase: usize = from.small()?;
        self.life.phase = *PHASES.get(phase).ok_or(broken("there is no such phase"))?;
        let mut registers = [0; 6];
        for register in &mut registers {
            *register = from.number()?;
        }
        self.registers.restore(registers);
        if from.number()? == 1 {
            self.shadow_doorbells = Some(ShadowDoorbells {
                values: Iova(from.number()?),
                event_indices: Iova(from.number()?),
            });
        }
        self.interrupts
            .set_coalescing(coalescing::decode(from.small()?));
        self.interrupts.restore(from.bytes()?);
        for _ in 0..from.number()? {
            let feature = from.bytes()?.try_into();
            let feature = feature.map_err(|_| broken("a feature has another length"))?;
            self.features.push(SubmissionEntry(feature));
        }
        for _ in 0..from.number()? {
            let (id, base, size) = (from.small()?, from.number()?, queue_size(&mut from)?);
            let vector: u16 = from.small()?;
            let (posted, head) = self.record.as_ref().map_or((0, 0), |r| r.completion(id));
            let mut cq = CompletionQueue::new(base, size, vector.checked_sub(1));
            cq.ring = CompletionRing::resume(size, head as u32, posted)
                .ok_or(broken("a completion queue's head is beyond its end"))?;
            cq.posted = posted;
            self.queues.completion.insert(id, cq);
        }
        for _ in 0..from.number()? {
            let (id, base, size) = (from.small()?, from.number()?, queue_size(&mut from)?);
            let mut sq = SubmissionQueue::new(base, size, from.small()?);
            sq.deleting = from.number()? != 0;
            let (fetched, tail) = self.record.as_ref().map_or((0, 0), |r| r.submission(id));
            sq.fetched = fetched;
            let head = (fetched % u64::from(size)) as u32;
            // A tail in the guest's memory is looked for there.
            let in_memory = id > 0 && self.shadow_doorbells.is_some();
            let tail = if in_memory { head } else { tail as u32 };
            sq.ring = SubmissionRing::resume(size, head, tail)
                .ok_or(broken("a submission queue's tail is beyond its end"))?;
            self.queues.submission.insert(id, sq);
        }
        Ok(())
    }

    /// Takes up the commands of a predecessor, once the guest's memory is mapped as it was. Every
    /// vector that has a queue is signalled, since the predecessor may not have come to that.
    pub fn recover(&mut self) -> Result<(), RecordError> {
        let Some(record) = &self.record else {
            return Ok(());
        };
        let mut slots: Vec<_> = (0..self.tags.len())
            .map(|tag| (Tag(tag), record.slot(Tag(tag))))
            .filter(|(_, (slot, progress))| {
                progress.state != SlotState::Free && slot.era == self.era
            })
            .collect();
        let order = slots.iter().map(|(_, (_, progress))| progress.order).max();
        if let Some(record) = &mut self.record {
            record.set_order(order.unwrap_or(0));
        }
        // One that was about to be posted is the next one of its queue.
        slots.sort_by_key(|(_, (_, progress))| match progress.state {
            SlotState::Posting(_) => (0, progress.order),
            _ => (1, progress.order),
        });
        for (tag, (slot, progress)) in slots {
            self.take_up(tag, &slot, progress)?;
        }
        let ids: Vec<_> = self.queues.completion.iter().map(|(id, _)| id).collect();
        for id in ids {
            self.post_held(id);
            let vector = self.queues.completion.get(id).and_then(|cq| cq.vector);
            vector
                .into_iter()
                .for_each(|vector| self.interrupts.raise(vector));
        }
        self.interrupts.signal();
        self.commit();
        Ok(())
    }

    fn take_up(&mut self, tag: Tag, slot: &Slot, progress: Progress) -> Result<(), RecordError> {
        let Progress {
            state,
            status,
            result,
            ..
        } = progress;
        if let SlotState::Posting(number) = state {
            if self.is_posted(slot.completion_queue, number) {
                self.forget_slot(tag);
                return Ok(());
            }
        }
        let command = self.tags.occupy(tag);
        let command = command.ok_or(RecordError::Broken("two commands have one tag"))?;
        command.origin = Origin::Guest;
        command.sqe = slot.sqe;
        command.queue = slot.queue;
        command.completion_queue = slot.completion_queue;
        command.landing_failed = false;
        if matches!(state, SlotState::Held | SlotState::Posting(_)) {
            command.state = State::Held { status, result };
            match self.queues.cq(slot.completion_queue) {
                Some(cq) => cq.held.push_back(tag),
                None => self.forget(tag),
            }
            return Ok(());
        }
        if !self.shadow.occupy(slot.shadow) {
            return Err(RecordError::Broken(
                "two commands have one part of the buffer shadow",
            ));
        }
        command.shadow = slot.shadow;
        command.state = State::Queued;
        if let Some(sq) = self.queues.submission.get_mut(slot.queue) {
            sq.outstanding += 1;
            if sq.fetched == slot.position {
                sq.fetched += 1;
                sq.ring.advance();
                if let Some(record) = &self.record {
                    record.set_fetched(slot.queue, sq.fetched);
                }
            }
        }
        if state == SlotState::Returned {
            let result = self.settle(&slot.sqe, status, result);
            self.complete(tag, status, result);
            return Ok(());
        }
        let transfer = match slot.queue {
            0 if slot.sqe.opcode() == farbus_vfio::nvme::admin::DOORBELL_BUFFER => {
                Ok(transfer::Transfer::None)
            }
            0 => transfer::of_admin(&slot.sqe),
            _ => transfer::of_nvm(&slot.sqe, &self.description.namespaces),
        };
        let walked = transfer.and_then(|transfer| {
            let len = transfer.len();
            let walked = self
                .segments
                .walk(&self.memory, &slot.sqe, len, slot.shadow)?;
            Ok((transfer, walked))
        });
        match (walked, self.tags.get_mut(tag)) {
            (Ok((transfer, segments)), Some(command)) => {
                command.transfer = transfer;
                command.segments = segments;
            }
            (Err(status), _) => self.complete(tag, status, 0),
            _ => {}
        }
        Ok(())
    }

    /// Whether the completion of this number is in the guest's queue; if it is and nobody has taken
    /// note of that, the queue moves past it.
    fn is_posted(&mut self, queue: u16, number: u64) -> bool {
        let Some(cq) = self.queues.completion.get_mut(queue) else {
            return true;
        };
        if number != cq.posted {
            return number < cq.posted;
        }
        if !cq.was_posted(&self.memory).unwrap_or(false) {
            return false;
        }
        cq.ring.advance();
        cq.posted += 1;
        if let Some(record) = &self.record {
            record.set_posted(queue, cq.posted);
        }
        true
    }

    fn forget_slot(&self, tag: Tag) {
        if let Some(record) = &self.record {
            record.freed(tag);
        }
    }
}

fn queue_size(from: &mut ControlReader<'_>) -> Result<u32, RecordError> {
    let size = from.small()?;
    if !(2..=65536).contains(&size) {
        return Err(RecordError::Broken("a queue has an impossible size"));
    }
    Ok(size)
}

#[cfg(test)]
mod tests;
