//! `PUT /v1/rollout-pods`: the operator tells a learner which rollout pods are ready.

use axum::{
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
};
use flotilla_api::{names::path, rollout::RolloutPods};
use tokio::sync::watch;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    api::Body,
    error::{ApiError, ErrorBody},
    guard,
};
use crate::{context::Token, progress::ProgressCell};

/// The longest list: 1024 pods with names of 253 bytes.
const MAX_BODY_BYTES: usize = 1 << 20;

/// Where the list goes.
#[derive(Clone, Debug)]
pub struct RolloutPodsState {
    /// Guards the endpoint.
    pub token: Option<Token>,
    /// Repeats the revision of the list, which is how the operator knows that it arrived.
    pub progress: ProgressCell,
    /// The learner listens at the other end.
    pub pods: watch::Sender<RolloutPods>,
}

/// The endpoint.
pub fn router(state: RolloutPodsState) -> OpenApiRouter {
    let token = state.token.clone();
    let router = OpenApiRouter::new()
        .routes(routes!(replace))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(state);
    guard::guarded(router, token)
}

/// Replaces the list of pods that a learner may ask.
#[utoipa::path(
    put, path = path::ROLLOUT_PODS, tag = "internal", security(("jobToken" = [])), request_body = Value,
    responses(
        (status = 204, description = "The list is taken"),
        (status = 400, description = "It is no such list", body = ErrorBody),
        (status = 401, description = "The token is missing or wrong", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ),
)]
async fn replace(State(state): State<RolloutPodsState>, Body(pods): Body<RolloutPods>) -> Result<StatusCode, ApiError> {
    tracing::info!(revision = pods.revision, pods = pods.pods.len(), "rollout pods");
    let revision = pods.revision.clone();
    state.pods.send_replace(pods);
    state
        .progress
        .update(|progress| progress.rollout.get_or_insert_default().revision = revision);
    Ok(StatusCode::NO_CONTENT)
}
