//! `GET /healthz`: the process answers. `GET /readyz`: the role does its work.

use axum::{Router, extract::State, http::StatusCode, routing::get};
use flotilla_api::progress::Stage;

use super::Common;

/// Both probes, open to everybody.
pub fn router(state: Common) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(ready))
        .with_state(state)
}

async fn ready(State(state): State<Common>) -> (StatusCode, String) {
    match state.progress.stage() {
        Stage::Running => (StatusCode::OK, "ready".to_owned()),
        stage => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("{stage:?}: {}", state.progress.snapshot().message),
        ),
    }
}
