//! One request at work: what is asked for is checked against the drive, and becomes commands of it.

#![forbid(unsafe_code)]

mod inputs;

use farbus_vfio::driver::DriverError;
use farbus_vfio::nvme::{Status, SubmissionEntry, nvm};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::Permissions;

use self::inputs::Range;
use super::bounce;
use super::chain::MAX_PARTS;
use super::config::{MAX_RANGES, MAX_ZEROES};
use super::drive::{BOUNCE, BounceId, Data, Done, Drive, Shape};
use super::iommu::view::Behind;
use super::memory::Guest;
use super::pieces::{self, Cursor, Limits, Piece};
use super::request::{Kind, Parsed, RANGE, SECTOR, Segment};
use super::space::{Found, Space};

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
    /// The same as its driver names it, if that is behind an IOMMU.
    pub behind: Option<Behind<'a>>,
    /// The drive.
    pub shape: &'a Shape,
    /// Nothing can be written.
    pub read_only: bool,
    /// Writes are durable before they are answered.
    pub write_through: bool,
    /// What the guest reads as the drive's name.
    pub serial: &'a str,
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
    /// The ranges from this one on, less so many blocks of it that are done.
    Zeroes(usize, u32),
}

/// How far an attempt to submit a command got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Submitted {
    /// One was submitted.
    Yes,
    /// It has to wait for a bounce buffer.
    Wait,
    /// It has to wait until the VMM has said where its data is.
    Missing,
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
    /// That command is done, and its data has not reached the guest's memory.
    landing: bool,
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
            landing: false,
        }
    }

    /// Begins what `parsed` and `segments` say.
    pub fn begin<S: Space>(&mut self, space: &S, context: &Context<'_>) {
        self.active = true;
        self.ranges.clear();
        self.again(context);
        if self.work == Work::Done && self.parsed.kind != Kind::GetId {
            return;
        }
        let read = match self.parsed.kind {
            Kind::Discard => self.read_ranges(space, context, 0),
            Kind::WriteZeroes => {
                self.read_ranges(space, context, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)
            }
            Kind::GetId => self.name(space, context),
            _ => return,
        };
        if let Err(status) = read {
            self.fail(status);
        }
    }

    /// Begins it anew, after the drive was reset.
    pub fn again(&mut self, context: &Context<'_>) {
        (self.pending, self.cursor, self.bounce) = (0, Cursor::default(), None);
        self.landing = false;
        (self.work, self.status) = match self.plan(context) {
            Ok(work) => (work, outcome::OK),
            Err(status) => (Work::Done, status),
        };
    }

    /// Whether it can be answered.
    pub fn is_finished(&self) -> bool {
        self.pending == 0 && self.work == Work::Done && !self.landing
    }

    /// Whether data of it waits for its place in the guest's memory.
    pub fn is_landing(&self) -> bool {
        self.landing
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

    fn plan(&self, context: &Context<'_>) -> Result<Work, u8> {
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
            Kind::Discard if context.shape.can_discard => Ok(Work::Discard),
            Kind::WriteZeroes if context.shape.can_write_zeroes => Ok(Work::Zeroes(0, 0)),
            Kind::GetId => Ok(Work::Done),
            Kind::Discard | Kind::WriteZeroes | Kind::Unsupported(_) => Err(outcome::UNSUPPORTED),
            Kind::Malformed => Err(outcome::ERROR),
        }
    }

    /// Submits the next command to the queue pair of a virtqueue, which has room for it. `token`
    /// says whose it is, given whether it uses a bounce buffer.
    pub fn submit<S: Space>(
        &mut self,
        queue: u16,
        space: &S,
        context: &Context<'_>,
        drive: &mut Drive,
        token: impl Fn(bool) -> u64,
    ) -> Result<Submitted, DriverError> {
        match self.work {
            Work::Done => return Ok(Submitted::Nothing),
            Work::Transfer { opcode, lba, left } => {
                return self.transfer(queue, opcode, (lba, left), (space, context), drive, token);
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
                    let Some((lba, blocks)) = range.blocks(context.shape) else {
                        drive.free_bounce(id);
                        self.fail(outcome::ERROR);
                        return Ok(Submitted::Nothing);
                    };
                    drive.fill_bounce(id, n * RANGE + 4, &blocks.to_le_bytes())?;
                    drive.fill_bounce(id, n * RANGE + 8, &lba.to_le_bytes())?;
                }
                let mut command = SubmissionEntry::new(nvm::DATASET_MANAGEMENT);
                command.set_dword(10, self.ranges.len() as u32 - 1);
                command.set_dword(11, 1 << 2);
                let len = (self.ranges.len() * RANGE) as u32;
                drive.submit(queue, command, Data::Bounce(id), len, token(true))?;
                self.bounce = Some((id, Cursor::default(), 0));
                self.work = Work::Done;
            }
            Work::Zeroes(at, done) => {
                let Some(range) = self.ranges.get(at) else {
                    self.work = Work::Done;
                    return Ok(Submitted::Nothing);
                };
                let left = range.blocks(context.shape);
                let left = left.map(|(lba, blocks)| (lba, blocks.saturating_sub(done)));
                let Some((lba, left @ 1..)) = left else {
                    self.fail(outcome::ERROR);
                    return Ok(Submitted::Nothing);
                };
                let now = u64::from(left).min(MAX_ZEROES) as u32;
                let unmap = if range.unmap { DEALLOCATE } else { 0 };
                let through = if context.write_through { FUA } else { 0 };
                let at_lba = lba + u64::from(done);
                let command = command(nvm::WRITE_ZEROES, at_lba, now, unmap | through);
                drive.submit(queue, command, Data::None, 0, token(false))?;
                self.work = match left - now {
                    0 if at + 1 == self.ranges.len() => Work::Done,
                    0 => Work::Zeroes(at + 1, 0),
                    _ => Work::Zeroes(at, done + now),
                };
            }
        }
        self.pending += 1;
        Ok(Submitted::Yes)
    }

    fn transfer<S: Space>(
        &mut self,
        queue: u16,
        opcode: u8,
        (lba, left): (u64, u32),
        (space, context): (&S, &Context<'_>),
        drive: &mut Drive,
        token: impl Fn(bool) -> u64,
    ) -> Result<Submitted, DriverError> {
        let block = context.shape.block_size;
        let limits = Limits {
            block,
            transfer: context.shape.max_transfer,
            bounce: BOUNCE,
        };
        let piece = if S::IS_GUESTS {
            pieces::next_piece(&self.segments, self.cursor, left, limits)
        } else {
            // The drive is given nothing that the guest can take back while it uses it.
            Piece {
                len: left.min(BOUNCE),
                direct: false,
            }
        };
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
            if opcode == nvm::WRITE {
                let data = pieces::within(&self.segments, self.cursor, piece.len);
                if find_all(space, data, Permissions::Read) == Found::Missing {
                    return Ok(Submitted::Missing);
                }
            }
            let Some(id) = drive.take_bounce() else {
                return Ok(Submitted::Wait);
            };
            if opcode == nvm::WRITE
                && !bounce::gather(drive, id, space, &self.segments, self.cursor, piece.len)?
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
    pub fn completed<S: Space>(
        &mut self,
        done: &Done,
        bounced: bool,
        space: &S,
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
        if !bounced {
            return Ok(());
        }
        if self.parsed.kind == Kind::Read && done.status.is_success() {
            self.landing = true;
            return self.land(space, drive);
        }
        if let Some((id, ..)) = self.bounce.take() {
            drive.free_bounce(id);
        }
        Ok(())
    }

    /// Copies what was read to the guest, unless it is not known yet where that is.
    pub fn land<S: Space>(&mut self, space: &S, drive: &mut Drive) -> Result<(), DriverError> {
        let Some((id, cursor, len)) = self.bounce else {
            self.landing = false;
            return Ok(());
        };
        let data = pieces::within(&self.segments, cursor, len);
        if find_all(space, data, Permissions::Write) == Found::Missing {
            return Ok(());
        }
        (self.landing, self.bounce) = (false, None);
        if !bounce::scatter(drive, (id, cursor, len), space, &self.segments)? {
            self.fail(outcome::ERROR);
        }
        drive.free_bounce(id);
        Ok(())
    }

    /// Nothing more of it is submitted.
    fn fail(&mut self, status: u8) {
        self.status = status;
        self.work = Work::Done;
    }
}

/// Whether all of these can be used. All that is missing is asked for.
fn find_all<S: Space>(
    space: &S,
    segments: impl Iterator<Item = Segment>,
    access: Permissions,
) -> Found {
    let mut outcome = Found::Here;
    if S::IS_GUESTS {
        return outcome;
    }
    for Segment { address, len } in segments {
        match space.find(address, len.into(), access) {
            Found::Here => {}
            Found::Missing => outcome = Found::Missing,
            Found::Refused => return Found::Refused,
        }
    }
    outcome
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
