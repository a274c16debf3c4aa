//! What happens to attachments, as it happens.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::AttachmentState;

/// The data of one event of `GET /v1/events`, whose name is `attachment`. Its `id` in the stream is
/// `sequence`: a client that comes back with it in `Last-Event-ID` gets what it has missed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Rises by one with every event of a daemon's life, which begins above those of all lives before.
    pub sequence: u64,
    /// When it happened, RFC 3339 in UTC.
    pub time: String,
    /// The attachment.
    pub attachment: String,
    /// What it is now.
    pub state: AttachmentState,
    /// Why, where that is not what was asked for.
    pub reason: Option<String>,
}
