//! The header that every frame begins with.
//!
//! It is checked before anything else of a frame is read: the kind of message bounds the
//! length of the control part and says whether there may be a payload, so that an absurd
//! length is refused before a byte of it arrives.

use std::fmt;

use super::codec::Reader;
use super::complete::ENTRY_LEN as COMPLETE_ENTRY;
use super::submit::ENTRY_LEN as SUBMIT_ENTRY;
use super::{
    Epoch, ExportName, HEADER_LEN, Listing, MAX_CONTROL, MAX_ENTRIES, MAX_PAYLOAD, WireError,
};

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $min:expr, $max:expr;)*) => {
        /// What a frame says.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum Kind {
            $($(#[$doc])* $name = $number,)*
        }

        impl Kind {
            /// Every kind, in the order of their numbers.
            pub const ALL: &'static [Kind] = &[$(Kind::$name,)*];

            /// The kind with this number.
            pub fn from_number(number: u16) -> Option<Self> {
                match number {
                    $($number => Some(Kind::$name),)*
                    _ => None,
                }
            }

            /// The name, as `docs/protocol.md` has it.
            pub fn name(self) -> &'static str {
                match self {
                    $(Kind::$name => stringify!($name),)*
                }
            }

            /// Shortest and longest control part.
            fn control_bounds(self) -> (u32, u32) {
                match self {
                    $(Kind::$name => ($min, $max),)*
                }
            }
        }
    };
}

kinds! {
    /// The compute side introduces itself.
    Hello = 0x01, 14, 14 + 64;
    /// The device side introduces itself and chooses the version.
    Welcome = 0x02, 12, 12 + 64;
    /// The device side declines to go on, and closes.
    Refused = 0x03, 4, 4 + 512;
    /// The compute side asks for an export.
    Claim = 0x04, 3, 2 + 64;
    /// The export is the compute side's.
    Claimed = 0x05, 16, 16;
    /// Asks what the function is.
    Describe = 0x06, 0, 0;
    /// What the function is.
    Description = 0x07, 24 + 256, MAX_CONTROL as u32;
    /// The engine's part of the description has changed.
    EngineNotice = 0x08, 4, 4 + 32 * 1024;
    /// Asks what there is to claim, instead of claiming.
    List = 0x0a, 2, 2 + ExportName::MAX as u32;
    /// What there is to claim.
    Listing = 0x0b, Listing::HEAD as u32, MAX_CONTROL as u32;
    /// As `Claim`, with limits that the compute side wants for itself.
    ClaimWith = 0x0c, 3 + 32, 2 + 64 + 32;
    /// Reads config space.
    ConfigRead = 0x10, 8, 8;
    /// Writes config space; posted.
    ConfigWrite = 0x11, 5, 4 + 64;
    /// Reads a register.
    RegisterRead = 0x12, 16, 16;
    /// Writes a register; posted.
    RegisterWrite = 0x13, 17, 16 + 64;
    /// Answers a read of config space or of a register.
    Value = 0x14, 8, 8 + 64;
    /// Device memory has changed: the BAR mirror takes it over.
    RegisterUpdate = 0x15, 17, 16 + 64;
    /// Commands, with the data of those that write.
    Submit = 0x20, SUBMIT_ENTRY as u32, MAX_CONTROL as u32;
    /// Completions, with the data of those that read.
    Complete = 0x21, COMPLETE_ENTRY as u32, MAX_CONTROL as u32;
    /// The function signals an interrupt.
    Interrupt = 0x22, 4, 4;
    /// Asks for a reset of the function.
    Reset = 0x30, 4, 4;
    /// The reset is done, or failed.
    ResetDone = 0x31, 8, 8 + 512;
    /// Asks the peer for a sign of life.
    Ping = 0x40, 8, 8;
    /// The sign of life.
    Pong = 0x41, 8, 8;
    /// The compute side gives the export back.
    Release = 0x50, 0, 0;
    /// The export is free again.
    Released = 0x51, 0, 0;
    /// The function failed.
    Fault = 0x52, 4, 4 + 512;
    /// The compute side has an RDMA device, and a queue pair that waits.
    RdmaOffer = 0x60, 48, 48;
    /// The device side joins its own, or says why not.
    RdmaAnswer = 0x61, 4, 4 + 512;
    /// Whether RDMA works, and carries everything after set-up.
    RdmaChoice = 0x62, 4, 4 + 512;
    /// Memory of the sender may be written to, or may no longer.
    RdmaKeys = 0x63, 24, 24 * 1024;
}

impl Kind {
    /// The kind's number on the wire.
    pub fn number(self) -> u16 {
        self as u16
    }

    /// Whether messages of this kind have entries and may have a payload.
    pub fn has_entries(self) -> bool {
        matches!(self, Kind::Submit | Kind::Complete)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame says.
    pub kind: Kind,
    /// Entries of a `Submit` or `Complete`; 0 for all others.
    pub count: u16,
    /// Length of the control part in bytes.
    pub control_len: u32,
    /// Length of the payload in bytes.
    pub payload_len: u32,
    /// The claim that the frame belongs to. Links set it when they send.
    pub epoch: Epoch,
}

impl Header {
    /// A header for a message without entries.
    pub(super) fn plain(kind: Kind, control_len: usize) -> Self {
        Header {
            kind,
            count: 0,
            control_len: control_len as u32,
            payload_len: 0,
            epoch: Epoch::NONE,
        }
    }

    /// Length of header and control part in bytes.
    pub fn prefix_len(&self) -> usize {
        HEADER_LEN + self.control_len as usize
    }

    /// Length of the whole frame in bytes.
    pub fn frame_len(&self) -> usize {
        self.prefix_len() + self.payload_len as usize
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..2].copy_from_slice(&self.kind.number().to_le_bytes());
        bytes[2..4].copy_from_slice(&self.count.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.control_len.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.payload_len.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.epoch.0.to_le_bytes());
        bytes
    }

    /// Reads and checks a header.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, WireError> {
        let mut reader = Reader::new("frame header", bytes);
        let number = reader.u16()?;
        let kind = Kind::from_number(number).ok_or(WireError::UnknownKind(number))?;
        let count = reader.u16()?;
        let control_len = reader.u32()?;
        let payload_len = reader.u32()?;
        reader.reserved::<4>()?;
        let epoch = Epoch(reader.u64()?);
        let header = Header {
            kind,
            count,
            control_len,
            payload_len,
            epoch,
        };
        header.check()?;
        Ok(header)
    }

    /// Fails unless count and lengths are possible for the kind of message.
    pub(crate) fn check(&self) -> Result<(), WireError> {
        let entries = self.kind.has_entries();
        let (min_count, max_count) = if entries { (1, MAX_ENTRIES) } else { (0, 0) };
        self.check_field("count", self.count.into(), min_count, max_count.into())?;
        let (min, max) = self.kind.control_bounds();
        let (min, max) = match self.kind {
            Kind::Submit => (min * u32::from(self.count), max),
            Kind::Complete => (min * u32::from(self.count), min * u32::from(self.count)),
            _ => (min, max),
        };
        self.check_field("control length", self.control_len, min, max)?;
        let max_payload = if entries { MAX_PAYLOAD } else { 0 };
        self.check_field("payload length", self.payload_len, 0, max_payload)
    }

    fn check_field(
        &self,
        field: &'static str,
        value: u32,
        min: u32,
        max: u32,
    ) -> Result<(), WireError> {
        if (min..=max).contains(&value) {
            return Ok(());
        }
        Err(WireError::HeaderField {
            kind: self.kind,
            field,
            value,
            min,
            max,
        })
    }

    /// Fails unless `control` is as long as the header declares.
    pub(super) fn check_control(&self, control: &[u8]) -> Result<(), WireError> {
        if control.len() == self.control_len as usize {
            return Ok(());
        }
        Err(WireError::ControlLen {
            kind: self.kind,
            declared: self.control_len,
            have: control.len(),
        })
    }
}
