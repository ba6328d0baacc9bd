//! `GET /progress`: what the operator reads, guarded by the token of the pod's owner.

use axum::{Json, Router, extract::State, http::HeaderMap, response::IntoResponse, routing::get};
use flotilla_api::{names::path, progress::Progress};

use super::{Common, guard};

/// The endpoint.
pub fn router(state: Common) -> Router {
    Router::new().route(path::PROGRESS, get(progress)).with_state(state)
}

async fn progress(State(state): State<Common>, headers: HeaderMap) -> Result<Json<Progress>, impl IntoResponse> {
    match guard::check(state.token.as_ref(), &headers) {
        Ok(()) => Ok(Json(state.progress.snapshot())),
        Err(refusal) => Err(refusal.plain()),
    }
}
