//! What a client can get wrong, and what is done about it: a [`Refusal`] answers one command
//! with an errno, an [`End`] closes the connection.

use std::io;

use farbus_vfio::FunctionError;
use farbus_vfio::user::WireError;

use super::inbox::TooManyFds;
use super::outbox::Full;
use crate::guest_memory::MapError;

/// Why one command is answered with an error.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error(transparent)]
    Function(#[from] FunctionError),
    #[error("command {0} is not supported")]
    UnknownCommand(u16),
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    #[error("there is no {what} {index}")]
    NoSuchIndex { what: &'static str, index: u32 },
    #[error("access of {count} bytes at {offset:#x} lies outside of region {region}")]
    OutOfRegion {
        region: u32,
        offset: u64,
        count: u32,
    },
    #[error("{count} bytes were asked for; at most {max} can be")]
    TransferTooLong { count: u32, max: usize },
    #[error("a coalesced write has {0} bytes; at most 8 fit in it")]
    CoalescedTooLong(u32),
    #[error("interrupts {start} to {start}+{count} of kind {index} were named; there are {have}")]
    IrqRange {
        index: u32,
        start: u32,
        count: u32,
        have: u32,
    },
    #[error("{count} interrupts need {count} file descriptors or none; {fds} came")]
    IrqFds { count: u32, fds: usize },
    #[error(
        "MSI-X is mediated, and this client wants eventfds for it; attach with --msix=auto or \
         --msix=irqfd"
    )]
    Mediated,
    #[error("a descriptor for an interrupt is {0}, not an eventfd")]
    NotAnEventFd(String),
    #[error("{what} takes at most one file descriptor; {fds} came")]
    FdCount { what: &'static str, fds: usize },
    #[error("version {major}.{minor} is not supported; 0.1 is")]
    Version { major: u16, minor: u16 },
    #[error("the version was negotiated already")]
    VersionTwice,
    #[error("unmapping everything takes address 0 and size 0; they are {address:#x} and {size:#x}")]
    UnmapAllRange { address: u64, size: u64 },
}

impl Refusal {
    /// What the error reply says.
    pub(super) fn errno(&self) -> i32 {
        match self {
            Self::Map(error) => error.errno(),
            Self::Function(error) => function_errno(error),
            Self::UnknownCommand(_) | Self::Unsupported(_) | Self::Mediated => libc::ENOTSUP,
            Self::Wire(_)
            | Self::NoSuchIndex { .. }
            | Self::OutOfRegion { .. }
            | Self::TransferTooLong { .. }
            | Self::CoalescedTooLong(_)
            | Self::IrqRange { .. }
            | Self::IrqFds { .. }
            | Self::NotAnEventFd(_)
            | Self::FdCount { .. }
            | Self::Version { .. }
            | Self::VersionTwice
            | Self::UnmapAllRange { .. } => libc::EINVAL,
        }
    }

    /// Whether nothing good can follow, so that the connection ends after the reply.
    pub(super) fn is_final(&self) -> bool {
        matches!(self, Self::Map(MapError::NotShared { .. }))
    }
}

fn function_errno(error: &FunctionError) -> i32 {
    match error {
        FunctionError::OutOfBounds { .. } | FunctionError::BadWindow { .. } => libc::EINVAL,
        FunctionError::Unsupported(_) => libc::ENOTSUP,
        FunctionError::Gone(_) => libc::ENODEV,
        FunctionError::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
    }
}

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error("it closed the connection")]
    Closed,
    #[error("it closed the connection in the middle of a message")]
    ClosedInMessage,
    #[error("the endpoint was shut down")]
    Shutdown,
    #[error("its socket failed: {0}")]
    Socket(io::Error),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    TooManyFds(#[from] TooManyFds),
    #[error("file descriptors were lost on the way; it sent too many, or this process has no room")]
    FdsLost,
    #[error("{0}")]
    Full(#[from] Full),
    #[error("command {0} came before the version was negotiated")]
    NotNegotiated(u16),
    #[error("its version request cannot be answered: {0}")]
    Handshake(Refusal),
    #[error("its guest memory cannot be used: {0}")]
    Memory(Refusal),
    #[error("it truncated a file of its guest's memory while that was in use")]
    MemoryLost,
}

impl End {
    /// Whether this is how a client leaves in good order.
    pub(super) fn is_orderly(&self) -> bool {
        matches!(self, Self::Closed | Self::Shutdown)
    }
}
