//! The queues of a portion: those that its driver made, in its driver's memory, and those of the
//! drive, in this side's own.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, VolatileMemory};

use super::windows::Windows;
use crate::function::DmaWindow;
use crate::nvme::{CQE_SIZE, CompletionEntry, PAGE_SIZE, SQE_SIZE, Status, SubmissionEntry};
use crate::soft_nvme::Unreachable;

/// Commands that one portion has at the drive, at most.
pub(super) const COMMANDS: u16 = 1024;
/// Most entries of a queue of the drive's.
const MAX_ENTRIES: usize = 1024;
/// Bytes of one queue pair of the drive.
const PAIR_SIZE: usize = MAX_ENTRIES * (SQE_SIZE + CQE_SIZE);

/// Where a queue of the driver's is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) base: u64,
    pub(super) entries: u16,
}

impl Shape {
    pub(super) fn next(self, index: u16) -> u16 {
        if index + 1 >= self.entries {
            0
        } else {
            index + 1
        }
    }

    pub(super) fn distance(self, from: u16, to: u16) -> u16 {
        if to >= from {
            to - from
        } else {
            self.entries - from + to
        }
    }

    fn address(self, index: u16, size: usize) -> Result<u64, Unreachable> {
        self.base
            .checked_add(u64::from(index) * size as u64)
            .ok_or(Unreachable)
    }
}

/// A submission queue of the driver's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sq {
    pub(super) shape: Shape,
    pub(super) head: u16,
    pub(super) tail: u16,
    pub(super) cq: u16,
}

impl Sq {
    pub(super) fn new(shape: Shape, cq: u16) -> Self {
        Self {
            shape,
            head: 0,
            tail: 0,
            cq,
        }
    }

    /// The command at the head, copied once; [`Self::advance`] takes it.
    pub(super) fn peek(&self, windows: &Windows) -> Result<Option<SubmissionEntry>, Unreachable> {
        if self.head == self.tail {
            return Ok(None);
        }
        let mut entry = SubmissionEntry([0; SQE_SIZE]);
        let address = self.shape.address(self.head, SQE_SIZE)?;
        windows.read(address, &mut entry.0)?;
        Ok(Some(entry))
    }

    pub(super) fn advance(&mut self) {
        self.head = self.shape.next(self.head);
    }
}

/// A completion queue of the driver's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cq {
    pub(super) shape: Shape,
    pub(super) head: u16,
    tail: u16,
    phase: bool,
    /// Entries that commands at the drive will need.
    pub(super) reserved: u16,
    /// The interrupt, if it has one.
    pub(super) vector: Option<u16>,
}

impl Cq {
    pub(super) fn new(shape: Shape, vector: Option<u16>) -> Self {
        Self {
            shape,
            head: 0,
            tail: 0,
            phase: true,
            reserved: 0,
            vector,
        }
    }

    /// Whether there is room for one more (NVMe 1.4 §4.1.2).
    pub(super) fn has_room(&self) -> bool {
        self.has_room_for(1)
    }

    /// Whether there is room for so many more.
    pub(super) fn has_room_for(&self, more: u32) -> bool {
        let used = self.shape.distance(self.head, self.tail);
        u32::from(used) + u32::from(self.reserved) + more < u32::from(self.shape.entries)
    }

    /// Takes the head doorbell; says whether the value can be.
    pub(super) fn set_head(&mut self, head: u16) -> bool {
        let posted = self.shape.distance(self.head, self.tail);
        let possible = head < self.shape.entries && self.shape.distance(self.head, head) <= posted;
        if possible {
            self.head = head;
        }
        possible
    }

    /// Posts an entry, for which there is room.
    pub(super) fn post(
        &mut self,
        windows: &Windows,
        (sq_id, sq_head): (u16, u16),
        cid: u16,
        status: Status,
        result: u64,
    ) -> Result<(), Unreachable> {
        let entry = CompletionEntry {
            result,
            sq_head,
            sq_id,
            cid,
            status,
            phase: self.phase,
        };
        let address = self.shape.address(self.tail, CQE_SIZE)?;
        windows.store_pair(address, entry.to_qwords())?;
        self.tail = self.shape.next(self.tail);
        if self.tail == 0 {
            self.phase = !self.phase;
        }
        Ok(())
    }
}

/// This side's own memory: the drive's queues, and a page for each command, for the list of its
/// data's pages or the ranges that it names. No command of the driver's can name it.
pub(super) struct Own(DmaWindow);

impl Own {
    /// Bytes for so many queue pairs.
    pub(super) fn len_for(pairs: u16) -> usize {
        usize::from(pairs) * PAIR_SIZE + usize::from(COMMANDS) * PAGE_SIZE
    }

    pub(super) fn new(window: DmaWindow) -> Self {
        Self(window)
    }

    pub(super) fn window(&self) -> &DmaWindow {
        &self.0
    }

    fn put(&self, at: usize, bytes: &[u8]) {
        // Offsets are computed from pairs, entries and slots that exist.
        if let Ok(slice) = self.0.memory.get_slice(at, bytes.len()) {
            slice.copy_from(bytes);
        }
    }

    fn address(&self, at: usize) -> u64 {
        self.0.iova.0 + at as u64
    }

    fn page_at(&self, slot: u16) -> usize {
        self.0.len - usize::from(COMMANDS) * PAGE_SIZE + usize::from(slot) * PAGE_SIZE
    }

    /// Where the drive sees the page of a command.
    pub(super) fn page(&self, slot: u16) -> u64 {
        self.address(self.page_at(slot))
    }

    /// Fills part of the page of a command.
    pub(super) fn put_page(&self, slot: u16, at: usize, bytes: &[u8]) {
        self.put(self.page_at(slot) + at, bytes);
    }
}

/// A queue pair of the drive.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pair {
    /// Its id, and the number of its interrupt.
    pub(super) id: u16,
    index: u16,
    entries: u16,
    tail: u16,
    /// The tail that the drive knows of.
    told: u16,
    head: u16,
    phase: bool,
    pub(super) outstanding: u16,
}

impl Pair {
    /// The pair with this place in the portion's memory, empty.
    pub(super) fn new(id: u16, index: u16, entries: u16, own: &Own) -> Self {
        let pair = Self {
            id,
            index,
            entries,
            tail: 0,
            told: 0,
            head: 0,
            phase: true,
            outstanding: 0,
        };
        let zeroes = [0; PAGE_SIZE];
        for at in (0..PAIR_SIZE).step_by(PAGE_SIZE) {
            own.put(pair.sq_at() + at, &zeroes);
        }
        pair
    }

    fn sq_at(&self) -> usize {
        usize::from(self.index) * PAIR_SIZE
    }

    fn cq_at(&self) -> usize {
        self.sq_at() + MAX_ENTRIES * SQE_SIZE
    }

    /// Where the drive sees both queues.
    pub(super) fn addresses(&self, own: &Own) -> (u64, u64) {
        (own.address(self.sq_at()), own.address(self.cq_at()))
    }

    pub(super) fn has_room(&self) -> bool {
        self.outstanding + 1 < self.entries
    }

    /// Places a command, for which there is room.
    pub(super) fn push(&mut self, own: &Own, entry: &SubmissionEntry) {
        own.put(self.sq_at() + usize::from(self.tail) * SQE_SIZE, &entry.0);
        self.tail = if self.tail + 1 == self.entries {
            0
        } else {
            self.tail + 1
        };
        self.outstanding += 1;
    }

    /// The tail that the drive is to be told of, if it does not know it.
    pub(super) fn untold(&mut self) -> Option<u16> {
        let untold = self.told != self.tail;
        self.told = self.tail;
        untold.then_some(self.tail)
    }

    /// Takes the next completion, if there is one.
    pub(super) fn pop(&mut self, own: &Own) -> Option<CompletionEntry> {
        let at = self.cq_at() + usize::from(self.head) * CQE_SIZE;
        let slot = own.0.memory.get_slice(at, CQE_SIZE).ok()?;
        let high = u64::from_le(slot.load(8, Ordering::Acquire).ok()?);
        if (high >> 48 & 1 == 1) != self.phase {
            return None;
        }
        let low = u64::from_le(slot.load(0, Ordering::Relaxed).ok()?);
        self.head += 1;
        if self.head == self.entries {
            self.head = 0;
            self.phase = !self.phase;
        }
        Some(CompletionEntry::from_qwords([low, high]))
    }

    /// The value for the head doorbell.
    pub(super) fn head(&self) -> u16 {
        self.head
    }
}

/// A command at the drive.
#[derive(Clone, Copy, Debug)]
pub(super) struct Command {
    /// The driver's queue and identifier.
    pub(super) sq: u16,
    pub(super) cid: u16,
    /// Bytes that it transfers, and whether to its medium.
    pub(super) bytes: u32,
    pub(super) opcode: u8,
}

/// The commands at the drive, by the identifier that they have there.
pub(super) struct Slots {
    commands: Vec<Option<Command>>,
    free: Vec<u16>,
    bytes: u64,
}

impl Slots {
    pub(super) fn new() -> Self {
        Self {
            commands: vec![None; COMMANDS.into()],
            free: (0..COMMANDS).rev().collect(),
            bytes: 0,
        }
    }

    /// How many there are.
    pub(super) fn count(&self) -> u32 {
        u32::from(COMMANDS) - self.free.len() as u32
    }

    /// Bytes that all of them transfer.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The identifier that the next command will have, if there is one left.
    pub(super) fn next(&self) -> Option<u16> {
        self.free.last().copied()
    }

    /// Takes [`Self::next`] for a command.
    pub(super) fn insert(&mut self, command: Command) {
        if let Some(slot) = self.free.pop() {
            self.commands[usize::from(slot)] = Some(command);
            self.bytes += u64::from(command.bytes);
        }
    }

    /// Takes out the command of a queue that has this identifier.
    pub(super) fn take(&mut self, slot: u16, sq: u16) -> Option<Command> {
        let place = self.commands.get_mut(usize::from(slot))?;
        let command = place.take_if(|command| command.sq == sq)?;
        self.free.push(slot);
        self.bytes -= u64::from(command.bytes);
        Some(command)
    }

    /// Takes out any command of a queue.
    pub(super) fn take_of(&mut self, sq: u16) -> Option<Command> {
        let of_queue = |place: &Option<Command>| place.is_some_and(|c| c.sq == sq);
        let slot = self.commands.iter().position(of_queue)?;
        self.take(slot as u16, sq)
    }
}
