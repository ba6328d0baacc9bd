//! `GET /progress`: what the operator reads, guarded by the token of the pod's owner.

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};

use super::Common;

/// The endpoint.
pub fn router(state: Common) -> Router {
    Router::new().route("/progress", get(progress)).with_state(state)
}

async fn progress(State(state): State<Common>, headers: HeaderMap) -> Response {
    if let Some(token) = &state.token {
        let presented = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.strip_prefix("Bearer "));
        match presented {
            Some(presented) if token.admits(presented) => {}
            Some(_) => return (StatusCode::UNAUTHORIZED, "the bearer token is wrong\n").into_response(),
            None => return (StatusCode::UNAUTHORIZED, "a bearer token is needed\n").into_response(),
        }
    }
    Json(state.progress.snapshot()).into_response()
}
