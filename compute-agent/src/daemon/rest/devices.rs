//! What the pool has.

use axum::Json;
use axum::extract::State as Shared;
use farbus_rest::extract::Query;
use farbus_rest::problem::Problem;
use serde::Deserialize;
use utoipa::IntoParams;

use super::super::pool::FRESH;
use super::State;
use crate::api::{DeviceClass, DeviceState, Devices};

/// Which devices are wanted.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Filter {
    /// Those of this device server.
    device_server: Option<String>,
    /// Those of this kind.
    class: Option<DeviceClass>,
    /// Those in this state.
    state: Option<DeviceState>,
}

/// What the configured device servers offer. All are asked at the same time; an answer holds for a
/// second.
#[utoipa::path(
    get,
    path = "/v1/devices",
    tag = "devices",
    params(Filter),
    responses(
        (status = 200, description = "Every export of every device server that answered", body = Devices),
        (status = 400, description = "A filter is not known", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn list(
    Shared(state): Shared<State>,
    Query(filter): Query<Filter>,
) -> Json<Devices> {
    let mut all = state.registry.devices(FRESH).await;
    let of_server = |name: &str| filter.device_server.as_ref().is_none_or(|it| it == name);
    all.devices.retain(|device| {
        of_server(&device.device_server)
            && filter.class.is_none_or(|class| class == device.class)
            && filter.state.is_none_or(|state| state == device.state)
    });
    all.unreachable
        .retain(|server| of_server(&server.device_server));
    Json(all)
}
