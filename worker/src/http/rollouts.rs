//! `POST /v1/rollouts`: a piece of a learner's batch in, groups of completions out, streamed as they finish.

use std::convert::Infallible;

use axum::{
    body::Body as ResponseBody,
    extract::{DefaultBodyLimit, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use flotilla_api::names::path;
use futures::StreamExt as _;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::wrappers::UnboundedReceiverStream;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    api::Body,
    error::{ApiError, ErrorBody},
    guard,
    weights::RolloutApi,
};
use crate::rollout::{
    sampler::{Held, SampleError},
    wire::{GroupLine, Line, NDJSON, Piece, Sample},
};

/// The largest piece: its pictures, encoded.
const MAX_BODY_BYTES: usize = 256 << 20;

/// The endpoint.
pub fn router(state: RolloutApi) -> OpenApiRouter {
    let token = state.token.clone();
    let router = OpenApiRouter::new()
        .routes(routes!(rollouts))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(state);
    guard::guarded(router, token)
}

/// Samples groups of completions; each is a line as soon as it is finished.
///
/// The body has `weight_version`, `n`, `temperature`, `top_p`, `max_tokens`, `prompts` (each `token_ids`, `images`, `seed`)
/// and `images` by name. A line is a group with token ids, log-probabilities and finish reasons, an error, or `done`.
#[utoipa::path(
    post, path = path::ROLLOUTS, tag = "internal", security(("jobToken" = [])), request_body = Value,
    responses(
        (status = 200, description = "One JSON value per line", body = String, content_type = "application/x-ndjson"),
        (status = 401, description = "The token is missing or wrong", body = ErrorBody),
        (status = 409, description = "Other weights are loaded", body = ErrorBody),
    ),
)]
async fn rollouts(State(api): State<RolloutApi>, Body(piece): Body<Piece>) -> Result<Response, ApiError> {
    let sampler = api.sampler()?;
    let stopped = |_| ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "stopped", "this pod is shutting down");
    let lane = api.lanes.clone().acquire_owned().await.map_err(stopped)?;
    let held = sampler.hold().await;
    if held.version() != Some(piece.weight_version.as_str()) {
        let message = match held.version() {
            Some(loaded) => format!(
                "weights {loaded:?} are loaded, not {:?}: PUT /v1/weights",
                piece.weight_version
            ),
            None => "no weights are loaded: PUT /v1/weights".to_owned(),
        };
        return Err(ApiError::new(StatusCode::CONFLICT, "weight_version", message));
    }
    let (lines, receiver) = mpsc::unbounded_channel();
    tokio::task::spawn_blocking(move || sample(&held, &piece, &lines, lane));
    let stream = UnboundedReceiverStream::new(receiver).map(Ok::<_, Infallible>);
    Ok(([(header::CONTENT_TYPE, NDJSON)], ResponseBody::from_stream(stream)).into_response())
}

/// Samples on a thread of its own. A learner that hangs up ends it; a panic cuts the stream off before its last line.
fn sample(held: &Held, piece: &Piece, lines: &mpsc::UnboundedSender<String>, _lane: OwnedSemaphorePermit) {
    let mut groups = 0;
    let outcome = held.sample(piece, &|| lines.is_closed(), &mut |index, group| {
        groups += 1;
        let completions = group.completions.into_iter().map(Sample::from).collect();
        send(
            lines,
            &Line::Group(GroupLine {
                index,
                weight_version: piece.weight_version.clone(),
                completions,
            }),
        );
    });
    match outcome {
        Ok(()) => send(lines, &Line::Done { groups }),
        Err(error) => fail(lines, &error),
    }
}

fn fail(lines: &mpsc::UnboundedSender<String>, error: &SampleError) {
    if lines.is_closed() {
        return;
    }
    let message = crate::error::chain(error);
    tracing::error!("a piece failed: {message}");
    send(
        lines,
        &Line::Error {
            message,
            permanent: error.is_permanent(),
        },
    );
}

fn send(lines: &mpsc::UnboundedSender<String>, line: &Line) {
    if let Ok(text) = serde_json::to_string(line) {
        // A learner that hung up is noticed before the next token.
        let _ = lines.send(text + "\n");
    }
}
