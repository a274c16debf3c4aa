//! One request at work: what is asked for is checked against the drive, and becomes commands of it.

#![forbid(unsafe_code)]

use farbus_vfio::driver::DriverError;
use farbus_vfio::nvme::{Status, SubmissionEntry, nvm};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Bytes, GuestAddress};

use super::bounce;
use super::chain::MAX_PARTS;
use super::config::{MAX_RANGES, MAX_ZEROES};
use super::drive::{BOUNCE, BounceId, Data, Done, Drive, Shape};
use super::memory::Guest;
use super::pieces::{self, Cursor, Limits};
use super::request::{Kind, Parsed, RANGE, SECTOR, Segment};

/// Force unit access: the write is durable before it is done (NVMe 1.4 §6.15).
const FUA: u32 = 1 << 30;
/// Write Zeroes may deallocate (NVMe 1.4 §6.16).
const DEALLOCATE: u32 = 1 << 25;
/// Status codes that say that the drive lacks a command (NVMe 1.4 figure 128).
const INVALID_OPCODE: u16 = Status::INVALID_OPCODE.0 & 0x7ff;

/// A request's outcome (virtio 1.2 §5.2.6).
pub mod outcome {
    use super::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
    /// It was done.
    pub const OK: u8 = VIRTIO_BLK_S_OK as u8;
    /// It failed.
    pub const ERROR: u8 = VIRTIO_BLK_S_IOERR as u8;
    /// The device does not have it.
    pub const UNSUPPORTED: u8 = VIRTIO_BLK_S_UNSUPP as u8;
}

/// What requests are judged by.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The guest's memory.
    pub guest: &'a Guest,
    /// The drive.
    pub shape: &'a Shape,
    /// Nothing can be written.
    pub read_only: bool,
    /// Writes are durable before they are answered.
    pub write_through: bool,
    /// What the guest reads as the drive's name.
    pub serial: &'a str,
}

/// Blocks that are to read as zero, or to be given back.
#[derive(Clone, Copy, Debug)]
struct Range {
    lba: u64,
    blocks: u32,
    unmap: bool,
}

/// What is still to be submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Done,
    /// Read or write: where, and bytes.
    Transfer {
        opcode: u8,
        lba: u64,
        left: u32,
    },
    Flush,
    /// All ranges, in one command.
    Discard,
    /// The ranges from this one on.
    Zeroes(usize),
}

/// How far an attempt to submit a command got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Submitted {
    /// One was submitted.
    Yes,
    /// It has to wait for a bounce buffer.
    Wait,
    /// The request is done, or has failed.
    Nothing,
}

/// A request, from the available ring to the used ring.
#[derive(Debug)]
pub struct Request {
    /// Whether there is one in this place.
    pub active: bool,
    /// What the guest asked for.
    pub parsed: Parsed,
    /// The memory with its data.
    pub segments: Vec<Segment>,
    /// Its outcome so far.
    pub status: u8,
    ranges: Vec<Range>,
    work: Work,
    cursor: Cursor,
    /// Commands at the drive.
    pending: u32,
    /// The bounce buffer that a command at the drive uses, and for which data.
    bounce: Option<(BounceId, Cursor, u32)>,
}

impl Request {
    /// A place without a request.
    pub fn vacant() -> Self {
        Self {
            active: false,
            parsed: Parsed {
                kind: Kind::Malformed,
                sector: 0,
                len: 0,
                status: 0,
            },
            segments: Vec::with_capacity(MAX_PARTS),
            status: outcome::OK,
            ranges: Vec::with_capacity(MAX_RANGES as usize),
            work: Work::Done,
            cursor: Cursor::default(),
            pending: 0,
            bounce: None,
        }
    }

    /// Begins what `parsed` and `segments` say, or begins it anew after the drive was reset.
    pub fn begin(&mut self, context: &Context<'_>) {
        self.active = true;
        (self.pending, self.cursor, self.bounce) = (0, Cursor::default(), None);
        (self.work, self.status) = match self.plan(context) {
            Ok(work) => (work, outcome::OK),
            Err(status) => (Work::Done, status),
        };
    }

    /// Whether it can be answered.
    pub fn is_finished(&self) -> bool {
        self.pending == 0 && self.work == Work::Done
    }

    /// Whether all of its commands have been submitted.
    pub fn is_submitted(&self) -> bool {
        self.work == Work::Done
    }

    /// The bounce buffer that it holds.
    pub fn bounce(&self) -> Option<BounceId> {
        self.bounce.map(|(id, ..)| id)
    }

    /// Bytes that were written to the guest's memory, but for the status.
    pub fn written(&self) -> u32 {
        match self.parsed.kind {
            Kind::Read | Kind::GetId if self.status == outcome::OK => self.parsed.len,
            _ => 0,
        }
    }

    fn plan(&mut self, context: &Context<'_>) -> Result<Work, u8> {
        let Parsed {
            kind, sector, len, ..
        } = self.parsed;
        if context.read_only && matches!(kind, Kind::Write | Kind::Discard | Kind::WriteZeroes) {
            return Err(outcome::ERROR);
        }
        let transfer = |opcode| {
            let lba = blocks(context.shape, sector, u64::from(len) / SECTOR);
            let (lba, _) = lba.ok_or(outcome::ERROR)?;
            Ok(Work::Transfer {
                opcode,
                lba,
                left: len,
            })
        };
        match kind {
            Kind::Read => transfer(nvm::READ),
            Kind::Write => transfer(nvm::WRITE),
            Kind::Flush => Ok(Work::Flush),
            Kind::Discard if context.shape.can_discard => {
                self.read_ranges(context, 0).map(|()| Work::Discard)
            }
            Kind::WriteZeroes if context.shape.can_write_zeroes => self
                .read_ranges(context, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)
                .map(|()| Work::Zeroes(0)),
            Kind::GetId => self.name(context).map(|()| Work::Done),
            Kind::Discard | Kind::WriteZeroes | Kind::Unsupported(_) => Err(outcome::UNSUPPORTED),
            Kind::Malformed => Err(outcome::ERROR),
        }
    }

    /// Copies the ranges of a discard or write zeroes, and checks the copies.
    fn read_ranges(&mut self, context: &Context<'_>, flags: u32) -> Result<(), u8> {
        self.ranges.clear();
        let mut bytes = [0; MAX_RANGES as usize * RANGE];
        let room = bytes.get_mut(..self.parsed.len as usize);
        let room = room.ok_or(outcome::ERROR)?;
        let mut at = 0;
        for segment in &self.segments {
            let end = at + segment.len as usize;
            let part = room.get_mut(at..end).ok_or(outcome::ERROR)?;
            let read = context
                .guest
                .read_slice(part, GuestAddress(segment.address));
            read.map_err(|_| outcome::ERROR)?;
            at = end;
        }
        for range in room.chunks_exact(RANGE) {
            let [sector, rest] = [0, 8].map(|at| {
                let bytes = range.get(at..at + 8).and_then(|b| b.try_into().ok());
                bytes.map_or(0, u64::from_le_bytes)
            });
            let (sectors, wanted) = (rest as u32, (rest >> 32) as u32);
            // Virtio 1.2 §5.2.6.2: flags that are not known, and unmap in a discard.
            if wanted & !flags != 0 {
                return Err(outcome::UNSUPPORTED);
            }
            let (lba, blocks) =
                blocks(context.shape, sector, sectors.into()).ok_or(outcome::ERROR)?;
            if blocks > 0 {
                self.ranges.push(Range {
                    lba,
                    blocks: u32::try_from(blocks).map_err(|_| outcome::ERROR)?,
                    unmap: wanted & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
                });
            }
        }
        Ok(())
    }

    /// Writes the device's name to the guest.
    fn name(&mut self, context: &Context<'_>) -> Result<(), u8> {
        let mut name = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in name.iter_mut().zip(context.serial.bytes()) {
            *to = from;
        }
        let mut at = 0;
        for segment in pieces::within(&self.segments, Cursor::default(), VIRTIO_BLK_ID_BYTES) {
            let end = at + segment.len as usize;
            let part = name.get(at..end).ok_or(outcome::ERROR)?;
            let written = context
                .guest
                .write_slice(part, GuestAddress(segment.address));
            written.map_err(|_| outcome::ERROR)?;
            at = end;
        }
        self.parsed.len = VIRTIO_BLK_ID_BYTES;
        Ok(())
    }

    /// Submits the next command to the queue pair of a virtqueue, which has room for it. `token`
    /// says whose it is, given whether it uses a bounce buffer.
    pub fn submit(
        &mut self,
        queue: u16,
        context: &Context<'_>,
        drive: &mut Drive,
        token: impl Fn(bool) -> u64,
    ) -> Result<Submitted, DriverError> {
        match self.work {
            Work::Done => return Ok(Submitted::Nothing),
            Work::Transfer { opcode, lba, left } => {
                return self.transfer(queue, opcode, (lba, left), context, drive, token);
            }
            Work::Flush => {
                let command = SubmissionEntry::new(nvm::FLUSH);
                drive.submit(queue, command, Data::None, 0, token(false))?;
                self.work = Work::Done;
            }
            Work::Discard => {
                if self.ranges.is_empty() {
                    self.work = Work::Done;
                    return Ok(Submitted::Nothing);
                }
                let Some(id) = drive.take_bounce() else {
                    return Ok(Submitted::Wait);
                };
                for (n, range) in self.ranges.iter().enumerate() {
                    let (lba, blocks) = (range.lba.to_le_bytes(), range.blocks.to_le_bytes());
                    drive.fill_bounce(id, n * RANGE + 4, &blocks)?;
                    drive.fill_bounce(id, n * RANGE + 8, &lba)?;
                }
                let mut command = SubmissionEntry::new(nvm::DATASET_MANAGEMENT);
                command.set_dword(10, self.ranges.len() as u32 - 1);
                command.set_dword(11, 1 << 2);
                let len = (self.ranges.len() * RANGE) as u32;
                drive.submit(queue, command, Data::Bounce(id), len, token(true))?;
                self.bounce = Some((id, Cursor::default(), 0));
                self.work = Work::Done;
            }
            Work::Zeroes(at) => {
                let Some(range) = self.ranges.get_mut(at) else {
                    self.work = Work::Done;
                    return Ok(Submitted::Nothing);
                };
                let now = u64::from(range.blocks).min(MAX_ZEROES) as u32;
                let unmap = if range.unmap { DEALLOCATE } else { 0 };
                let through = if context.write_through { FUA } else { 0 };
                let command = command(nvm::WRITE_ZEROES, range.lba, now, unmap | through);
                drive.submit(queue, command, Data::None, 0, token(false))?;
                range.lba += u64::from(now);
                range.blocks -= now;
                if range.blocks == 0 {
                    let last = at + 1 == self.ranges.len();
                    self.work = if last {
                        Work::Done
                    } else {
                        Work::Zeroes(at + 1)
                    };
                }
            }
        }
        self.pending += 1;
        Ok(Submitted::Yes)
    }

    fn transfer(
        &mut self,
        queue: u16,
        opcode: u8,
        (lba, left): (u64, u32),
        context: &Context<'_>,
        drive: &mut Drive,
        token: impl Fn(bool) -> u64,
    ) -> Result<Submitted, DriverError> {
        let block = context.shape.block_size;
        let limits = Limits {
            block,
            transfer: context.shape.max_transfer,
            bounce: BOUNCE,
        };
        let piece = pieces::next_piece(&self.segments, self.cursor, left, limits);
        let through = opcode == nvm::WRITE && context.write_through;
        let command = command(
            opcode,
            lba,
            piece.len / block,
            if through { FUA } else { 0 },
        );
        if piece.direct {
            let data = Data::Direct {
                segments: &self.segments,
                cursor: self.cursor,
                len: piece.len,
            };
            drive.submit(queue, command, data, piece.len, token(false))?;
        } else {
            // One at a time for each request.
            if self.bounce.is_some() {
                return Ok(Submitted::Wait);
            }
            let Some(id) = drive.take_bounce() else {
                return Ok(Submitted::Wait);
            };
            if opcode == nvm::WRITE
                && !bounce::gather(
                    drive,
                    id,
                    context.guest,
                    &self.segments,
                    self.cursor,
                    piece.len,
                )?
            {
                drive.free_bounce(id);
                self.fail(outcome::ERROR);
                return Ok(Submitted::Nothing);
            }
            drive.submit(queue, command, Data::Bounce(id), piece.len, token(true))?;
            self.bounce = Some((id, self.cursor, piece.len));
        }
        self.pending += 1;
        self.cursor = pieces::advance(&self.segments, self.cursor, piece.len);
        let left = left - piece.len;
        self.work = if left == 0 {
            Work::Done
        } else {
            Work::Transfer {
                opcode,
                lba: lba + u64::from(piece.len / block),
                left,
            }
        };
        Ok(Submitted::Yes)
    }

    /// One of its commands is done.
    pub fn completed(
        &mut self,
        done: &Done,
        bounced: bool,
        guest: &Guest,
        drive: &mut Drive,
    ) -> Result<(), DriverError> {
        self.pending = self.pending.saturating_sub(1);
        if !done.status.is_success() {
            self.fail(if done.status.0 & 0x7ff == INVALID_OPCODE {
                outcome::UNSUPPORTED
            } else {
                outcome::ERROR
            });
        }
        let Some(used) = bounced.then(|| self.bounce.take()).flatten() else {
            return Ok(());
        };
        if self.parsed.kind == Kind::Read
            && done.status.is_success()
            && !bounce::scatter(drive, used, guest, &self.segments)?
        {
            self.fail(outcome::ERROR);
        }
        drive.free_bounce(used.0);
        Ok(())
    }

    /// Nothing more of it is submitted.
    fn fail(&mut self, status: u8) {
        self.status = status;
        self.work = Work::Done;
    }
}

/// The blocks that sectors are, if they are whole blocks of the drive: where, and how many.
fn blocks(shape: &Shape, sector: u64, sectors: u64) -> Option<(u64, u64)> {
    let end = sector.checked_add(sectors)?;
    if end > shape.sectors() {
        return None;
    }
    let first = shape.block_of(sector)?;
    Some((first, shape.block_of(end)? - first))
}

fn command(opcode: u8, lba: u64, blocks: u32, flags: u32) -> SubmissionEntry {
    let mut command = SubmissionEntry::new(opcode);
    command.set_slba(lba);
    command.set_dword(12, (blocks.saturating_sub(1) & 0xffff) | flags);
    command
}
