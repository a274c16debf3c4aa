//! Attachments: made, looked at, taken away.

use std::time::Duration;

use axum::Json as Answer;
use axum::body::Body;
use axum::extract::State as Shared;
use axum::http::{Response, StatusCode, header};
use axum::response::IntoResponse;
use farbus_rest::extract::{Json, Path, Query};
use farbus_rest::problem::Problem;
use serde::Deserialize;
use utoipa::IntoParams;

use super::super::id::AttachmentId;
use super::State;
use crate::api::{Attachment, AttachmentSpec, AttachmentState, Attachments};

/// The longest that an answer may be held.
const MAX_WAIT: u64 = 60;

/// How long the answer is held.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Wait {
    /// Seconds to hold the answer at most, until the attachment is neither attaching nor detaching.
    #[serde(default)]
    #[param(minimum = 0, maximum = 60, default = 0)]
    wait: u64,
}

/// How it is taken away.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Removal {
    /// Seconds to hold the answer at most, until the attachment is neither attaching nor detaching.
    #[serde(default)]
    #[param(minimum = 0, maximum = 60, default = 0)]
    wait: u64,
    /// Without the guest's consent.
    #[serde(default)]
    #[param(default = false)]
    force: bool,
}

fn patience(seconds: u64) -> Result<Duration, Problem> {
    if seconds <= MAX_WAIT {
        return Ok(Duration::from_secs(seconds));
    }
    Err(Problem::new(
        StatusCode::BAD_REQUEST,
        "invalid-query",
        "The query is not what is expected here",
        format!("wait={seconds} is too long"),
    )
    .with_remedy(format!("wait for at most {MAX_WAIT} seconds at a time")))
}

/// All attachments of the agent.
#[utoipa::path(
    get,
    path = "/v1/attachments",
    tag = "attachments",
    responses((status = 200, description = "All attachments, by id", body = Attachments))
)]
pub(super) async fn list(Shared(state): Shared<State>) -> Answer<Attachments> {
    let attachments = state.registry.list();
    Answer(Attachments { attachments })
}

/// One attachment.
#[utoipa::path(
    get,
    path = "/v1/attachments/{id}",
    tag = "attachments",
    params(("id" = String, Path, pattern = "^[a-z0-9][a-z0-9._-]{0,62}$", description = "The attachment's name")),
    responses(
        (status = 200, description = "As it is now", body = Attachment),
        (status = 400, description = "The id cannot be one", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "There is none of this id", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn get(
    Shared(state): Shared<State>,
    Path(id): Path<String>,
) -> Result<Answer<Attachment>, Problem> {
    let id = AttachmentId::try_from(id)?;
    Ok(Answer(state.registry.get(&id)?.now()))
}

/// Gives a device to a VM. Who repeats the request gets the same attachment. A refused one leaves nothing
/// behind; one that fails later stays, in the state `failed`, until it is deleted.
#[utoipa::path(
    put,
    path = "/v1/attachments/{id}",
    tag = "attachments",
    params(
        ("id" = String, Path, pattern = "^[a-z0-9][a-z0-9._-]{0,62}$", description = "The attachment's name, chosen by the client"),
        Wait,
    ),
    request_body = AttachmentSpec,
    responses(
        (status = 200, description = "It is there already", body = Attachment),
        (status = 202, description = "It is being made", body = Attachment,
            headers(("Location" = String, description = "The attachment's path"))),
        (status = 400, description = "The id, the query or the JSON is malformed", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "There is no such device", body = Problem, content_type = "application/problem+json"),
        (status = 408, description = "The body did not come in time", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "There is another attachment of this id, or somebody else has the device", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "The body is not declared as JSON", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "What is asked for cannot be", body = Problem, content_type = "application/problem+json"),
        (status = 500, description = "The daemon has failed", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The device server does not answer", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn put(
    Shared(state): Shared<State>,
    Path(id): Path<String>,
    Query(query): Query<Wait>,
    Json(spec): Json<AttachmentSpec>,
) -> Result<Response<Body>, Problem> {
    let id = AttachmentId::try_from(id)?;
    let wait = patience(query.wait)?;
    let location = format!("/v1/attachments/{id}");
    // On a task of its own: a client that goes away in the middle leaves nothing half done.
    let made = tokio::spawn(async move { state.registry.put(id, spec).await }).await;
    let (made, handle) = made.map_err(|error| Problem::internal(error.to_string()))??;
    let attachment = Answer(handle.settled(wait).await);
    if made {
        let headers = [(header::LOCATION, location)];
        return Ok((StatusCode::ACCEPTED, headers, attachment).into_response());
    }
    Ok(attachment.into_response())
}

/// Takes a device away from its VM. The guest is asked, and has half a minute; if it keeps the device,
/// the attachment is as before, with the reason. With `force` nobody waits for the guest. A dead
/// device server, worker or VM is no obstacle.
#[utoipa::path(
    delete,
    path = "/v1/attachments/{id}",
    tag = "attachments",
    params(
        ("id" = String, Path, pattern = "^[a-z0-9][a-z0-9._-]{0,62}$", description = "The attachment's name"),
        Removal,
    ),
    responses(
        (status = 200, description = "It is gone: this was its last state", body = Attachment),
        (status = 202, description = "It is being taken away, or the guest has kept it", body = Attachment),
        (status = 400, description = "The id or the query is malformed", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "There is none of this id", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn delete(
    Shared(state): Shared<State>,
    Path(id): Path<String>,
    Query(query): Query<Removal>,
) -> Result<Response<Body>, Problem> {
    let id = AttachmentId::try_from(id)?;
    let wait = patience(query.wait)?;
    let handle = state.registry.get(&id)?;
    handle.detach(query.force);
    let attachment = handle.settled(wait).await;
    let status = if attachment.state == AttachmentState::Detached {
        StatusCode::OK
    } else {
        StatusCode::ACCEPTED
    };
    Ok((status, Answer(attachment)).into_response())
}
