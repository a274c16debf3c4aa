//! What happens, as it happens: server-sent events (WHATWG HTML, "Server-sent events").

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State as Shared;
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use axum::response::sse::{Event, KeepAlive, Sse};
use farbus_rest::problem::Problem;
use farbus_rest::server::Shutdown;
use tokio::sync::mpsc::{self, Sender};
use tokio_stream::wrappers::ReceiverStream;

use super::super::registry::Registry;
use super::State;
use crate::api;

/// Events on their way to one client. One that reads slowly holds up nobody else.
const ON_THE_WAY: usize = 16;

/// A comment is sent after so much silence, so that a client and what lies between know that the
/// stream lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Streams at a time, of all clients together: each has its connection to itself, and those are
/// needed for requests, too.
pub(super) const MAX_STREAMS: usize = 64;

/// What happens to attachments, from now on, or from after the event that `Last-Event-ID` names. Events
/// are named `attachment`, their ids are sequence numbers, their data is JSON (`Event`).
#[utoipa::path(
    get,
    path = "/v1/events",
    tag = "events",
    params(("Last-Event-ID" = Option<u64>, Header, description = "The sequence number of the last event seen; 0 for all that are remembered")),
    responses(
        (status = 200, description = "Events, without end", body = api::Event, content_type = "text/event-stream"),
        (status = 400, description = "Last-Event-ID is no number", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "So many streams are open already that no more are served", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn stream(
    Shared(state): Shared<State>,
    headers: HeaderMap,
) -> Result<impl IntoResponse, Problem> {
    let last = match headers.get("last-event-id") {
        Some(last) => {
            let number = last.to_str().ok().and_then(|last| last.parse().ok());
            number.ok_or_else(|| {
                Problem::new(
                    StatusCode::BAD_REQUEST,
                    "invalid-last-event-id",
                    "The last event seen is not named",
                    format!("Last-Event-ID is {last:?}"),
                )
                .with_remedy("send the id of the last event, or leave the header out")
            })?
        }
        None => *state.registry.context().events.newest().borrow(),
    };
    let place = state.streams.clone().try_acquire_owned().map_err(|_| {
        Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "too-many-event-streams",
            "There are too many event streams",
            format!("{MAX_STREAMS} are open"),
        )
        .with_remedy("end some, or ask for what is wanted to be known with GET /v1/attachments")
    })?;
    let (sender, receiver) = mpsc::channel(ON_THE_WAY);
    tokio::spawn(async move {
        forward(state.registry, state.shutdown, last, sender).await;
        drop(place);
    });
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE);
    Ok(Sse::new(ReceiverStream::new(receiver)).keep_alive(keep_alive))
}

async fn forward(
    registry: Arc<Registry>,
    shutdown: Shutdown,
    mut last: u64,
    client: Sender<Result<Event, Infallible>>,
) {
    let events = &registry.context().events;
    let mut newest = events.newest();
    let shutdown = shutdown.requested();
    tokio::pin!(shutdown);
    loop {
        newest.mark_unchanged();
        for event in events.after(last) {
            last = event.sequence;
            let sse = Event::default().event("attachment").id(last.to_string());
            let Ok(sse) = sse.json_data(&event) else {
                return;
            };
            if client.send(Ok(sse)).await.is_err() {
                return;
            }
        }
        tokio::select! {
            changed = newest.changed() => if changed.is_err() { return },
            () = client.closed() => return,
            () = &mut shutdown => return,
        }
    }
}
