//! What a descriptor chain asks of a block device (virtio 1.2 §5.2.6).
//!
//! The parser gets the buffers of a chain and guest memory, both hostile, and says what is wanted
//! and where the answer goes. It relies on no framing: header and data may share a buffer, or
//! be cut anywhere. Everything it returns lies within the guest's memory.

#![forbid(unsafe_code)]

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use super::chain::Part;

/// The unit of addresses and lengths in requests, in bytes.
pub const SECTOR: u64 = 512;
/// Length of the header: type, a reserved word, sector.
const HEADER: usize = 16;
/// Length of a range of discard and write zeroes: sector u64, sectors u32, flags u32.
pub const RANGE: usize = 16;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read into the data buffers.
    Read,
    /// Write from the data buffers.
    Write,
    /// Make durable what was written.
    Flush,
    /// Give the space of the ranges in the data buffers back.
    Discard,
    /// Make the ranges in the data buffers read as zero.
    WriteZeroes,
    /// The device's name, into the data buffers.
    GetId,
    /// Something that this device does not have.
    Unsupported(u32),
    /// Something that makes no sense: it is answered with an error.
    Malformed,
}

/// A contiguous piece of guest memory with a request's data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Guest address.
    pub address: u64,
    /// Length in bytes, never 0.
    pub len: u32,
}

/// A request, as far as the chain says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// What is asked for.
    pub kind: Kind,
    /// Where on the device, in units of 512 bytes.
    pub sector: u64,
    /// Bytes of data.
    pub len: u32,
    /// Guest address of the status byte.
    pub status: u64,
}

/// A chain without a byte for the status in guest memory: nobody can be told of anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the chain has no byte in the guest's memory that could take a status")]
pub struct NoStatus;

/// Whether all of a range is guest memory.
pub fn is_memory<M: GuestMemory>(memory: &M, address: u64, len: u32) -> bool {
    len == 0 || memory.check_range(GuestAddress(address), len as usize, Permissions::ReadWrite)
}

/// Parses a chain. The data goes to `data`, whose contents are replaced.
pub fn parse<M: GuestMemory>(
    memory: &M,
    parts: &[Part],
    data: &mut Vec<Segment>,
) -> Result<Parsed, NoStatus> {
    data.clear();
    let used = || parts.iter().filter(|part| part.len > 0);
    let last = used().next_back().filter(|part| part.writable);
    let last = last.ok_or(NoStatus)?;
    let status = last
        .address
        .checked_add(u64::from(last.len) - 1)
        .filter(|status| is_memory(memory, *status, 1))
        .ok_or(NoStatus)?;
    let mut parsed = Parsed {
        kind: Kind::Malformed,
        sector: 0,
        len: 0,
        status,
    };
    let readable = used().take_while(|part| !part.writable).count();
    // Virtio 1.2 §2.7.4.2: what the device reads comes before what it writes.
    if used().skip(readable).any(|part| !part.writable) {
        return Ok(parsed);
    }
    let Some(header) = header(memory, used().take(readable)) else {
        return Ok(parsed);
    };
    let word = |at: usize| {
        let bytes = header.get(at..at + 4).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u32::from_le_bytes)
    };
    parsed.sector = u64::from(word(8)) | u64::from(word(12)) << 32;
    let kind = match word(0) {
        VIRTIO_BLK_T_IN => Kind::Read,
        VIRTIO_BLK_T_OUT => Kind::Write,
        VIRTIO_BLK_T_FLUSH => Kind::Flush,
        VIRTIO_BLK_T_DISCARD => Kind::Discard,
        VIRTIO_BLK_T_WRITE_ZEROES => Kind::WriteZeroes,
        VIRTIO_BLK_T_GET_ID => Kind::GetId,
        other => Kind::Unsupported(other),
    };
    let total = match kind {
        Kind::Read | Kind::GetId => collect(used().skip(readable), 0, 1, data),
        Kind::Write | Kind::Discard | Kind::WriteZeroes => {
            collect(used().take(readable), HEADER as u64, 0, data)
        }
        Kind::Flush | Kind::Unsupported(_) | Kind::Malformed => Some(0),
    };
    let is_memory = |s: &Segment| is_memory(memory, s.address, s.len);
    match total {
        Some(total) if data.iter().all(is_memory) && is_possible(kind, total) => {
            parsed.kind = kind;
            parsed.len = total;
        }
        _ => data.clear(),
    }
    Ok(parsed)
}

/// Whether a kind of request can have so many bytes of data.
fn is_possible(kind: Kind, len: u32) -> bool {
    match kind {
        Kind::Read | Kind::Write => len > 0 && u64::from(len) % SECTOR == 0,
        Kind::Discard | Kind::WriteZeroes => len > 0 && len as usize % RANGE == 0,
        Kind::GetId => len >= VIRTIO_BLK_ID_BYTES,
        Kind::Flush | Kind::Unsupported(_) | Kind::Malformed => true,
    }
}

fn header<'a, M: GuestMemory>(
    memory: &M,
    parts: impl Iterator<Item = &'a Part>,
) -> Option<[u8; HEADER]> {
    let mut header = [0; HEADER];
    let mut filled = 0;
    for part in parts {
        let len = (part.len as usize).min(HEADER - filled);
        let room = header.get_mut(filled..filled + len)?;
        memory.read_slice(room, GuestAddress(part.address)).ok()?;
        filled += len;
        if filled == HEADER {
            return Some(header);
        }
    }
    None
}

/// Collects buffers less their first `skip` and last `trim` bytes; returns how many bytes remain,
/// if that fits in 32 bits.
fn collect<'a>(
    parts: impl Iterator<Item = &'a Part> + Clone,
    skip: u64,
    trim: u64,
    data: &mut Vec<Segment>,
) -> Option<u32> {
    let whole: u64 = parts.clone().map(|part| u64::from(part.len)).sum();
    let total = whole.checked_sub(skip + trim)?;
    let (mut skip, mut left) = (skip, total);
    for part in parts {
        let len = u64::from(part.len);
        let before = skip.min(len);
        skip -= before;
        let take = (len - before).min(left);
        left -= take;
        if take > 0 {
            data.push(Segment {
                address: part.address.checked_add(before)?,
                len: take as u32,
            });
        }
    }
    u32::try_from(total).ok()
}
