//! `Submit`: a batch of commands, with the data of those that write.
//!
//! An entry is its placement (16 bytes), the command as its device class defines it (64
//! bytes), and on one-sided links the segments of compute-side memory that read data lands
//! in (16 bytes each). The payload is the data of all entries with direction to the device,
//! in the order of the entries.

use super::codec::{Put, Reader, within};
use super::{Epoch, Header, Kind, MAX_CONTROL, MAX_ENTRIES, MAX_PAYLOAD, QueueId, Tag, WireError};
use crate::link::RemoteSpan;

/// Length of an entry without segments.
pub(super) const ENTRY_LEN: usize = 16 + 64;
const SEGMENT_LEN: usize = 16;
const WHAT: &str = "a Submit entry";

/// Which way a command's data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Direction {
    /// No data.
    None = 0,
    /// From the guest to the device.
    ToDevice = 1,
    /// From the device to the guest.
    FromDevice = 2,
}

/// What the fabric needs to know about a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Names the command until its completion.
    pub tag: Tag,
    /// The queue it goes to.
    pub queue: QueueId,
    /// Where in the buffer shadow its data is.
    pub shadow_offset: u32,
    /// Length of its data in bytes; 0 exactly when the direction is none.
    pub data_len: u32,
    /// Which way its data goes.
    pub direction: Direction,
}

/// One command of a [`Submit`] message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubmitEntry<'a> {
    /// Tag, queue and data.
    pub placement: Placement,
    /// The command, as its device class defines it.
    pub command: &'a [u8; 64],
    /// Where read data lands in compute-side memory; empty unless the link is one-sided.
    pub segments: Segments<'a>,
}

/// The segments of an entry, read in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segments<'a>(&'a [u8]);

impl Iterator for Segments<'_> {
    type Item = RemoteSpan;

    fn next(&mut self) -> Option<RemoteSpan> {
        let mut reader = Reader::new(WHAT, self.0);
        let segment = take_segment(&mut reader).ok()?;
        self.0 = reader.rest();
        Some(segment)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.0.len() / SEGMENT_LEN;
        (left, Some(left))
    }
}

impl ExactSizeIterator for Segments<'_> {}

/// A checked `Submit` message, read in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Submit<'a> {
    count: u16,
    control: &'a [u8],
}

impl<'a> Submit<'a> {
    /// Checks a message whole, so that going through its entries cannot fail.
    pub fn decode(header: &Header, control: &'a [u8]) -> Result<Self, WireError> {
        if header.kind != Kind::Submit {
            return Err(WireError::WrongKind {
                found: header.kind,
                wanted: "a Submit message",
            });
        }
        header.check()?;
        header.check_control(control)?;
        let mut reader = Reader::new(WHAT, control);
        let mut sum = 0;
        for _ in 0..header.count {
            let entry = take_entry(&mut reader)?;
            check_entry(&entry)?;
            sum += to_device(&entry.placement);
        }
        reader.end()?;
        if sum != u64::from(header.payload_len) {
            return Err(WireError::PayloadSum {
                kind: header.kind,
                declared: header.payload_len,
                sum,
            });
        }
        Ok(Submit {
            count: header.count,
            control,
        })
    }

    /// The entries, in order.
    pub fn entries(&self) -> SubmitEntries<'a> {
        SubmitEntries {
            left: self.count,
            rest: self.control,
        }
    }
}

/// Goes through the entries of a [`Submit`].
#[derive(Clone, Debug)]
pub struct SubmitEntries<'a> {
    left: u16,
    rest: &'a [u8],
}

impl<'a> Iterator for SubmitEntries<'a> {
    type Item = SubmitEntry<'a>;

    fn next(&mut self) -> Option<SubmitEntry<'a>> {
        self.left = self.left.checked_sub(1)?;
        let mut reader = Reader::new(WHAT, self.rest);
        let entry = take_entry(&mut reader).ok()?;
        self.rest = reader.rest();
        Some(entry)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left.into(), Some(self.left.into()))
    }
}

impl ExactSizeIterator for SubmitEntries<'_> {}

/// Bytes that an entry adds to the payload.
fn to_device(placement: &Placement) -> u64 {
    match placement.direction {
        Direction::ToDevice => placement.data_len.into(),
        Direction::None | Direction::FromDevice => 0,
    }
}

fn take_segment(reader: &mut Reader<'_>) -> Result<RemoteSpan, WireError> {
    let address = reader.u64()?;
    let len = reader.u32()?;
    reader.reserved::<4>()?;
    Ok(RemoteSpan { address, len })
}

fn take_entry<'a>(reader: &mut Reader<'a>) -> Result<SubmitEntry<'a>, WireError> {
    let tag = Tag(reader.u16()?);
    let queue = QueueId(reader.u16()?);
    let shadow_offset = reader.u32()?;
    let data_len = reader.u32()?;
    let direction = match reader.u8()? {
        0 => Direction::None,
        1 => Direction::ToDevice,
        2 => Direction::FromDevice,
        value => {
            return Err(WireError::UnknownCode {
                what: "direction",
                value: value.into(),
            });
        }
    };
    reader.reserved::<1>()?;
    let segments = reader.u16()?;
    let command = reader.array()?;
    let segments = reader.bytes(usize::from(segments) * SEGMENT_LEN)?;
    Ok(SubmitEntry {
        placement: Placement {
            tag,
            queue,
            shadow_offset,
            data_len,
            direction,
        },
        command,
        segments: Segments(segments),
    })
}

fn check_entry(entry: &SubmitEntry<'_>) -> Result<(), WireError> {
    check_placement(&entry.placement)?;
    let mut reader = Reader::new(WHAT, entry.segments.0);
    while !reader.rest().is_empty() {
        check_segment(&take_segment(&mut reader)?)?;
    }
    check_segments(&entry.placement, entry.segments.clone())
}

fn check_placement(placement: &Placement) -> Result<(), WireError> {
    let Placement {
        tag,
        shadow_offset,
        data_len,
        direction,
        ..
    } = *placement;
    if (direction == Direction::None) != (data_len == 0) {
        return Err(WireError::DirectionData {
            tag,
            direction,
            data_len,
        });
    }
    // Beyond this, only the engine knows how large the shadow is.
    within(
        "a command's data in the buffer shadow",
        shadow_offset.into(),
        data_len.into(),
        u32::MAX.into(),
    )
}

fn check_segment(segment: &RemoteSpan) -> Result<(), WireError> {
    within("a segment", segment.address, segment.len.into(), u64::MAX)
}

/// Segments are for data from the device, and then for all of it.
fn check_segments(
    placement: &Placement,
    segments: impl ExactSizeIterator<Item = RemoteSpan>,
) -> Result<(), WireError> {
    if segments.len() == 0 {
        return Ok(());
    }
    let sum: u64 = segments.map(|segment| u64::from(segment.len)).sum();
    let data_len = match placement.direction {
        Direction::FromDevice => placement.data_len,
        Direction::None | Direction::ToDevice => 0,
    };
    if data_len == 0 || sum != u64::from(data_len) {
        return Err(WireError::SegmentSum {
            tag: placement.tag,
            data_len,
            sum,
        });
    }
    Ok(())
}

/// Collects the entries of a `Submit` message in a buffer that is used again and again.
#[derive(Debug, Default)]
pub struct SubmitBatch {
    control: Vec<u8>,
    count: u16,
    payload_len: u32,
}

impl SubmitBatch {
    /// An empty batch with room for as many entries as a message can have.
    pub fn new() -> Self {
        SubmitBatch {
            control: Vec::with_capacity(MAX_CONTROL),
            count: 0,
            payload_len: 0,
        }
    }

    /// Whether an entry with that much data to the device and that many segments still fits.
    pub fn has_room(&self, payload: u32, segments: usize) -> bool {
        let len = segments
            .checked_mul(SEGMENT_LEN)
            .and_then(|len| len.checked_add(ENTRY_LEN + self.control.len()));
        let payload = self.payload_len.checked_add(payload);
        self.count < MAX_ENTRIES
            && len.is_some_and(|len| len <= MAX_CONTROL)
            && payload.is_some_and(|len| len <= MAX_PAYLOAD)
    }

    /// Appends an entry. Fails, with the batch unchanged, if it does not fit
    /// ([`Self::has_room`]) or if a decoder would refuse it.
    pub fn push(
        &mut self,
        placement: &Placement,
        command: &[u8; 64],
        segments: &[RemoteSpan],
    ) -> Result<(), WireError> {
        check_placement(placement)?;
        segments.iter().try_for_each(check_segment)?;
        check_segments(placement, segments.iter().copied())?;
        let payload = to_device(placement) as u32;
        if !self.has_room(payload, segments.len()) {
            return Err(WireError::BatchFull {
                entries: self.count,
                control: self.control.len(),
                payload: self.payload_len,
            });
        }
        self.control.put_u16(placement.tag.0);
        self.control.put_u16(placement.queue.0);
        self.control.put_u32(placement.shadow_offset);
        self.control.put_u32(placement.data_len);
        self.control.put_u8(placement.direction as u8);
        self.control.put_u8(0);
        self.control.put_u16(segments.len() as u16);
        self.control.put_bytes(command);
        for segment in segments {
            self.control.put_u64(segment.address);
            self.control.put_u32(segment.len);
            self.control.put_u32(0);
        }
        self.count += 1;
        self.payload_len += payload;
        Ok(())
    }

    /// How many entries the batch has.
    pub fn len(&self) -> usize {
        self.count.into()
    }

    /// Whether the batch has no entries. An empty batch is no valid message.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The frame's header, without an epoch.
    pub fn header(&self) -> Header {
        Header {
            kind: Kind::Submit,
            count: self.count,
            control_len: self.control.len() as u32,
            payload_len: self.payload_len,
            epoch: Epoch::NONE,
        }
    }

    /// The frame's control part.
    pub fn control(&self) -> &[u8] {
        &self.control
    }

    /// Empties the batch and keeps its memory.
    pub fn clear(&mut self) {
        self.control.clear();
        self.count = 0;
        self.payload_len = 0;
    }
}
