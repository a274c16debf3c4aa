//! What a request needs of the guest's memory before any command of it can be made: ranges that it
//! names, and the place for the device's name.

#![forbid(unsafe_code)]

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Bytes, GuestAddress, Permissions};

use super::{Context, Request, blocks, find_all, outcome};
use crate::vhost_user::config::MAX_RANGES;
use crate::vhost_user::drive::Shape;
use crate::vhost_user::pieces::{self, Cursor};
use crate::vhost_user::request::{Kind, RANGE};
use crate::vhost_user::space::{Found, Space};

/// Blocks that are to read as zero, or to be given back: a range of the guest's that was checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Range {
    sector: u64,
    sectors: u32,
    pub(super) unmap: bool,
}

impl Range {
    /// As blocks of the drive, which can have changed since: where, and how many.
    pub(super) fn blocks(&self, shape: &Shape) -> Option<(u64, u32)> {
        let (lba, blocks) = blocks(shape, self.sector, self.sectors.into())?;
        Some((lba, u32::try_from(blocks).ok()?))
    }
}

impl Request {
    /// Whether all is there that [`Self::begin`] reads or writes.
    pub fn finds_its_own<S: Space>(&self, space: &S) -> Found {
        let access = match self.parsed.kind {
            Kind::GetId => Permissions::Write,
            Kind::Discard | Kind::WriteZeroes => Permissions::Read,
            _ => return Found::Here,
        };
        let most = MAX_RANGES * RANGE as u32;
        let segments = pieces::within(&self.segments, Cursor::default(), most);
        find_all(space, segments, access)
    }

    /// Copies the ranges of a discard or write zeroes, and checks the copies.
    pub(super) fn read_ranges<S: Space>(
        &mut self,
        space: &S,
        context: &Context<'_>,
        flags: u32,
    ) -> Result<(), u8> {
        let mut bytes = [0; MAX_RANGES as usize * RANGE];
        let room = bytes.get_mut(..self.parsed.len as usize);
        let room = room.ok_or(outcome::ERROR)?;
        let mut at = 0;
        for segment in &self.segments {
            let end = at + segment.len as usize;
            let part = room.get_mut(at..end).ok_or(outcome::ERROR)?;
            let read = space.read_slice(part, GuestAddress(segment.address));
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
            let range = Range {
                sector,
                sectors,
                unmap: wanted & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
            };
            let (_, blocks) = range.blocks(context.shape).ok_or(outcome::ERROR)?;
            if blocks > 0 {
                self.ranges.push(range);
            }
        }
        Ok(())
    }

    /// Writes the device's name to the guest.
    pub(super) fn name<S: Space>(&mut self, space: &S, context: &Context<'_>) -> Result<(), u8> {
        let mut name = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in name.iter_mut().zip(context.serial.bytes()) {
            *to = from;
        }
        let mut at = 0;
        for segment in pieces::within(&self.segments, Cursor::default(), VIRTIO_BLK_ID_BYTES) {
            let end = at + segment.len as usize;
            let part = name.get(at..end).ok_or(outcome::ERROR)?;
            let written = space.write_slice(part, GuestAddress(segment.address));
            written.map_err(|_| outcome::ERROR)?;
            at = end;
        }
        self.parsed.len = VIRTIO_BLK_ID_BYTES;
        Ok(())
    }
}
