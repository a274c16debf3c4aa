//! The daemon itself.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Answer of `GET /v1/version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// Of the program.
    #[schema(example = "0.1.0")]
    pub version: String,
    /// The oldest version of the wire protocol that it speaks to device servers.
    pub oldest_protocol: u16,
    /// The newest.
    pub newest_protocol: u16,
}

/// Answer of `GET /healthz` and `GET /readyz`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// Always `ok`: what is not is told by a problem.
    #[schema(example = "ok")]
    pub status: String,
}
