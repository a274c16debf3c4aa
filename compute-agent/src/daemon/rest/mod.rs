//! The REST interface: paths, and what answers them. `docs/openapi/agent.json` is made from what is
//! said here, and the running daemon is held to it.

mod attachments;
mod devices;
mod events;
mod health;
mod openapi;

use std::sync::Arc;

use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::get;
use farbus_rest::metrics::HttpMetrics;
use farbus_rest::server::{self, Shutdown};
use prometheus_client::registry::Registry as Metrics;
use tokio::sync::Semaphore;

pub use openapi::document;

use super::metrics::Snapshot;
use super::registry::Registry;

/// What all handlers share.
#[derive(Clone)]
pub(super) struct State {
    registry: Arc<Registry>,
    metrics: Arc<Metrics>,
    shutdown: Shutdown,
    /// Places for event streams.
    streams: Arc<Semaphore>,
}

/// The whole interface.
pub fn router(registry: &Arc<Registry>, shutdown: Shutdown) -> Router {
    let mut metrics = Metrics::with_prefix("farbus");
    let requests = HttpMetrics::default();
    requests.register(&mut metrics);
    registry.context().counts.register(&mut metrics);
    metrics.register_collector(Box::new(Snapshot(Arc::downgrade(registry))));
    let state = State {
        registry: registry.clone(),
        metrics: Arc::new(metrics),
        shutdown,
        streams: Arc::new(Semaphore::new(events::MAX_STREAMS)),
    };
    let one = get(attachments::get)
        .put(attachments::put)
        .delete(attachments::delete);
    let router = Router::new()
        .route("/v1/devices", get(devices::list))
        .route("/v1/attachments", get(attachments::list))
        .route("/v1/attachments/{id}", one)
        .route("/v1/events", get(events::stream))
        .route("/v1/version", get(health::version))
        .route("/v1/openapi.json", get(openapi::get))
        .route("/healthz", get(farbus_rest::daemon::healthz))
        .route("/readyz", get(health::readyz))
        .route("/metrics", get(health::metrics))
        .with_state(state);
    server::finish(router).layer(from_fn_with_state(requests, HttpMetrics::count))
}
