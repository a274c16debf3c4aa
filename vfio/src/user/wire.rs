//! The header that every vfio-user message begins with, and what can be wrong with a
//! message.
//!
//! All integers are in the byte order of the host (specification, "Protocol
//! Specification"), since both ends run on one machine.

/// Length of the header in bytes.
pub const HEADER_LEN: usize = 16;

/// The major version of the protocol that is spoken here.
pub const VERSION_MAJOR: u16 = 0;
/// The highest minor version that is spoken here.
pub const VERSION_MINOR: u16 = 1;

/// The most data that one read or write carries, in bytes: the specification's default for
/// `max_data_xfer_size`. QEMU reads an expansion ROM in one piece, so less would not do.
pub const MAX_DATA_XFER: usize = 1 << 20;

/// The longest message that is accepted, in bytes: a region write of [`MAX_DATA_XFER`].
pub const MAX_MESSAGE: usize = HEADER_LEN + 16 + MAX_DATA_XFER;

/// The most file descriptors that one message carries. cloud-hypervisor sends this many
/// whatever it is told, and QEMU refuses to be told of more.
pub const MAX_MSG_FDS: usize = 16;

/// The most DMA windows that a client may have at once: the specification's default for
/// `max_dma_maps`.
pub const MAX_DMA_MAPS: usize = 65535;

/// The granularity of DMA windows in bytes: the specification's default for `pgsizes`.
pub const DMA_PAGE: u64 = 4096;

/// Header flag: the sender wants no reply to this command.
pub const FLAG_NO_REPLY: u32 = 1 << 4;
/// Header flag: this reply reports a failure.
pub const FLAG_ERROR: u32 = 1 << 5;
const FLAG_TYPE_MASK: u32 = 0xf;
const TYPE_COMMAND: u32 = 0;
const TYPE_REPLY: u32 = 1;

/// What a message asks for (specification, "Commands").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Command {
    /// Negotiates version and capabilities; the first message of a session.
    Version = 1,
    /// Makes a range of the client's memory reachable.
    DmaMap = 2,
    /// Takes a range of memory back.
    DmaUnmap = 3,
    /// Asks what kind of device this is.
    DeviceGetInfo = 4,
    /// Asks about one region.
    DeviceGetRegionInfo = 5,
    /// Asks for file descriptors that stand for register writes.
    DeviceGetRegionIoFds = 6,
    /// Asks about one kind of interrupts.
    DeviceGetIrqInfo = 7,
    /// Sets up, masks or triggers interrupts.
    DeviceSetIrqs = 8,
    /// Reads from a region.
    RegionRead = 9,
    /// Writes to a region.
    RegionWrite = 10,
    /// Server to client: reads the client's memory.
    DmaRead = 11,
    /// Server to client: writes the client's memory.
    DmaWrite = 12,
    /// Resets the device.
    DeviceReset = 13,
    /// Several region writes of up to 8 bytes each.
    RegionWriteMulti = 15,
    /// Gets, sets or probes a feature of the device (migration).
    DeviceFeature = 16,
    /// Reads migration data.
    MigDataRead = 17,
    /// Writes migration data.
    MigDataWrite = 18,
}

impl Command {
    /// The command with this number, if the specification has one.
    pub fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Version,
            2 => Self::DmaMap,
            3 => Self::DmaUnmap,
            4 => Self::DeviceGetInfo,
            5 => Self::DeviceGetRegionInfo,
            6 => Self::DeviceGetRegionIoFds,
            7 => Self::DeviceGetIrqInfo,
            8 => Self::DeviceSetIrqs,
            9 => Self::RegionRead,
            10 => Self::RegionWrite,
            11 => Self::DmaRead,
            12 => Self::DmaWrite,
            13 => Self::DeviceReset,
            15 => Self::RegionWriteMulti,
            16 => Self::DeviceFeature,
            17 => Self::MigDataRead,
            18 => Self::MigDataWrite,
            _ => return None,
        })
    }
}

/// Whether a message asks or answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MessageType {
    /// It asks for something.
    Command,
    /// It answers the command with the same id.
    Reply,
}

/// The header of a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Chosen by the sender of a command and echoed in its reply; need not be unique.
    pub id: u16,
    /// The command's number; see [`Command::from_number`].
    pub command: u16,
    /// Length of the whole message in bytes, this header included.
    pub size: u32,
    /// Type, no-reply and error bits.
    pub flags: u32,
    /// In a reply with the error bit: an errno, or 0 when the sender has none to give.
    pub error: u32,
}

impl Header {
    /// The header of a command with a body of `body_len` bytes.
    pub fn command(id: u16, command: Command, flags: u32, body_len: usize) -> Self {
        Self {
            id,
            command: command as u16,
            size: message_size(body_len),
            flags: TYPE_COMMAND | flags,
            error: 0,
        }
    }

    /// The header of the successful reply to this command, with a body of `body_len` bytes.
    pub fn reply(&self, body_len: usize) -> Self {
        Self {
            id: self.id,
            command: self.command,
            size: message_size(body_len),
            flags: TYPE_REPLY,
            error: 0,
        }
    }

    /// The header of the reply that reports `errno`. It has no body (specification,
    /// "Header": an error reply "must only include the reply header").
    pub fn error_reply(&self, errno: i32) -> Self {
        Self {
            flags: TYPE_REPLY | FLAG_ERROR,
            error: errno.unsigned_abs(),
            ..self.reply(0)
        }
    }

    /// Reads a header; what its fields mean is checked by [`Self::body_len`] and
    /// [`Self::message_type`].
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        let [
            i0,
            i1,
            c0,
            c1,
            s0,
            s1,
            s2,
            s3,
            f0,
            f1,
            f2,
            f3,
            e0,
            e1,
            e2,
            e3,
        ] = *bytes;
        Self {
            id: u16::from_ne_bytes([i0, i1]),
            command: u16::from_ne_bytes([c0, c1]),
            size: u32::from_ne_bytes([s0, s1, s2, s3]),
            flags: u32::from_ne_bytes([f0, f1, f2, f3]),
            error: u32::from_ne_bytes([e0, e1, e2, e3]),
        }
    }

    /// Writes the header.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let [i0, i1] = self.id.to_ne_bytes();
        let [c0, c1] = self.command.to_ne_bytes();
        let [s0, s1, s2, s3] = self.size.to_ne_bytes();
        let [f0, f1, f2, f3] = self.flags.to_ne_bytes();
        let [e0, e1, e2, e3] = self.error.to_ne_bytes();
        [
            i0, i1, c0, c1, s0, s1, s2, s3, f0, f1, f2, f3, e0, e1, e2, e3,
        ]
    }

    /// How many bytes follow the header. A stream in which this fails is out of step and
    /// cannot be read any further.
    pub fn body_len(&self) -> Result<usize, WireError> {
        let size = self.size as usize;
        if size < HEADER_LEN {
            return Err(WireError::SizeTooSmall {
                command: self.command,
                size: self.size,
            });
        }
        if size > MAX_MESSAGE {
            return Err(WireError::SizeTooLarge {
                command: self.command,
                size: self.size,
            });
        }
        Ok(size - HEADER_LEN)
    }

    /// Whether the message asks or answers.
    pub fn message_type(&self) -> Result<MessageType, WireError> {
        match self.flags & FLAG_TYPE_MASK {
            TYPE_COMMAND => Ok(MessageType::Command),
            TYPE_REPLY => Ok(MessageType::Reply),
            _ => Err(WireError::UnknownType {
                command: self.command,
                flags: self.flags,
            }),
        }
    }

    /// Whether the sender of this command wants no reply.
    pub fn no_reply(&self) -> bool {
        self.flags & FLAG_NO_REPLY != 0
    }

    /// Whether this reply reports a failure.
    pub fn is_error(&self) -> bool {
        self.flags & FLAG_ERROR != 0
    }
}

/// The size field for a body of `body_len` bytes. Bodies are built here and stay far below
/// 4 GiB; one that does not is given a size that every receiver refuses.
fn message_size(body_len: usize) -> u32 {
    u32::try_from(body_len.saturating_add(HEADER_LEN)).unwrap_or(u32::MAX)
}

/// What is wrong with a message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The size field does not even cover the header.
    #[error("message of command {command} says it has {size} bytes; a header alone has 16")]
    SizeTooSmall {
        /// The command's number.
        command: u16,
        /// The size field.
        size: u32,
    },
    /// The size field is beyond what anyone may send.
    #[error(
        "message of command {command} says it has {size} bytes; at most {MAX_MESSAGE} are allowed"
    )]
    SizeTooLarge {
        /// The command's number.
        command: u16,
        /// The size field.
        size: u32,
    },
    /// The type bits are neither command nor reply.
    #[error("message of command {command} is neither command nor reply (flags {flags:#x})")]
    UnknownType {
        /// The command's number.
        command: u16,
        /// The flags field.
        flags: u32,
    },
    /// The body is shorter than its fixed part.
    #[error("{what} has {len} bytes; at least {need} are needed")]
    BodyTooShort {
        /// The body's name in the specification.
        what: &'static str,
        /// Its length in bytes.
        len: usize,
        /// The length of its fixed part in bytes.
        need: usize,
    },
    /// The data that follows the fixed part has not the length that the fixed part says.
    #[error("{what} says it carries {said} bytes of data, and carries {carried}")]
    DataLength {
        /// The body's name in the specification.
        what: &'static str,
        /// The length according to its count field, in bytes.
        said: u64,
        /// The length that follows, in bytes.
        carried: usize,
    },
    /// `argsz` leaves no room for the reply, or does not cover the request.
    #[error("{what} has argsz {argsz}; at least {need} is needed")]
    ArgszTooSmall {
        /// The body's name in the specification.
        what: &'static str,
        /// The field.
        argsz: u32,
        /// The least that would do.
        need: u32,
    },
    /// Flags that do not exist, or that exclude each other.
    #[error("{what} has flags {flags:#x}, which {why}")]
    BadFlags {
        /// The body's name in the specification.
        what: &'static str,
        /// The field.
        flags: u32,
        /// What is wrong with them, as a clause.
        why: &'static str,
    },
    /// The JSON of the handshake cannot be read.
    #[error("the version data is not what the specification asks for: {0}")]
    BadVersionData(String),
}
