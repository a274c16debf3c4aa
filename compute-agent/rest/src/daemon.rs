//! What both daemons say of themselves in the same way.

use axum::Json;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Answer of `GET /healthz` and `GET /readyz`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// Always `ok`: what is not is told by a problem.
    #[schema(example = "ok")]
    pub status: String,
}

impl Health {
    /// All is well.
    #[must_use]
    pub fn ok() -> Self {
        let status = "ok".into();
        Self { status }
    }
}

/// Answer of `GET /v1/version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// Of the program.
    #[schema(example = "0.1.0")]
    pub version: String,
    /// The oldest version of the wire protocol that it speaks.
    pub oldest_protocol: u16,
    /// The newest.
    pub newest_protocol: u16,
}

/// Whether the daemon answers.
#[utoipa::path(
    get,
    path = "/healthz",
    tag = "daemon",
    responses((status = 200, description = "It does", body = Health))
)]
pub async fn healthz() -> Json<Health> {
    Json(Health::ok())
}
