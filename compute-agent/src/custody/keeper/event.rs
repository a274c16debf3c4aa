//! What a keeper tells its owner.

use super::super::messages::Link;

/// What has happened to a worker. Of one worker they come in order: `Connected`, then any of the others,
/// at last `Bye` or `Lost`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A worker has said who it is.
    Connected {
        /// The attachment.
        id: String,
        /// The worker's process id.
        pid: u32,
        /// It goes on where another, or itself under another daemon, was.
        resumed: bool,
    },
    /// A VMM can connect, or is served again.
    Ready {
        /// The attachment.
        id: String,
    },
    /// The link to the device server has come or gone.
    State {
        /// The attachment.
        id: String,
        /// Up or down.
        link: Link,
        /// Why it is down.
        reason: Option<String>,
    },
    /// The worker's connection ended without a word: it is dead, or mad and was cut off. What it had
    /// is held until its successor comes. A worker that lives yet must be killed before one is
    /// started.
    Lost {
        /// The attachment.
        id: String,
        /// The worker's process id.
        pid: u32,
    },
    /// The worker ends in order. Nothing is held any more.
    Bye {
        /// The attachment.
        id: String,
    },
}
