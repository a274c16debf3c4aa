//! Exports and their claims.

use axum::Json;
use axum::extract::State as Shared;
use axum::http::StatusCode;
use farbus_fabric::wire::ExportName;
use farbus_rest::extract::Path;
use farbus_rest::problem::Problem;
use log::info;

use super::super::api::{ExportInfo, ExportList};
use super::State;
use crate::exports::Export;

/// What is exported.
#[utoipa::path(
    get,
    path = "/v1/exports",
    tag = "exports",
    responses((status = 200, description = "Every export", body = ExportList))
)]
pub(super) async fn list(Shared(state): Shared<State>) -> Json<ExportList> {
    let draining = state.exports.is_draining();
    let all = state.exports.all();
    let exports = all.iter().map(|export| ExportInfo::of(export, draining));
    Json(ExportList {
        exports: exports.collect(),
        draining,
    })
}

/// One export.
#[utoipa::path(
    get,
    path = "/v1/exports/{export}",
    tag = "exports",
    params(("export" = String, Path, pattern = "^[A-Za-z0-9._/-]{1,64}$", description = "The export's name")),
    responses(
        (status = 200, description = "As it is now", body = ExportInfo),
        (status = 400, description = "The name cannot be one", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "There is none of this name", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn get(
    Shared(state): Shared<State>,
    Path(name): Path<String>,
) -> Result<Json<ExportInfo>, Problem> {
    let export = find(&state, &name)?;
    Ok(Json(ExportInfo::of(&export, state.exports.is_draining())))
}

/// Takes an export from who has it. That side's virtual machine waits for its device; its host does not
/// get the export again for half a minute, others may claim it at once.
#[utoipa::path(
    delete,
    path = "/v1/claims/{export}",
    tag = "exports",
    params(("export" = String, Path, pattern = "^[A-Za-z0-9._/-]{1,64}$", description = "The export's name")),
    responses(
        (status = 202, description = "The claim is being ended: this was its last state", body = ExportInfo),
        (status = 400, description = "The name cannot be one", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "There is none of this name", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "Nobody has it", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn evict(
    Shared(state): Shared<State>,
    Path(name): Path<String>,
) -> Result<(StatusCode, Json<ExportInfo>), Problem> {
    let export = find(&state, &name)?;
    let last = ExportInfo::of(&export, state.exports.is_draining());
    let Some(claim) = export.evict() else {
        return Err(Problem::new(
            StatusCode::CONFLICT,
            "not-claimed",
            "Nobody has this export",
            format!("export {name} is {}", last.state),
        )
        .with_remedy(
            "nothing needs to be done: it can be claimed unless it has failed or drains",
        ));
    };
    info!("{name}: evicts {}", claim.holder);
    Ok((StatusCode::ACCEPTED, Json(last)))
}

fn find(state: &State, name: &str) -> Result<std::sync::Arc<Export>, Problem> {
    let wanted = ExportName::new(name).map_err(|error| {
        Problem::new(
            StatusCode::BAD_REQUEST,
            "invalid-export-name",
            "This cannot be the name of an export",
            format!("{name:?}: {error}"),
        )
        .with_remedy("names have 1 to 64 of A-Z a-z 0-9 . _ -, those of slices a / as well")
    })?;
    state.exports.find(&wanted).ok_or_else(|| {
        let names = state.exports.names().join(", ");
        Problem::new(
            StatusCode::NOT_FOUND,
            "no-such-export",
            "There is no such export",
            format!("there is no export {name}; there is {names}"),
        )
        .with_remedy("add it to the configuration and POST /v1/reload")
    })
}
