//! Requests as handlers get them. What is wrong with one is answered as a [`Problem`] that says
//! what helps; axum's own extractors answer in plain text.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use serde_json::error::Category;

use crate::problem::Problem;

/// The most bytes of a request's body. What is asked for takes a few hundred.
pub const BODY_LIMIT: usize = 64 << 10;

/// A body comes within this, or the request is given up.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// A body of JSON.
#[derive(Clone, Copy, Debug)]
pub struct Json<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Problem> {
        let kind = request.headers().get(header::CONTENT_TYPE);
        let kind = kind.and_then(|value| value.to_str().ok()).unwrap_or("");
        let essence = kind.split(';').next().unwrap_or("").trim();
        if !essence.eq_ignore_ascii_case("application/json") {
            return Err(Problem::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "unsupported-media-type",
                "The body is not declared as JSON",
                format!("the request's content type is {kind:?}"),
            )
            .with_remedy("send the header 'Content-Type: application/json'"));
        }
        let body = read(request.into_body()).await?;
        serde_json::from_slice(&body)
            .map(Self)
            .map_err(|error| wrong_json(&error))
    }
}

async fn read(body: Body) -> Result<axum::body::Bytes, Problem> {
    let limited = Limited::new(body, BODY_LIMIT);
    let collected = tokio::time::timeout(BODY_TIMEOUT, limited.collect())
        .await
        .map_err(|_elapsed| {
            Problem::new(
                StatusCode::REQUEST_TIMEOUT,
                "request-timeout",
                "The request did not come in time",
                format!("the body was not complete after {BODY_TIMEOUT:?}"),
            )
            .with_remedy("send the whole body at once")
        })?;
    collected
        .map(http_body_util::Collected::to_bytes)
        .map_err(|error| {
            if error.downcast_ref::<LengthLimitError>().is_some() {
                Problem::new(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    "body-too-large",
                    "The body is too large",
                    format!("the body has more than {BODY_LIMIT} bytes"),
                )
                .with_remedy("send only what the OpenAPI document names")
            } else {
                bad_request(
                    "incomplete-body",
                    "The body did not come whole",
                    error.to_string(),
                )
            }
        })
}

fn wrong_json(error: &serde_json::Error) -> Problem {
    match error.classify() {
        Category::Data => Problem::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "invalid-body",
            "The body is JSON, but not what is expected here",
            error.to_string(),
        )
        .with_remedy("the OpenAPI document at /v1/openapi.json has the fields and their types"),
        Category::Syntax | Category::Eof | Category::Io => bad_request(
            "malformed-json",
            "The body is not JSON",
            format!("the body cannot be parsed: {error}"),
        )
        .with_remedy("send one JSON object (RFC 8259)"),
    }
}

fn bad_request(name: &str, title: &str, detail: impl Into<String>) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, name, title, detail)
}

/// The parameters after the `?`.
#[derive(Clone, Copy, Debug)]
pub struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Problem> {
        axum::extract::Query::try_from_uri(&parts.uri)
            .map(|axum::extract::Query(value)| Self(value))
            .map_err(|rejection| {
                bad_request(
                    "invalid-query",
                    "The query is not what is expected here",
                    format!(
                        "'?{}': {}",
                        parts.uri.query().unwrap_or(""),
                        rejection.body_text()
                    ),
                )
                .with_remedy("the OpenAPI document at /v1/openapi.json has the parameters")
            })
    }
}

/// The variable parts of the path.
#[derive(Clone, Copy, Debug)]
pub struct Path<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        axum::extract::Path::from_request_parts(parts, state)
            .await
            .map(|axum::extract::Path(value)| Self(value))
            .map_err(|rejection| {
                bad_request(
                    "invalid-path",
                    "The path is not what is expected here",
                    format!("'{}': {}", parts.uri.path(), rejection.body_text()),
                )
            })
    }
}
