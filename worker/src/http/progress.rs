//! `GET /progress`: what the operator reads, guarded by the token of the pod's owner.

use axum::{Json, extract::State};
use flotilla_api::{names::path, progress::Progress};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Common, error::ErrorBody, guard};

/// The endpoint.
pub fn router(state: Common) -> OpenApiRouter {
    let token = state.token.clone();
    let router = OpenApiRouter::new().routes(routes!(progress)).with_state(state);
    guard::guarded(router, token)
}

/// How far the role is: its stage, a message for people, and what concerns the role (steps, metrics, checkpoints, digests).
#[utoipa::path(
    get, path = path::PROGRESS, tag = "operation", security(("jobToken" = [])),
    responses(
        (status = 200, description = "The progress, as the operator reads it", body = Value),
        (status = 401, description = "The token is missing or wrong", body = ErrorBody),
    ),
)]
async fn progress(State(state): State<Common>) -> Json<Progress> {
    Json(state.progress.snapshot())
}
