//! The interface's description.

use axum::Json;
use utoipa::OpenApi;

use super::{attachments, devices, events, health};
use crate::api;

/// See `document`.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Farbus compute agent",
        description = "Gives remote PCIe devices to virtual machines of this host.\n\nServed on a UNIX \
            socket (`/run/farbus/agent.sock`), and on TCP with mutual TLS only. Attachments are made \
            asynchronously: `attaching` becomes `ready` or `failed`; `?wait=SECONDS` holds the answer \
            until then. All errors are problem details (RFC 9457); `remedy` says what helps.",
        license(name = "Apache-2.0 OR BSD-3-Clause", identifier = "Apache-2.0 OR BSD-3-Clause")
    ),
    paths(
        devices::list,
        attachments::list,
        attachments::get,
        attachments::put,
        attachments::delete,
        events::stream,
        health::version,
        get,
        farbus_rest::daemon::healthz,
        health::readyz,
        health::metrics,
    ),
    components(schemas(api::Event)),
    tags(
        (name = "devices", description = "What the pool has"),
        (name = "attachments", description = "Devices given to VMs"),
        (name = "events", description = "What happens to attachments"),
        (name = "daemon", description = "How the agent itself is"),
    )
)]
struct Api;

/// The interface's description (OpenAPI 3.1), as it is in `docs/openapi/agent.json`.
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
