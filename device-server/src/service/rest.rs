//! The admin interface: paths, and what answers them. `docs/openapi/device-server.json` is made from
//! what is said here.

mod daemon;
mod exports;
mod openapi;

use std::sync::Arc;

use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::{delete, get, post};
use farbus_rest::metrics::HttpMetrics;
use farbus_rest::server;
use prometheus_client::registry::Registry;
use tokio::sync::mpsc;

use super::Request;
use super::metrics::Snapshot;
use crate::exports::Exports;

pub use self::openapi::document;

/// What all handlers share.
#[derive(Clone)]
pub(super) struct State {
    exports: Exports,
    requests: mpsc::Sender<Request>,
    metrics: Arc<Registry>,
}

/// The whole interface. What takes more than a look is asked of the service.
pub(super) fn router(all: Exports, requests: mpsc::Sender<Request>) -> Router {
    let mut metrics = Registry::with_prefix("farbus_device_server");
    let counted = HttpMetrics::default();
    counted.register(&mut metrics);
    metrics.register_collector(Box::new(Snapshot(all.clone())));
    let state = State {
        exports: all,
        requests,
        metrics: Arc::new(metrics),
    };
    // Names of slices have a slash.
    let router = Router::new()
        .route("/v1/exports", get(exports::list))
        .route("/v1/exports/{*export}", get(exports::get))
        .route("/v1/claims/{*export}", delete(exports::evict))
        .route("/v1/reload", post(daemon::reload))
        .route("/v1/drain", post(daemon::drain).delete(daemon::undo_drain))
        .route("/v1/version", get(daemon::version))
        .route("/v1/openapi.json", get(openapi::get))
        .route("/healthz", get(farbus_rest::daemon::healthz))
        .route("/readyz", get(daemon::readyz))
        .route("/metrics", get(daemon::metrics))
        .with_state(state);
    server::finish(router).layer(from_fn_with_state(counted, HttpMetrics::count))
}
