//! Why a client's call did not get its answer.

use std::io;
use std::time::Duration;

use super::wire::{Command, WireError};

/// Why a call did not get its answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no server at the path.
    #[error("cannot connect to the vfio-user socket {path}; is its server running?")]
    Connect {
        /// The socket's path.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The server answered with an error.
    #[error("the server refused {command:?} with errno {errno}")]
    Refused {
        /// What was asked.
        command: Command,
        /// The errno of the reply; 0 when it gave none.
        errno: u32,
    },
    /// No answer came in time.
    #[error("the server did not answer {command:?} within {after:?}")]
    TimedOut {
        /// What was asked.
        command: Command,
        /// How long was waited.
        after: Duration,
    },
    /// The server closed the connection.
    #[error("the server closed the connection before it answered {command:?}")]
    Closed {
        /// What was asked.
        command: Command,
    },
    /// The socket failed.
    #[error("the vfio-user socket failed during {command:?}")]
    Socket {
        /// What was asked.
        command: Command,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A message from the server cannot be read.
    #[error("the server's message for {command:?} is malformed")]
    Malformed {
        /// What was asked.
        command: Command,
        /// What is wrong with it.
        #[source]
        source: WireError,
    },
    /// A message from the server is well-formed and makes no sense.
    #[error("the server's answer to {command:?} makes no sense: {why}")]
    Nonsense {
        /// What was asked.
        command: Command,
        /// What is wrong with it.
        why: String,
    },
    /// The connection was lost before, and nothing says where the server can be found again.
    #[error("the connection was lost, and there is no path to connect to again")]
    Lost,
    /// After a lost connection, another device is behind the socket.
    #[error("another kind of device is behind the socket now; restart the export to use it")]
    Changed,
}

impl ClientError {
    /// Whether the connection is of no further use.
    pub fn is_fatal(&self) -> bool {
        !matches!(self, Self::Refused { .. })
    }
}

/// An answer that is well-formed and makes no sense.
pub(super) fn nonsense(command: Command, why: String) -> ClientError {
    ClientError::Nonsense { command, why }
}
