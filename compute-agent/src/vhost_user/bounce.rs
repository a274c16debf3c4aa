//! The copies that cannot be avoided: data that PRPs cannot name, between guest memory and a
//! bounce buffer.

#![forbid(unsafe_code)]

use farbus_vfio::driver::DriverError;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::drive::{BounceId, Drive};
use super::pieces::{self, Cursor};
use super::request::Segment;

/// Bytes that are copied at a time.
const CHUNK: u32 = 4096;

/// Copies `len` bytes of a request's data, from `cursor` on, into a bounce buffer; false if the
/// memory is not there any more.
pub(super) fn gather<M: GuestMemory>(
    drive: &mut Drive,
    id: BounceId,
    guest: &M,
    segments: &[Segment],
    cursor: Cursor,
    len: u32,
) -> Result<bool, DriverError> {
    let mut at = 0;
    let mut buffer = [0; CHUNK as usize];
    for segment in pieces::within(segments, cursor, len) {
        for (address, len) in chunks(segment) {
            let part = buffer.get_mut(..len).unwrap_or_default();
            if guest.read_slice(part, GuestAddress(address)).is_err() {
                return Ok(false);
            }
            drive.fill_bounce(id, at, part)?;
            at += len;
        }
    }
    Ok(true)
}

/// Copies a bounce buffer into guest memory: which one, where its data belongs in the request, and
/// how many bytes it has. False if the memory is not there any more.
pub(super) fn scatter<M: GuestMemory>(
    drive: &mut Drive,
    (id, cursor, len): (BounceId, Cursor, u32),
    guest: &M,
    segments: &[Segment],
) -> Result<bool, DriverError> {
    let mut at = 0;
    let mut buffer = [0; CHUNK as usize];
    for segment in pieces::within(segments, cursor, len) {
        for (address, len) in chunks(segment) {
            let part = buffer.get_mut(..len).unwrap_or_default();
            drive.read_bounce(id, at, part)?;
            if guest.write_slice(part, GuestAddress(address)).is_err() {
                return Ok(false);
            }
            at += len;
        }
    }
    Ok(true)
}

/// Parts of a segment that fit in a small buffer: address and length.
fn chunks(segment: Segment) -> impl Iterator<Item = (u64, usize)> {
    let Segment { address, len } = segment;
    (0..len)
        .step_by(CHUNK as usize)
        .map(move |at| (address + u64::from(at), (len - at).min(CHUNK) as usize))
}
