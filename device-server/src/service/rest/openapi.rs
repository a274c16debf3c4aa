//! The interface's description.

use axum::Json;
use utoipa::OpenApi;

use super::{daemon, exports};

/// See `document`.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Farbus device server",
        description = "Looks after what a device server exports.\n\nServed on a UNIX socket \
            (`/run/farbus/device-server.sock`). All errors are problem details (RFC 9457); `remedy` says \
            what helps.",
        license(name = "Apache-2.0 OR BSD-3-Clause", identifier = "Apache-2.0 OR BSD-3-Clause")
    ),
    paths(
        exports::list,
        exports::get,
        exports::evict,
        daemon::reload,
        daemon::drain,
        daemon::undo_drain,
        daemon::version,
        get,
        farbus_rest::daemon::healthz,
        daemon::readyz,
        daemon::metrics,
    ),
    tags(
        (name = "exports", description = "What is exported, and who has it"),
        (name = "daemon", description = "How the device server itself is"),
    )
)]
struct Api;

/// The interface's description (OpenAPI 3.1), as it is in `docs/openapi/device-server.json`.
#[must_use]
pub fn document() -> serde_json::Value {
    serde_json::to_value(Api::openapi()).unwrap_or_default()
}

/// This description.
#[utoipa::path(
    get,
    path = "/v1/openapi.json",
    tag = "daemon",
    responses((status = 200, description = "OpenAPI 3.1", body = serde_json::Value, content_type = "application/json"))
)]
pub(super) async fn get() -> Json<serde_json::Value> {
    Json(document())
}
