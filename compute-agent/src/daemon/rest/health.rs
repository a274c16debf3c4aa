//! How the daemon itself is; what both daemons say in the same way is in [`farbus_rest::daemon`].

use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State as Shared;
use axum::http::Response;
use farbus_fabric::wire::{NEWEST, OLDEST};
use farbus_rest::problem::Problem;

use super::State;
use crate::api::{Health, Version};

/// How old what the metrics say of a device server may be.
const REACHABLE: Duration = Duration::from_secs(15);

/// Whether the daemon does its work. It listens only when what an earlier one has left is taken over.
#[utoipa::path(
    get,
    path = "/readyz",
    tag = "daemon",
    responses(
        (status = 200, description = "It does", body = Health),
        (status = 503, description = "Its state directory is not usable", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn readyz(Shared(state): Shared<State>) -> Result<Json<Health>, Problem> {
    let store = state.registry.context().store.clone();
    let usable = tokio::task::spawn_blocking(move || store.check()).await;
    match usable {
        Ok(Ok(())) => Ok(Json(Health::ok())),
        Ok(Err(error)) => Err(Problem::new(
            axum::http::StatusCode::SERVICE_UNAVAILABLE,
            "not-ready",
            "The daemon cannot do its work",
            format!("{:#}", anyhow::Error::new(error)),
        )
        .with_remedy("make the state directory writable and give it space")),
        Err(error) => Err(Problem::internal(error.to_string())),
    }
}

/// The daemon's version, and what it speaks.
#[utoipa::path(
    get,
    path = "/v1/version",
    tag = "daemon",
    responses((status = 200, description = "The version", body = Version))
)]
pub(super) async fn version() -> Json<Version> {
    Json(Version {
        version: env!("CARGO_PKG_VERSION").into(),
        oldest_protocol: OLDEST.number(),
        newest_protocol: NEWEST.number(),
    })
}

/// Metrics for Prometheus.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "daemon",
    responses((status = 200, description = "Metrics", body = String,
        content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8"))
)]
pub(super) async fn metrics(Shared(state): Shared<State>) -> Response<Body> {
    // Those that nobody has asked for a while are asked now.
    state.registry.devices(REACHABLE).await;
    farbus_rest::metrics::render(&state.metrics)
}
