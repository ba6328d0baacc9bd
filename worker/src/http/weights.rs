//! `PUT /v1/weights`: a learner's weights, as one safetensors file, replace those of a rollout pod.

use std::sync::{Arc, OnceLock};

use axum::{
    Json,
    body::{Body, BodyDataStream},
    extract::{DefaultBodyLimit, Query, State, rejection::QueryRejection},
    http::StatusCode,
};
use flotilla_api::names::path;
use flotilla_model::weights::SINGLE_FILE;
use futures::StreamExt as _;
use tokio::{io::AsyncWriteExt as _, sync::Semaphore};

use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    error::{ApiError, ErrorBody},
    guard,
};
use crate::{
    context::Token,
    error::chain,
    rollout::{
        sampler::Sampler,
        wire::{WeightsAnswer, WeightsQuery},
    },
};

/// Room for the names and shapes of the tensors.
const HEADER_BYTES: usize = 16 << 20;
/// Bytes past the limit that are read and thrown away before a refusal.
const DRAINED_BYTES: usize = 64 << 20;

/// What the endpoints of a rollout pod share.
#[derive(Clone, Debug)]
pub struct RolloutApi {
    /// Guards the endpoints.
    pub token: Option<Token>,
    /// The sampler, once the model is loaded.
    pub slot: Arc<OnceLock<Sampler>>,
    /// Places for pieces that are sampled at once.
    pub lanes: Arc<Semaphore>,
}

impl RolloutApi {
    /// The sampler, if it is there.
    pub fn sampler(&self) -> Result<Sampler, ApiError> {
        let loading = || ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "loading", "the model is being loaded");
        self.slot.get().cloned().ok_or_else(loading)
    }
}

/// The endpoint. The body is streamed to a file, so its limit is checked here.
pub fn router(state: RolloutApi) -> OpenApiRouter {
    let token = state.token.clone();
    let router = OpenApiRouter::new()
        .routes(routes!(replace))
        .layer(DefaultBodyLimit::disable())
        .with_state(state);
    guard::guarded(router, token)
}

/// Replaces the weights, once what is being sampled has ended.
#[utoipa::path(
    put, path = path::WEIGHTS, tag = "internal", security(("jobToken" = [])), params(WeightsQuery),
    request_body(content = String, content_type = "application/octet-stream", description = "One safetensors file"),
    responses(
        (status = 200, description = "The weights are loaded", body = WeightsAnswer),
        (status = 400, description = "The version is missing, or the body broke off", body = ErrorBody),
        (status = 401, description = "The token is missing or wrong", body = ErrorBody),
        (status = 422, description = "They are not the weights of this model", body = ErrorBody),
        (status = 507, description = "They cannot be stored", body = ErrorBody),
    ),
)]
async fn replace(
    State(api): State<RolloutApi>,
    query: Result<Query<WeightsQuery>, QueryRejection>,
    body: Body,
) -> Result<Json<WeightsAnswer>, ApiError> {
    let sampler = api.sampler()?;
    let Query(query) = query.map_err(|error| ApiError::invalid("version", error.body_text()))?;
    if query.version.is_empty() || query.version.len() > 253 {
        return Err(ApiError::invalid("version", "a version has 1 to 253 bytes"));
    }
    let directory = store(body, sampler.weight_bytes() + HEADER_BYTES).await?;
    let loaded = sampler.take_over(directory, query.version.clone()).await;
    loaded.map_err(|error| ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_weights", chain(&error)))?;
    tracing::info!(version = query.version, "weights");
    Ok(Json(WeightsAnswer {
        weight_version: query.version,
    }))
}

/// Reads what a client still sends, up to [`DRAINED_BYTES`]: one that is cut off while it writes sees a broken connection in
/// place of the answer.
async fn drain(stream: &mut BodyDataStream) {
    let mut size = 0;
    while let Some(Ok(chunk)) = stream.next().await {
        size += chunk.len();
        if size > DRAINED_BYTES {
            return;
        }
    }
}

/// Writes the body where the model's reader finds it.
async fn store(body: Body, limit: usize) -> Result<tempfile::TempDir, ApiError> {
    let disk = |error: std::io::Error| {
        let message = format!("the weights cannot be stored: {error}");
        ApiError::new(StatusCode::INSUFFICIENT_STORAGE, "storage", message)
    };
    let directory = tempfile::tempdir().map_err(disk)?;
    let mut file = tokio::fs::File::create(directory.path().join(SINGLE_FILE))
        .await
        .map_err(disk)?;
    let mut stream = body.into_data_stream();
    let mut size = 0;
    while let Some(chunk) = stream.next().await {
        let cut_off = |error| {
            let message = format!("the body ended early: {error}");
            ApiError::new(StatusCode::BAD_REQUEST, "invalid_body", message)
        };
        let chunk = chunk.map_err(cut_off)?;
        size += chunk.len();
        if size > limit {
            drain(&mut stream).await;
            let message = format!("the body is larger than {limit} bytes, which the weights of this model are not");
            return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message));
        }
        file.write_all(&chunk).await.map_err(disk)?;
    }
    file.flush().await.map_err(disk)?;
    Ok(directory)
}
