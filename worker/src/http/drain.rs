//! `POST /drain`: no new requests are taken, those that have begun end. SIGTERM does the same and then ends the process.

use std::time::Duration;

use axum::{
    Json,
    extract::{Query, State, rejection::QueryRejection},
};
use flotilla_api::{names::path, progress::Stage};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{activity::Activity, error::ApiError, error::ErrorBody, guard};
use crate::{context::Token, progress::ProgressCell};

/// The longest wait for the last answer.
const MAX_WAIT: u16 = 600;

/// What the endpoint needs.
#[derive(Clone, Debug)]
pub struct DrainState {
    /// Tells the probes and the other endpoints.
    pub progress: ProgressCell,
    /// What is still being answered.
    pub activity: Activity,
}

/// How a drain is asked for.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct DrainQuery {
    /// Seconds for which the answer waits for the last request to end.
    #[serde(default)]
    #[param(minimum = 0, maximum = 600)]
    wait: u16,
}

/// How far a drain is.
#[derive(Debug, Serialize, ToSchema)]
struct Drain {
    /// `draining` while requests are being answered, then `drained`.
    status: &'static str,
    /// Requests that are being answered.
    running: usize,
}

/// The endpoint, which is there only for who has the token: without one, anybody could take the server down.
pub fn router(state: DrainState, token: Option<Token>) -> OpenApiRouter {
    if token.is_none() {
        return OpenApiRouter::new();
    }
    let router = OpenApiRouter::new().routes(routes!(drain)).with_state(state);
    guard::guarded(router, token)
}

/// Takes no new requests and tells how many have not ended; may be asked again.
///
/// From then on `/readyz` fails and the model's endpoints answer 503 with code `draining`. The process stays until it is
/// stopped: a pod that drains is replaced by whoever drained it.
#[utoipa::path(
    post, path = path::DRAIN, tag = "operation", params(DrainQuery), security(("jobToken" = [])),
    responses(
        (status = 200, description = "No new requests are taken", body = Drain),
        (status = 400, description = "The wait is not 0 to 600 seconds", body = ErrorBody),
        (status = 401, description = "The token is missing or wrong", body = ErrorBody),
        (status = 503, description = "The model is not loaded: there is nothing to drain", body = ErrorBody),
    ),
)]
async fn drain(
    State(state): State<DrainState>,
    query: Result<Query<DrainQuery>, QueryRejection>,
) -> Result<Json<Drain>, ApiError> {
    let Query(query) = query.map_err(|error| ApiError::invalid("wait", error.body_text()))?;
    if query.wait > MAX_WAIT {
        return Err(ApiError::invalid(
            "wait",
            format!("wait is {}, not 0 to {MAX_WAIT} seconds", query.wait),
        ));
    }
    match state.progress.stage() {
        Stage::Running => {
            let message = "draining: finishing the answers that have begun";
            state.progress.enter(Stage::Stopping, message);
        }
        Stage::Stopping => {}
        stage => {
            let message = format!("the stage is {stage:?}: there is nothing to drain");
            return Err(ApiError::new(
                axum::http::StatusCode::SERVICE_UNAVAILABLE,
                "loading",
                message,
            ));
        }
    }
    let wait = Duration::from_secs(u64::from(query.wait));
    // Time that is over is no error: the answer says what is left.
    let _ = tokio::time::timeout(wait, state.activity.idle()).await;
    let running = state.activity.running();
    let status = if running == 0 { "drained" } else { "draining" };
    Ok(Json(Drain { status, running }))
}
