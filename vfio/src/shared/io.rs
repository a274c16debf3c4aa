//! The way of an I/O command: copied once out of the driver's queue, checked, laid out in this
//! side's own memory, placed in a queue of the drive; and the way back of its completion.
//!
//! Nothing here allocates. A command waits in the driver's queue, where it was found, as long as
//! the portion may have no more at the drive ([`super::share`]) or its completion has no room.

use super::check::{Data, check, check_range};
use super::controller::Controller;
use super::drive::{SharedDrive, Slice};
use super::queues::{Command, Own};
use super::share::Allowance;
use super::windows::Windows;
use crate::nvme::{PAGE_SIZE, Status, SubmissionEntry, nvm};
use crate::soft_nvme::{LIST_ENTRIES, Unreachable, walk};

/// Bytes of a range of Dataset Management (NVMe 1.4 figure 358).
const RANGE_SIZE: usize = 16;

/// What became of a look into a queue.
enum Step {
    /// There is nothing, or it has to wait.
    Idle,
    /// A command was taken out.
    Taken,
}

/// Where a command's data is laid out.
pub(super) struct Scratch {
    list: Box<[u64; LIST_ENTRIES]>,
    ranges: Box<[u8; PAGE_SIZE]>,
}

impl Scratch {
    pub(super) fn new() -> Self {
        Self {
            list: Box::new([0; LIST_ENTRIES]),
            ranges: Box::new([0; PAGE_SIZE]),
        }
    }

    /// Makes the PRPs for `len` bytes of data that a command names, each page of which must be the
    /// portion's. A list of pages is copied to the command's own page: what was checked is what
    /// the drive gets.
    fn prps(
        &mut self,
        windows: &Windows,
        own: &Own,
        slot: u16,
        command: &SubmissionEntry,
        (len, write): (usize, bool),
    ) -> Result<(u64, u64), Status> {
        let (mut count, mut first, mut second) = (0, 0, 0);
        let prps = (command.prp1(), command.prp2());
        let read_list = |address, entries: &mut [u64]| read_list(windows, address, entries);
        walk(prps, len, &mut self.list, read_list, |address, len| {
            windows.contains(address, len, write)?;
            match count {
                0 => first = address,
                n => own.put_page(slot, (n - 1) * 8, &address.to_le_bytes()),
            }
            if count == 1 {
                second = address;
            }
            count += 1;
            Ok(())
        })?;
        let prp2 = match count {
            0 | 1 => 0,
            2 => second,
            _ => own.page(slot),
        };
        Ok((first, prp2))
    }

    /// Copies the bytes that a command names into the scratch memory, once.
    fn copy_in(
        &mut self,
        windows: &Windows,
        command: &SubmissionEntry,
        len: usize,
    ) -> Result<&mut [u8], Status> {
        let Self { list, ranges } = self;
        let mut done = 0;
        let prps = (command.prp1(), command.prp2());
        let read_list = |address, entries: &mut [u64]| read_list(windows, address, entries);
        walk(prps, len, list, read_list, |address, len| {
            let into = ranges.get_mut(done..done + len).ok_or(Unreachable)?;
            done += len;
            windows.read(address, into)
        })?;
        ranges.get_mut(..len).ok_or(Status::INVALID_FIELD)
    }

    /// Copies bytes to the memory that an admin command names; zeroes behind their end.
    pub(super) fn copy_out(
        &mut self,
        windows: &Windows,
        command: &SubmissionEntry,
        len: usize,
        bytes: &[u8],
    ) -> Result<(), Status> {
        const ZEROES: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
        let mut rest = bytes;
        let prps = (command.prp1(), command.prp2());
        let read_list = |address, entries: &mut [u64]| read_list(windows, address, entries);
        walk(prps, len, &mut self.list, read_list, |address, len| {
            let (now, later) = rest.split_at(len.min(rest.len()));
            rest = later;
            windows.write(address, now)?;
            let missing = len - now.len();
            windows.write(
                address + now.len() as u64,
                ZEROES.get(..missing).ok_or(Unreachable)?,
            )
        })
    }
}

/// Copies entries of a list of pages, once.
fn read_list(windows: &Windows, address: u64, entries: &mut [u64]) -> Result<(), Unreachable> {
    let mut bytes = [0; PAGE_SIZE];
    let bytes = bytes.get_mut(..entries.len() * 8).ok_or(Unreachable)?;
    windows.read(address, bytes)?;
    for (entry, bytes) in entries.iter_mut().zip(bytes.chunks_exact(8)) {
        *entry = bytes
            .first_chunk()
            .map_or(0, |bytes| u64::from_le_bytes(*bytes));
    }
    Ok(())
}

impl Controller {
    /// Moves what there is to move, both ways, until nothing moves.
    pub(super) fn turn(&mut self, drive: &SharedDrive, index: usize) {
        loop {
            let completed = self.complete(drive);
            if !self.submit(drive, index) && !completed {
                return;
            }
        }
    }

    /// Gives the drive what it may have; whether there was something.
    pub(super) fn submit(&mut self, drive: &SharedDrive, index: usize) -> bool {
        let waiting = |sq: &super::queues::Sq| sq.head != sq.tail;
        if !self.may_work(drive) || !self.sqs.iter().skip(1).flatten().any(waiting) {
            return false;
        }
        let allowance = drive.share.claim(index);
        let slice = drive.slice(index);
        let queues = self.sqs.len() - 1;
        let mut any = false;
        // One command of each queue in turn, until none of them has one that may go.
        let mut idle = 0;
        while idle < queues {
            self.turn_of = self.turn_of % queues + 1;
            match self.step(self.turn_of as u16, slice, allowance) {
                Ok(Step::Taken) => (any, idle) = (true, 0),
                Ok(Step::Idle) => idle += 1,
                Err(Unreachable) => {
                    self.fail("a queue is not in mapped memory");
                    return any;
                }
            }
        }
        for pair in self.pairs.iter_mut().flatten() {
            if let Some(tail) = pair.untold() {
                // One that is gone says so when its status is asked for.
                let _ = drive.ring(pair.id, false, tail);
            }
        }
        any
    }

    /// Takes one command out of a queue, if it may go.
    fn step(&mut self, id: u16, slice: &Slice, allowance: Allowance) -> Result<Step, Unreachable> {
        let at = usize::from(id);
        let (Some(Some(sq)), Some(Some(pair))) = (self.sqs.get_mut(at), self.pairs.get_mut(at - 1))
        else {
            return Ok(Step::Idle);
        };
        let Some(Some(cq)) = self.cqs.get_mut(usize::from(sq.cq)) else {
            return Ok(Step::Idle);
        };
        let (true, Some(slot)) = (cq.has_room() && pair.has_room(), self.slots.next()) else {
            return Ok(Step::Idle);
        };
        let Some(command) = sq.peek(&self.windows)? else {
            return Ok(Step::Idle);
        };
        let laid_out = check(&slice.bounds, &command).and_then(|checked| {
            let bytes = checked.work;
            if !allowance.admits(self.slots.count(), self.slots.bytes(), bytes) {
                return Ok(None);
            }
            let (windows, own) = (&self.windows, &self.own);
            let mut entry = checked.entry;
            match checked.data {
                Data::None => {}
                Data::ToDevice(len) | Data::FromDevice(len) => {
                    let write = matches!(checked.data, Data::FromDevice(_));
                    let data = (len as usize, write);
                    let prps = self.scratch.prps(windows, own, slot, &command, data)?;
                    entry.set_prps(prps.0, prps.1);
                }
                Data::Ranges(count) => {
                    let len = count as usize * RANGE_SIZE;
                    let ranges = self.scratch.copy_in(windows, &command, len)?;
                    for range in ranges.chunks_exact_mut(RANGE_SIZE) {
                        let mut copy = [0; RANGE_SIZE];
                        copy.copy_from_slice(range);
                        range.copy_from_slice(&check_range(&slice.bounds, copy)?);
                    }
                    own.put_page(slot, 0, ranges);
                    entry.set_prps(own.page(slot), 0);
                }
            }
            Ok(Some((entry, bytes)))
        });
        match laid_out {
            Ok(None) => return Ok(Step::Idle),
            Ok(Some((mut entry, bytes))) => {
                sq.advance();
                cq.reserved += 1;
                entry.set_cid(slot);
                pair.push(&self.own, &entry);
                self.slots.insert(Command {
                    sq: id,
                    cid: command.cid(),
                    bytes,
                    opcode: command.opcode(),
                });
            }
            Err(status) => {
                sq.advance();
                let place = (id, sq.head);
                cq.post(&self.windows, place, command.cid(), status, 0)?;
                let vector = cq.vector;
                self.signal(vector);
            }
        }
        Ok(Step::Taken)
    }

    /// Passes on what the drive has completed; whether there was something.
    pub(super) fn complete(&mut self, drive: &SharedDrive) -> bool {
        if !self.may_work(drive) {
            return false;
        }
        let mut any = false;
        for id in 1..self.sqs.len() as u16 {
            match self.complete_queue(id) {
                Ok(Some((pair, head))) => {
                    any = true;
                    let _ = drive.ring(pair, true, head);
                }
                Ok(None) => {}
                Err(Unreachable) => self.fail("a completion queue is not in mapped memory"),
            }
        }
        any
    }

    /// Passes on the completions of one queue; the drive's doorbell to ring for it, and the value.
    pub(super) fn complete_queue(&mut self, id: u16) -> Result<Option<(u16, u16)>, Unreachable> {
        let at = usize::from(id);
        let (Some(Some(sq)), Some(Some(pair))) = (self.sqs.get_mut(at), self.pairs.get_mut(at - 1))
        else {
            return Ok(None);
        };
        let mut taken = false;
        // No more than the queue has entries, also if the drive makes up completions.
        for _ in 0..super::queues::COMMANDS {
            if pair.outstanding == 0 {
                break;
            }
            let Some(entry) = pair.pop(&self.own) else {
                break;
            };
            taken = true;
            let Some(command) = self.slots.take(entry.cid, id) else {
                self.strays += 1;
                if self.strays.is_power_of_two() {
                    log::warn!(
                        "the drive completed command {} of queue {}, which was never sent ({} such so far)",
                        entry.cid,
                        entry.sq_id,
                        self.strays
                    );
                }
                continue;
            };
            pair.outstanding -= 1;
            if entry.status.is_success() {
                match command.opcode {
                    nvm::READ => self.counters.count_read(command.bytes),
                    nvm::WRITE => self.counters.count_write(command.bytes),
                    _ => {}
                }
            }
            if let Some(Some(cq)) = self.cqs.get_mut(usize::from(sq.cq)) {
                cq.reserved = cq.reserved.saturating_sub(1);
                cq.post(
                    &self.windows,
                    (id, sq.head),
                    command.cid,
                    entry.status,
                    entry.result,
                )?;
            }
        }
        Ok(taken.then(|| (pair.id, pair.head())))
    }
}
