//! How the device server itself is, and what it is told to do.

use axum::Json;
use axum::body::Body;
use axum::extract::State as Shared;
use axum::http::{Response, StatusCode};
use farbus_fabric::wire::{NEWEST, OLDEST};
use farbus_rest::daemon::{Health, Version};
use farbus_rest::problem::Problem;
use tokio::sync::oneshot;

use super::super::Request;
use super::super::api::{Drain, Reloaded};
use super::State;

/// Asks the service for something that it does in its turn.
async fn ask<T>(
    state: &State,
    request: impl FnOnce(oneshot::Sender<T>) -> Request,
) -> Result<T, Problem> {
    let (reply, answer) = oneshot::channel();
    let ending = |_| {
        Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "ending",
            "The device server ends",
            "it does nothing new any more",
        )
        .with_remedy("repeat the request when it has been started again")
    };
    let sent = state.requests.send(request(reply)).await;
    sent.map_err(|_| ending(()))?;
    answer.await.map_err(|_| ending(()))
}

/// Reads the configuration again, as SIGHUP does. A file that is wrong changes nothing; an export that
/// cannot be opened does not hold up the others.
#[utoipa::path(
    post,
    path = "/v1/reload",
    tag = "daemon",
    responses(
        (status = 200, description = "What has changed", body = Reloaded),
        (status = 422, description = "The file is wrong, and nothing has changed", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The device server ends", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn reload(Shared(state): Shared<State>) -> Result<Json<Reloaded>, Problem> {
    let outcome = ask(&state, |reply| Request::Reload(Some(reply))).await?;
    outcome.map(Json).map_err(|why| {
        Problem::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "invalid-configuration",
            "The configuration is wrong, and nothing has changed",
            why,
        )
        .with_remedy("mend the file; `farbus-device-server serve --check` tries it without effect")
    })
}

/// Gives no new claims from now on. The device server ends when the last claim is gone.
#[utoipa::path(
    post,
    path = "/v1/drain",
    tag = "daemon",
    responses(
        (status = 202, description = "It drains", body = Drain),
        (status = 503, description = "The device server ends", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn drain(
    Shared(state): Shared<State>,
) -> Result<(StatusCode, Json<Drain>), Problem> {
    let now = ask(&state, |reply| Request::Drain(true, reply)).await?;
    Ok((StatusCode::ACCEPTED, Json(now)))
}

/// Gives claims again.
#[utoipa::path(
    delete,
    path = "/v1/drain",
    tag = "daemon",
    responses(
        (status = 200, description = "It does not drain", body = Drain),
        (status = 409, description = "It has been told to end", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The device server ends", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn undo_drain(Shared(state): Shared<State>) -> Result<Json<Drain>, Problem> {
    let now = ask(&state, |reply| Request::Drain(false, reply)).await?;
    if now.draining {
        return Err(Problem::new(
            StatusCode::CONFLICT,
            "ending",
            "The device server has been told to end",
            format!("it was sent a signal, and waits for {} claims", now.claims),
        )
        .with_remedy("start it again once it has ended"));
    }
    Ok(Json(now))
}

/// Whether the device server gives claims.
#[utoipa::path(
    get,
    path = "/readyz",
    tag = "daemon",
    responses(
        (status = 200, description = "It does", body = Health),
        (status = 503, description = "It drains", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn readyz(Shared(state): Shared<State>) -> Result<Json<Health>, Problem> {
    if state.exports.is_draining() {
        return Err(Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "draining",
            "The device server drains",
            format!("it waits for {} claims to end", state.exports.claims()),
        )
        .with_remedy("DELETE /v1/drain has it give claims again"));
    }
    Ok(Json(Health::ok()))
}

/// The version, and what it speaks.
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
    farbus_rest::metrics::render(&state.metrics)
}
