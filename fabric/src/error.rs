//! What can go wrong between the two sides, and whether connecting again can help.
//!
//! The retry policy is a property of the error: callers ask
//! [`FabricError::should_reconnect`] and never match on variants to decide it.

use std::io;
use std::time::Duration;

use crate::wire::{Kind, Label, RefusalCode, Text, WireError};

/// Why an operation on the fabric failed.
#[derive(Debug, thiserror::Error)]
pub enum FabricError {
    /// The peer ended the connection between two frames, or this link has failed before.
    #[error("the connection is closed")]
    Closed,
    /// The peer ended the connection in the middle of a frame.
    #[error("the connection ended {received} bytes into a frame")]
    Truncated {
        /// Bytes of the unfinished frame that had arrived.
        received: usize,
    },
    /// The operating system reported an error.
    #[error("{what} failed")]
    Io {
        /// The operation, as a noun phrase.
        what: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// An address could not be turned into something to connect to.
    #[error("the address {address:?} could not be resolved")]
    Resolve {
        /// The address as given.
        address: String,
        /// What the resolver said.
        source: io::Error,
    },
    /// Bytes from the peer are no valid message, or a message of this side would be none.
    #[error("a message breaks the protocol")]
    Malformed(#[from] WireError),
    /// The peer sent a valid message that is not allowed at this point.
    #[error("the peer broke the protocol: {what}")]
    Violation {
        /// What is wrong, with the values.
        what: String,
    },
    /// The device side declined to go on.
    #[error("the device server refused ({code}): {text}")]
    Refused {
        /// Why, for programs.
        code: RefusalCode,
        /// Why, for people.
        text: Text,
    },
    /// The peer took too long.
    #[error("{what} did not come within {} ms", .after.as_millis())]
    Timeout {
        /// What was awaited.
        what: &'static str,
        /// How long it was awaited.
        after: Duration,
    },
    /// The link's queue has no room for this frame; nothing of it was sent.
    #[error(
        "the link's backlog is full: {frames} frames, {control} control bytes and {spans} spans wait"
    )]
    Backlog {
        /// Frames that wait.
        frames: usize,
        /// Bytes of control parts that wait.
        control: usize,
        /// Payload spans that wait.
        spans: usize,
    },
    /// The peer speaks an older version, which has no such message.
    #[error("{peer} speaks version {version} of the protocol and {what} needs {needed}; update it")]
    TooOld {
        /// How the peer names itself.
        peer: Label,
        /// The version that was agreed on.
        version: u16,
        /// What was asked for.
        what: &'static str,
        /// The version that has it.
        needed: u16,
    },
    /// RDMA was asked for, and cannot be used.
    #[error("RDMA cannot be used: {why}")]
    NoRdma {
        /// Why not.
        why: String,
    },
    /// The RDMA connection failed.
    #[error("the RDMA connection failed: {what}")]
    Rdma {
        /// What was seen of it.
        what: String,
    },
    /// Memory could not be registered with the RDMA device.
    #[error("{len} bytes of memory could not be registered with the RDMA device{remedy}")]
    Register {
        /// How many bytes.
        len: usize,
        /// What to do about it, if it is known.
        remedy: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// A span reaches beyond its memory; the caller's mistake.
    #[error("a span of {len} bytes at offset {offset} is outside its memory of {size} bytes")]
    SpanOutOfBounds {
        /// Where the span begins.
        offset: usize,
        /// How long it is.
        len: usize,
        /// How large the memory is.
        size: usize,
    },
    /// A frame's header and parts disagree; the caller's mistake.
    #[error(
        "a {kind} frame declares {declared_control} bytes of control and {declared_payload} of payload, \
         but has {control} and {payload}"
    )]
    FrameLengths {
        /// The message.
        kind: Kind,
        /// `header.control_len`.
        declared_control: usize,
        /// Length of the control part.
        control: usize,
        /// `header.payload_len`.
        declared_payload: u64,
        /// Total of the payload's spans.
        payload: u64,
    },
}

impl FabricError {
    /// A violation of the protocol by a message that is valid in itself.
    pub fn violation(what: impl Into<String>) -> Self {
        FabricError::Violation { what: what.into() }
    }

    /// Whether a claim was refused because somebody else has the export, or had it just now.
    pub fn is_busy(&self) -> bool {
        let busy = RefusalCode::Busy;
        matches!(self, FabricError::Refused { code, .. } if *code == busy)
    }

    /// Whether a new connection to the same peer may succeed where this one failed.
    ///
    /// True for what a network, a restart or another claimant can cause and time can heal.
    /// False for a peer that does not keep the protocol, for a refusal that will be
    /// repeated, and for mistakes of this side: retrying those would only hide them.
    pub fn should_reconnect(&self) -> bool {
        match self {
            FabricError::Closed
            | FabricError::Truncated { .. }
            | FabricError::Timeout { .. }
            | FabricError::NoRdma { .. }
            | FabricError::Rdma { .. } => true,
            FabricError::Io { source, .. } => is_transient(source),
            // A name that is no name at all stays so; a silent name server may answer later.
            FabricError::Resolve { source, .. } => source.kind() != io::ErrorKind::InvalidInput,
            FabricError::Refused { code, .. } => match code {
                RefusalCode::Busy | RefusalCode::NotReady | RefusalCode::Internal => true,
                RefusalCode::Version
                | RefusalCode::UnknownExport
                | RefusalCode::Malformed
                | RefusalCode::Provider
                | RefusalCode::Other(_) => false,
            },
            FabricError::Malformed(_)
            | FabricError::TooOld { .. }
            | FabricError::Violation { .. }
            | FabricError::Backlog { .. }
            | FabricError::Register { .. }
            | FabricError::SpanOutOfBounds { .. }
            | FabricError::FrameLengths { .. } => false,
        }
    }
}

/// The errors by which a network, or the host at its other end, shows that it is away.
fn is_transient(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::ConnectionRefused
            | Kind::ConnectionReset
            | Kind::ConnectionAborted
            | Kind::NotConnected
            | Kind::BrokenPipe
            | Kind::TimedOut
            | Kind::HostUnreachable
            | Kind::NetworkUnreachable
            | Kind::NetworkDown
            | Kind::AddrNotAvailable
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn io_error(kind: io::ErrorKind) -> FabricError {
        FabricError::Io {
            what: "a test",
            source: kind.into(),
        }
    }

    fn refused(code: RefusalCode) -> FabricError {
        FabricError::Refused {
            code,
            text: Text::default(),
        }
    }

    #[test]
    fn what_time_can_heal_is_worth_a_new_connection() {
        let timeout = FabricError::Timeout {
            what: "a test",
            after: Duration::from_secs(1),
        };
        for error in [
            FabricError::Closed,
            FabricError::Truncated { received: 3 },
            timeout,
            io_error(io::ErrorKind::ConnectionReset),
            io_error(io::ErrorKind::ConnectionRefused),
            io_error(io::ErrorKind::TimedOut),
            refused(RefusalCode::Busy),
            refused(RefusalCode::NotReady),
            refused(RefusalCode::Internal),
        ] {
            assert!(error.should_reconnect(), "{error}");
        }
    }

    #[test]
    fn what_would_be_repeated_is_not() {
        for error in [
            FabricError::Malformed(WireError::UnknownKind(7)),
            FabricError::violation("tag 7 is not outstanding"),
            io_error(io::ErrorKind::PermissionDenied),
            refused(RefusalCode::Version),
            refused(RefusalCode::UnknownExport),
            refused(RefusalCode::Malformed),
            refused(RefusalCode::Other(99)),
            FabricError::Backlog {
                frames: 1,
                control: 2,
                spans: 3,
            },
            FabricError::SpanOutOfBounds {
                offset: 1,
                len: 2,
                size: 2,
            },
        ] {
            assert!(!error.should_reconnect(), "{error}");
        }
    }

    #[test]
    fn a_name_is_worth_asking_for_again_but_not_if_it_is_none() {
        let resolve = |kind: io::ErrorKind| FabricError::Resolve {
            address: "host".to_owned(),
            source: kind.into(),
        };
        assert!(resolve(io::ErrorKind::Other).should_reconnect());
        assert!(!resolve(io::ErrorKind::InvalidInput).should_reconnect());
    }

    #[test]
    fn messages_are_sentences_with_the_values() {
        let timeout = FabricError::Timeout {
            what: "the peer's hello",
            after: Duration::from_millis(1500),
        };
        assert_eq!(
            timeout.to_string(),
            "the peer's hello did not come within 1500 ms"
        );
    }
}
