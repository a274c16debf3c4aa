//! The wire protocol: frames, messages and their encoding.
//!
//! Everything here is a pure function over bytes. Decoding checks every length, count, code
//! and string before it hands anything out, never panics, and allocates no more than the
//! bytes at hand. The two messages of the I/O path ([`Submit`] and [`Complete`]) are read in
//! place and written into buffers that are used again, so that they allocate nothing.
//!
//! All integers are little endian. `docs/protocol.md` has the layouts as tables.

mod admission;
mod bounded;
mod codec;
mod codes;
mod complete;
mod description;
mod error;
mod header;
mod ids;
mod limits;
mod listing;
mod message;
mod message_bytes;
mod rdma;
mod submit;
mod version;

pub use admission::{Admission, Side};
pub use bounded::{Data, ExportName, Label, Text};
pub use codes::{FaultCode, InterruptKind, RefusalCode};
pub use complete::{Complete, CompleteBatch, CompleteEntries, CompleteEntry};
pub use description::{Description, EngineKind, InterruptCounts, Region};
pub use error::WireError;
pub use header::{Header, Kind};
pub use ids::{Epoch, QueueId, RequestId, Tag};
pub use limits::RateLimits;
pub use listing::{Listed, ListedState, Listing};
pub use message::Message;
pub use rdma::{RdmaEndpoint, RdmaKey};
pub use submit::{Direction, Placement, Segments, Submit, SubmitBatch, SubmitEntries, SubmitEntry};
pub use version::{NEWEST, OLDEST, ProtocolVersion, negotiate};

/// Length of a frame's header.
pub const HEADER_LEN: usize = 24;
/// Longest control part of a frame.
pub const MAX_CONTROL: usize = 64 * 1024;
/// Longest payload of a frame.
pub const MAX_PAYLOAD: u32 = 16 * 1024 * 1024;
/// Least control of a frame that has a payload.
///
/// Because of it, a receiver can read the header and so many bytes more of a frame it knows
/// nothing about, and still let the whole payload land where it belongs.
pub const MIN_CONTROL_BEFORE_PAYLOAD: usize = 24;
/// Most entries of a [`Submit`] or [`Complete`] message.
pub const MAX_ENTRIES: u16 = 256;
/// First eight bytes of `Hello` and `Welcome`.
pub const MAGIC: [u8; 8] = *b"farbus\r\n";

/// A decoded control part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body<'a> {
    /// Any message but the two below.
    Message(Message),
    /// Commands, read in place.
    Submit(Submit<'a>),
    /// Completions, read in place.
    Complete(Complete<'a>),
}

/// Decodes the control part of a frame.
pub fn decode_body<'a>(header: &Header, control: &'a [u8]) -> Result<Body<'a>, WireError> {
    match header.kind {
        Kind::Submit => Submit::decode(header, control).map(Body::Submit),
        Kind::Complete => Complete::decode(header, control).map(Body::Complete),
        _ => Message::decode(header, control).map(Body::Message),
    }
}

/// Decodes the frame at the beginning of `bytes`: its header, its message and the bytes of
/// its payload.
///
/// What follows the frame in `bytes` is left alone; the frame's length is
/// [`Header::frame_len`]. Links do not use this function, since payloads land elsewhere; it
/// serves tests, fuzzing and captures.
pub fn decode_frame(bytes: &[u8]) -> Result<(Header, Body<'_>, &[u8]), WireError> {
    let mut reader = codec::Reader::new("frame", bytes);
    let header = Header::decode(reader.array()?)?;
    let control = reader.bytes(header.control_len as usize)?;
    let payload = reader.bytes(header.payload_len as usize)?;
    Ok((header, decode_body(&header, control)?, payload))
}
