//! Why bytes are no valid message, or a message cannot be put into bytes.

use super::{Direction, Epoch, ExportName, Kind, Side, Tag};

/// What a decoder or encoder objects to, with the values it met.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Fewer bytes than the message's own lengths ask for.
    #[error("{what} needs {need} more bytes where {have} are left")]
    Truncated {
        /// The message or part.
        what: &'static str,
        /// Bytes that the next field needs.
        need: usize,
        /// Bytes that are left.
        have: usize,
    },
    /// More bytes than the message has fields.
    #[error("{what} is followed by {extra} bytes that belong to nothing")]
    Trailing {
        /// The message or part.
        what: &'static str,
        /// The surplus.
        extra: usize,
    },
    /// A kind of message that no version has.
    #[error("message kind {0:#06x} is unknown")]
    UnknownKind(u16),
    /// A message where only others can be.
    #[error("a {found} message is in place of {wanted}")]
    WrongKind {
        /// The message.
        found: Kind,
        /// What could be there.
        wanted: &'static str,
    },
    /// A code that its field does not know.
    #[error("{what} {value} is unknown")]
    UnknownCode {
        /// The field.
        what: &'static str,
        /// What it held.
        value: u64,
    },
    /// A field that has to be zero is not.
    #[error("a reserved field of {what} is {value:#x}")]
    Reserved {
        /// The message or part.
        what: &'static str,
        /// What the field held.
        value: u64,
    },
    /// A number outside its range.
    #[error("{what} is {value}, outside {min}..={max}")]
    OutOfRange {
        /// The field.
        what: &'static str,
        /// What it held.
        value: u64,
        /// Least value allowed.
        min: u64,
        /// Greatest value allowed.
        max: u64,
    },
    /// A value that must be a power of two is not.
    #[error("{what} is {value}, which is no power of two")]
    NoPowerOfTwo {
        /// What was being read.
        what: &'static str,
        /// Its value.
        value: u32,
    },
    /// A length or count in a header that the kind of message does not allow.
    #[error("the {field} of a {kind} message is {value}, outside {min}..={max}")]
    HeaderField {
        /// The message.
        kind: Kind,
        /// The header's field.
        field: &'static str,
        /// What it held.
        value: u32,
        /// Least value allowed.
        min: u32,
        /// Greatest value allowed.
        max: u32,
    },
    /// The header's length of the control part is not that of the bytes at hand.
    #[error("the header of a {kind} message declares {declared} bytes of control where {have} are")]
    ControlLen {
        /// The message.
        kind: Kind,
        /// `control_len`.
        declared: u32,
        /// Length of the bytes at hand.
        have: usize,
    },
    /// The payload is not as long as the entries' data together.
    #[error("a {kind} message declares {declared} bytes of payload, its entries {sum}")]
    PayloadSum {
        /// The message.
        kind: Kind,
        /// `payload_len`.
        declared: u32,
        /// Sum over the entries.
        sum: u64,
    },
    /// Not the first bytes of this protocol.
    #[error("the peer's magic bytes are {0:02x?}")]
    Magic([u8; 8]),
    /// A string that is not UTF-8.
    #[error("{what} is not UTF-8 from byte {valid_up_to} on")]
    NotUtf8 {
        /// The field.
        what: &'static str,
        /// Where the first invalid sequence begins.
        valid_up_to: usize,
    },
    /// A byte that no export name may have.
    #[error("byte {byte:#04x} at {at} is not allowed in an export name")]
    ExportNameByte {
        /// The byte.
        byte: u8,
        /// Where it is.
        at: usize,
    },
    /// A range that does not fit its address space.
    #[error("{what} of {len} bytes at {offset:#x} reaches past {limit:#x}")]
    Range {
        /// What the range is of.
        what: &'static str,
        /// Where it begins.
        offset: u64,
        /// How long it is.
        len: u64,
        /// End of the address space.
        limit: u64,
    },
    /// An entry whose direction and length of data contradict each other.
    #[error("{tag} has direction {direction:?} and {data_len} bytes of data")]
    DirectionData {
        /// The entry.
        tag: Tag,
        /// Its direction.
        direction: Direction,
        /// Its length of data.
        data_len: u32,
    },
    /// An entry with segments that do not add up to its data, or that may have none.
    #[error("{tag} has {data_len} bytes of data from the device and segments for {sum}")]
    SegmentSum {
        /// The entry.
        tag: Tag,
        /// Bytes that come from the device.
        data_len: u32,
        /// Bytes that the segments hold.
        sum: u64,
    },
    /// Regions that are not in rising order of their index.
    #[error("region {index} follows region {previous}")]
    RegionOrder {
        /// The index.
        index: u8,
        /// The one before.
        previous: u8,
    },
    /// Exports that are not in rising order of their names.
    #[error("export {name} is listed after {previous}")]
    ListingOrder {
        /// The name.
        name: ExportName,
        /// The one before.
        previous: ExportName,
    },
    /// A message that the side it comes from does not send.
    #[error("a {kind} message never comes from the {from} side")]
    WrongSide {
        /// The message.
        kind: Kind,
        /// Where it came from.
        from: Side,
    },
    /// A frame of another claim, or of none.
    #[error("a {kind} message has {found} on a connection of {expected}")]
    WrongEpoch {
        /// The message.
        kind: Kind,
        /// The frame's epoch.
        found: Epoch,
        /// The connection's epoch.
        expected: Epoch,
    },
    /// A message that belongs before the claim, or after it.
    #[error("a {kind} message is out of place on a connection of {epoch}")]
    WrongPhase {
        /// The message.
        kind: Kind,
        /// The connection's epoch.
        epoch: Epoch,
    },
    /// A batch that has no room for one more entry.
    #[error(
        "the batch is full with {entries} entries, {control} bytes of control and {payload} of payload"
    )]
    BatchFull {
        /// Entries it has.
        entries: u16,
        /// Control bytes it has.
        control: usize,
        /// Payload bytes it has.
        payload: u32,
    },
}
