//! One submission queue with one completion queue, as a host keeps them.

#![forbid(unsafe_code)]

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
    next_cid: u16,
    /// Identifiers of commands that have not completed.
    outstanding: Vec<u16>,
    /// Completions that were found while another one was looked for.
    set_aside: Vec<CompletionEntry>,
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
            next_cid: 0,
            outstanding: Vec::new(),
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
        if self.outstanding.len() + 1 >= usize::from(self.entries) {
            return Err(DriverError::QueueFull(self.id));
        }
        // An event request can be outstanding while the identifiers wrap around. The search
        // ends: fewer are outstanding than exist.
        while self.outstanding.contains(&self.next_cid) {
            self.next_cid = self.next_cid.wrapping_add(1);
        }
        let cid = self.next_cid;
        self.next_cid = cid.wrapping_add(1);
        command.set_cid(cid);
        memory.write(self.sq, usize::from(self.tail) * SQE_SIZE, &command.0)?;
        self.tail = self.next(self.tail);
        self.outstanding.push(cid);
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
        let known = self
            .outstanding
            .iter()
            .position(|cid| *cid == entry.cid)
            .ok_or(stray)?;
        self.outstanding.swap_remove(known);
        Ok(Some(entry))
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
