//! `Complete`: a batch of completions, with the data of those that read.
//!
//! An entry has 24 bytes. The payload is the data of the entries, in their order.

use super::codec::{Put, Reader};
use super::{Epoch, Header, Kind, MAX_ENTRIES, MAX_PAYLOAD, QueueId, Tag, WireError};

/// Length of an entry.
pub(super) const ENTRY_LEN: usize = 24;
const WHAT: &str = "a Complete entry";

/// One completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompleteEntry {
    /// The command that is complete.
    pub tag: Tag,
    /// The queue it went to.
    pub queue: QueueId,
    /// How it ended, as its device class defines it.
    pub status: u16,
    /// Length of the data that comes with it, in bytes.
    pub data_len: u32,
    /// What it returned, as its device class defines it.
    pub result: u64,
}

/// A checked `Complete` message, read in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Complete<'a> {
    control: &'a [u8],
}

impl<'a> Complete<'a> {
    /// Checks a message whole, so that going through its entries cannot fail.
    pub fn decode(header: &Header, control: &'a [u8]) -> Result<Self, WireError> {
        if header.kind != Kind::Complete {
            return Err(WireError::WrongKind {
                found: header.kind,
                wanted: "a Complete message",
            });
        }
        header.check()?;
        header.check_control(control)?;
        let mut reader = Reader::new(WHAT, control);
        let mut sum = 0;
        for _ in 0..header.count {
            sum += u64::from(take_entry(&mut reader)?.data_len);
        }
        reader.end()?;
        if sum != u64::from(header.payload_len) {
            return Err(WireError::PayloadSum {
                kind: header.kind,
                declared: header.payload_len,
                sum,
            });
        }
        Ok(Complete { control })
    }

    /// The entries, in order.
    pub fn entries(&self) -> CompleteEntries<'a> {
        CompleteEntries { rest: self.control }
    }
}

/// Goes through the entries of a [`Complete`].
#[derive(Clone, Debug)]
pub struct CompleteEntries<'a> {
    rest: &'a [u8],
}

impl Iterator for CompleteEntries<'_> {
    type Item = CompleteEntry;

    fn next(&mut self) -> Option<CompleteEntry> {
        let mut reader = Reader::new(WHAT, self.rest);
        let entry = take_entry(&mut reader).ok()?;
        self.rest = reader.rest();
        Some(entry)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.rest.len() / ENTRY_LEN;
        (left, Some(left))
    }
}

impl ExactSizeIterator for CompleteEntries<'_> {}

fn take_entry(reader: &mut Reader<'_>) -> Result<CompleteEntry, WireError> {
    let tag = Tag(reader.u16()?);
    let queue = QueueId(reader.u16()?);
    let status = reader.u16()?;
    reader.reserved::<2>()?;
    let data_len = reader.u32()?;
    reader.reserved::<4>()?;
    let result = reader.u64()?;
    Ok(CompleteEntry {
        tag,
        queue,
        status,
        data_len,
        result,
    })
}

/// Collects the entries of a `Complete` message in a buffer that is used again and again.
#[derive(Debug, Default)]
pub struct CompleteBatch {
    control: Vec<u8>,
    count: u16,
    payload_len: u32,
}

impl CompleteBatch {
    /// An empty batch with room for as many entries as a message can have.
    pub fn new() -> Self {
        CompleteBatch {
            control: Vec::with_capacity(ENTRY_LEN * usize::from(MAX_ENTRIES)),
            count: 0,
            payload_len: 0,
        }
    }

    /// Whether an entry with that much data still fits.
    pub fn has_room(&self, data_len: u32) -> bool {
        let payload = self.payload_len.checked_add(data_len);
        self.count < MAX_ENTRIES && payload.is_some_and(|len| len <= MAX_PAYLOAD)
    }

    /// Appends an entry. Fails, with the batch unchanged, if it does not fit
    /// ([`Self::has_room`]).
    pub fn push(&mut self, entry: &CompleteEntry) -> Result<(), WireError> {
        if !self.has_room(entry.data_len) {
            return Err(WireError::BatchFull {
                entries: self.count,
                control: self.control.len(),
                payload: self.payload_len,
            });
        }
        self.control.put_u16(entry.tag.0);
        self.control.put_u16(entry.queue.0);
        self.control.put_u16(entry.status);
        self.control.put_u16(0);
        self.control.put_u32(entry.data_len);
        self.control.put_u32(0);
        self.control.put_u64(entry.result);
        self.count += 1;
        self.payload_len += entry.data_len;
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
            kind: Kind::Complete,
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
