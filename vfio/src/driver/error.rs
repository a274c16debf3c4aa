//! What can go wrong in the driver.

#![forbid(unsafe_code)]

use std::io;
use std::time::Duration;

use crate::function::FunctionError;
use crate::nvme::Status;

/// Why the driver could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The function refused an access.
    #[error("the function refused an access")]
    Function(#[from] FunctionError),
    /// Nothing happened for too long.
    #[error("{what} took longer than {limit:?}")]
    Timeout {
        /// What was waited for, as a noun phrase.
        what: String,
        /// For how long.
        limit: Duration,
    },
    /// A command failed.
    #[error("command {opcode:#04x} failed with status {:#06x}", status.0)]
    Command {
        /// Its opcode.
        opcode: u8,
        /// Its status.
        status: Status,
    },
    /// `CSTS.CFS` is set: only a reset helps.
    #[error("the controller is in fatal status (CSTS {csts:#x})")]
    Fatal {
        /// The status register.
        csts: u32,
    },
    /// The controller cannot be driven by this driver.
    #[error("the controller cannot be used: {0}")]
    Unusable(&'static str),
    /// The function broke the protocol.
    #[error("the controller completed command {cid} of queue {queue}, which is not outstanding")]
    Stray {
        /// The queue.
        queue: u16,
        /// The command identifier.
        cid: u16,
    },
    /// The queue holds as many commands as it can.
    #[error("queue {0} is full")]
    QueueFull(u16),
    /// There is no such queue, or there is one already.
    #[error("queue {0} does not exist, or exists already")]
    NoQueue(u16),
    /// The DMA memory is used up.
    #[error("no {0} bytes of DMA memory are left")]
    OutOfMemory(usize),
    /// An access outside of a buffer.
    #[error("{len} bytes at {at:#x} lie outside of a buffer of {size:#x} bytes")]
    OutOfBounds {
        /// First byte of the access.
        at: usize,
        /// Its length in bytes.
        len: usize,
        /// Size of the buffer in bytes.
        size: usize,
    },
    /// The operating system refused.
    #[error("{what} failed")]
    Io {
        /// What was tried, as a noun phrase.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl DriverError {
    /// The status of the command, if it was a command that failed.
    pub fn status(&self) -> Option<Status> {
        match self {
            Self::Command { status, .. } => Some(*status),
            _ => None,
        }
    }
}
