//! One submission queue with one completion queue, as a host keeps them.

#![forbid(unsafe_code)]

use std::collections::VecDeque;

use super::DriverError;
use super::memory::{DmaBuffer, DmaMemory};
use crate::nvme::{CQE_SIZE, CompletionEntry, SQE_SIZE, SubmissionEntry};

/// A queue pair; both queues have the same id and size.
pub(super) struct QueuePair {
    id: u16,
    entries: u16,
    vector: Option<u16>,
    sq: DmaBuffer,
    cq: DmaBuffer,
    tail: u16,
    head: u16,
    phase: bool,
    /// The tail and the head that the controller was last told of.
    told: Told,
    /// For each identifier, whether its command has not completed.
    outstanding: Vec<bool>,
    /// The other identifiers; the one that has been free for longest comes first, so that a
    /// second completion of a command is found out for as long as can be.
    free: VecDeque<u16>,
    /// Completions that were found while another one was looked for.
    set_aside: Vec<CompletionEntry>,
}

/// What the doorbells were last set to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Told {
    pub(super) tail: u16,
    pub(super) head: u16,
}

impl QueuePair {
    pub(super) fn new(
        memory: &mut DmaMemory,
        id: u16,
        entries: u16,
        vector: Option<u16>,
    ) -> Result<Self, DriverError> {
        let sq = memory.allocate(usize::from(entries) * SQE_SIZE)?;
        let cq = memory.allocate(usize::from(entries) * CQE_SIZE)?;
        Ok(Self {
            id,
            entries,
            vector,
            sq,
            cq,
            tail: 0,
            head: 0,
            phase: true,
            told: Told::default(),
            outstanding: vec![false; usize::from(entries)],
            free: (0..entries).collect(),
            set_aside: Vec::new(),
        })
    }

    pub(super) fn free(self, memory: &mut DmaMemory) {
        memory.free(self.sq);
        memory.free(self.cq);
    }

    pub(super) fn sq_iova(&self) -> u64 {
        self.sq.iova().0
    }

    pub(super) fn cq_iova(&self) -> u64 {
        self.cq.iova().0
    }

    pub(super) fn vector(&self) -> Option<u16> {
        self.vector
    }

    pub(super) fn tail(&self) -> u16 {
        self.tail
    }

    pub(super) fn head(&self) -> u16 {
        self.head
    }

    /// What the doorbells were last set to; to be set when they are set again.
    pub(super) fn told(&mut self) -> &mut Told {
        &mut self.told
    }

    fn next(&self, index: u16) -> u16 {
        if index + 1 >= self.entries {
            0
        } else {
            index + 1
        }
    }

    /// Stores a command at the tail.
    pub(super) fn push(
        &mut self,
        memory: &DmaMemory,
        mut command: SubmissionEntry,
    ) -> Result<u16, DriverError> {
        // One entry stays empty, so one identifier stays free.
        let full = DriverError::QueueFull(self.id);
        let &cid = self
            .free
            .front()
            .filter(|_| self.free.len() > 1)
            .ok_or(full)?;
        command.set_cid(cid);
        memory.write(self.sq, usize::from(self.tail) * SQE_SIZE, &command.0)?;
        self.tail = self.next(self.tail);
        self.free.pop_front();
        if let Some(outstanding) = self.outstanding.get_mut(usize::from(cid)) {
            *outstanding = true;
        }
        Ok(cid)
    }

    /// Takes the completion at the head, if its phase says that it is new.
    pub(super) fn pop(
        &mut self,
        memory: &DmaMemory,
    ) -> Result<Option<CompletionEntry>, DriverError> {
        let at = usize::from(self.head) * CQE_SIZE;
        let second = memory.load(self.cq, at + 8)?;
        if (second >> 48 & 1 == 1) != self.phase {
            return Ok(None);
        }
        let entry = CompletionEntry::from_qwords([memory.load(self.cq, at)?, second]);
        self.head = self.next(self.head);
        if self.head == 0 {
            self.phase = !self.phase;
        }
        let stray = DriverError::Stray {
            queue: self.id,
            cid: entry.cid,
        };
        let outstanding = self.outstanding.get_mut(usize::from(entry.cid));
        match outstanding {
            Some(outstanding) if *outstanding => *outstanding = false,
            _ => return Err(stray),
        }
        self.free.push_back(entry.cid);
        Ok(Some(entry))
    }

    pub(super) fn has_set_aside(&self) -> bool {
        !self.set_aside.is_empty()
    }

    pub(super) fn set_aside(&mut self, entry: CompletionEntry) {
        self.set_aside.push(entry);
    }

    /// Takes a completion that was set aside: that of one command, or the oldest.
    pub(super) fn take_set_aside(&mut self, cid: Option<u16>) -> Option<CompletionEntry> {
        let at = self
            .set_aside
            .iter()
            .position(|e| cid.is_none_or(|cid| e.cid == cid))?;
        Some(self.set_aside.remove(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::function::Iova;
    use crate::nvme::Status;

    fn post(memory: &DmaMemory, pair: &QueuePair, slot: usize, cid: u16, phase: bool) {
        let entry = CompletionEntry {
            result: 0,
            sq_head: 0,
            sq_id: 1,
            cid,
            status: Status::SUCCESS,
            phase,
        };
        for (n, qword) in entry.to_qwords().into_iter().enumerate() {
            let at = slot * CQE_SIZE + 8 * n;
            memory.write(pair.cq, at, &qword.to_le_bytes()).unwrap();
        }
    }

    #[test]
    fn a_completion_that_nobody_waits_for_is_an_error_and_is_passed_over() {
        let mut memory = DmaMemory::new(Iova(0), 1 << 16).unwrap();
        let mut pair = QueuePair::new(&mut memory, 1, 4, None).unwrap();
        let cid = pair.push(&memory, SubmissionEntry::new(0)).unwrap();
        post(&memory, &pair, 0, cid ^ 0x5555, true);
        post(&memory, &pair, 1, cid, true);
        post(&memory, &pair, 2, cid, true);
        assert!(matches!(
            pair.pop(&memory),
            Err(DriverError::Stray { queue: 1, .. })
        ));
        assert_eq!(pair.pop(&memory).unwrap().map(|entry| entry.cid), Some(cid));
        assert!(
            matches!(pair.pop(&memory), Err(DriverError::Stray { .. })),
            "twice"
        );
        assert!(pair.pop(&memory).unwrap().is_none());
    }

    #[test]
    fn a_queue_takes_one_command_less_than_it_has_entries() {
        let mut memory = DmaMemory::new(Iova(0), 1 << 16).unwrap();
        let mut pair = QueuePair::new(&mut memory, 1, 4, None).unwrap();
        for _ in 0..3 {
            pair.push(&memory, SubmissionEntry::new(0)).unwrap();
        }
        let fourth = pair.push(&memory, SubmissionEntry::new(0));
        assert!(matches!(fourth, Err(DriverError::QueueFull(1))));
    }
}
