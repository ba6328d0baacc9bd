//! `GET /healthz`: the process answers. `GET /readyz`: the role does its work.

use axum::{extract::State, http::StatusCode};
use flotilla_api::progress::Stage;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::Common;

/// Both probes, open to everybody.
pub fn router(state: Common) -> OpenApiRouter {
    OpenApiRouter::new()
        .routes(routes!(alive))
        .routes(routes!(ready))
        .with_state(state)
}

/// Whether the process answers.
#[utoipa::path(
    get, path = "/healthz", tag = "operation",
    responses((status = 200, description = "It does", body = String, content_type = "text/plain")),
)]
async fn alive() -> &'static str {
    "ok"
}

/// Whether the role does its work: not before its model is loaded, and no more once it drains.
#[utoipa::path(
    get, path = "/readyz", tag = "operation",
    responses(
        (status = 200, description = "It does", body = String, content_type = "text/plain"),
        (status = 503, description = "It does not: the stage and why", body = String, content_type = "text/plain"),
    ),
)]
async fn ready(State(state): State<Common>) -> (StatusCode, String) {
    match state.progress.stage() {
        Stage::Running => (StatusCode::OK, "ready".to_owned()),
        stage => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("{stage:?}: {}", state.progress.snapshot().message),
        ),
    }
}
