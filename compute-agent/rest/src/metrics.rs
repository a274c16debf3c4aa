//! Counts for Prometheus: the requests of the interface itself, and the answer that shows a registry.

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{Response, header};
use axum::middleware::Next;
use axum::response::IntoResponse;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use crate::problem::Problem;

/// What tells one kind of request from another. The route, not the path: an id in a label would make
/// a time series of every attachment that ever was.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    method: String,
    route: String,
    status: u16,
}

/// Requests that were answered.
#[derive(Clone, Debug, Default)]
pub struct HttpMetrics {
    requests: Family<Labels, Counter>,
}

impl HttpMetrics {
    /// Shows them in `registry`, as `http_requests_total` after its prefix.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "http_requests",
            "Requests of the REST interface that were answered",
            self.requests.clone(),
        );
    }

    /// Counts one request; for `axum::middleware::from_fn_with_state`.
    pub async fn count(State(this): State<Self>, request: Request, next: Next) -> Response<Body> {
        let method = match request.method().as_str() {
            known @ ("GET" | "PUT" | "DELETE" | "POST" | "PATCH" | "HEAD" | "OPTIONS") => known,
            _ => "other",
        };
        let method = method.to_owned();
        let route = request.extensions().get::<MatchedPath>();
        let route = route.map_or_else(|| "none".to_owned(), |path| path.as_str().to_owned());
        let response = next.run(request).await;
        let status = response.status().as_u16();
        let labels = Labels {
            method,
            route,
            status,
        };
        this.requests.get_or_create(&labels).inc();
        response
    }
}

/// The answer to `GET /metrics`, in the OpenMetrics text format.
#[must_use]
pub fn render(registry: &Registry) -> Response<Body> {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => {
            Problem::internal(format!("the metrics cannot be shown: {error}")).into_response()
        }
    }
}
