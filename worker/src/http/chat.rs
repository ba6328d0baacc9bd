//! `POST /v1/chat/completions`: text and pictures in, completions out, whole or as a stream.

use std::{collections::HashSet, sync::Arc};

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use flotilla_api::role::Purpose;
use futures::Stream;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    answer::{ChatLogprobs, Finish, Usage},
    api::{Api, Body, check_model},
    chat_request::ChatRequest,
    error::{ApiError, ErrorBody},
    sse::{self, ServerSentEvent},
};
use crate::service::{
    Service,
    generation::{Delta, Generation, Sample, Versions},
};

/// The endpoint.
pub fn router(state: Api) -> OpenApiRouter {
    OpenApiRouter::new().routes(routes!(chat)).with_state(state)
}

/// An answer to a conversation.
#[derive(Debug, Serialize, ToSchema)]
struct ChatCompletion {
    /// Names the answer.
    id: String,
    /// `chat.completion`.
    #[schema(value_type = String)]
    object: &'static str,
    /// Seconds since 1970.
    created: i64,
    /// Name of the served model.
    model: String,
    /// Version of the weights that ended the first choice: with the same one, a seed gives the same tokens.
    system_fingerprint: Option<String>,
    /// One for each completion asked for.
    choices: Vec<ChatChoice>,
    /// Tokens of prompt and choices.
    usage: Usage,
}

/// A completion.
#[derive(Debug, Serialize, ToSchema)]
struct ChatChoice {
    /// Its number: sample `index` is drawn from stream `index` of the seed.
    index: usize,
    /// What was said.
    message: AnswerMessage,
    /// Why it ended.
    finish_reason: Option<Finish>,
    /// If asked for.
    logprobs: Option<ChatLogprobs>,
    /// Versions of the weights that drew it; an extension.
    weight_version: Versions,
}

/// A turn of the assistant.
#[derive(Debug, Serialize, ToSchema)]
struct AnswerMessage {
    /// `assistant`.
    #[schema(value_type = String)]
    role: &'static str,
    /// The text, without stop token and stop string.
    content: String,
    /// Always null; clients expect it.
    #[schema(value_type = Option<String>)]
    refusal: Option<()>,
}

/// A piece of a streamed answer.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ChatChunk {
    /// Names the answer; the same in all pieces.
    id: String,
    /// `chat.completion.chunk`.
    #[schema(value_type = String)]
    object: &'static str,
    /// Seconds since 1970; the same in all pieces.
    created: i64,
    /// Name of the served model.
    model: String,
    /// One piece of a completion; none in the piece with the token counts.
    choices: Vec<ChunkChoice>,
    /// Token counts, in the last piece, if asked for.
    usage: Option<Usage>,
}

/// A piece of a completion.
#[derive(Debug, Serialize, ToSchema)]
struct ChunkChoice {
    /// Which completion.
    index: usize,
    /// What it adds.
    delta: ChunkDelta,
    /// Set in the last piece of the completion.
    finish_reason: Option<Finish>,
    /// Of the tokens behind the piece, if asked for.
    logprobs: Option<ChatLogprobs>,
    /// Versions of the weights, in the last piece of the completion; an extension.
    #[serde(skip_serializing_if = "Option::is_none")]
    weight_version: Option<Versions>,
}

/// What a piece adds to a message.
#[derive(Debug, Serialize, ToSchema)]
struct ChunkDelta {
    /// `assistant`, in the first piece of the completion.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    role: Option<&'static str>,
    /// Text.
    content: String,
}

/// Continues a conversation.
///
/// The answer comes whole, or with `stream` as server-sent events: pieces (`ChatChunk`) as `data`, then `[DONE]`. The first piece of
/// each choice has its role, the last one its finish reason. An error on the way is an event with `error`, and no `[DONE]` follows.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    tag = "policy",
    request_body = ChatRequest,
    responses(
        (status = 200, description = "The completions, whole or as a stream", content(
            (ChatCompletion = "application/json"),
            (ServerSentEvent = "text/event-stream"),
        )),
        (status = 400, description = "A field is wrong; `param` names it", body = ErrorBody),
        (status = 401, description = "The key is missing or wrong", body = ErrorBody),
        (status = 403, description = "The deployment is a critic only", body = ErrorBody),
        (status = 404, description = "Another model is served", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 429, description = "Too many requests: come back after `Retry-After` seconds", body = ErrorBody),
        (status = 500, description = "The model failed", body = ErrorBody),
        (status = 503, description = "The model is being loaded, or the server drains", body = ErrorBody),
        (status = 504, description = "The request took too long", body = ErrorBody),
    )
)]
async fn chat(State(api): State<Api>, Body(request): Body<ChatRequest>) -> Result<Response, ApiError> {
    let service = api.service(Purpose::Policy)?;
    answer(service, request).await.map_err(|error| api.refuse(error))
}

async fn answer(service: Arc<Service>, request: ChatRequest) -> Result<Response, ApiError> {
    check_model(&service, request.model.as_deref())?;
    let (streams, include_usage) = (request.sampling.streams(), request.sampling.streams_usage());
    let answer = Answer {
        id: format!("chatcmpl-{}", uuid::Uuid::new_v4().simple()),
        created: jiff::Timestamp::now().as_second(),
        service: service.clone(),
        logprobs: request.tells_logprobs(),
    };
    let (conversation, wanted) = request.into_asked()?;
    let (prompt, max_tokens) = service.prepare(conversation, wanted.max_tokens).await?;
    let generation = service.draw(prompt, max_tokens, &wanted).await?;
    if streams {
        return Ok(sse::response(streamed(answer, generation, include_usage)));
    }
    let prompt_tokens = generation.prompt_tokens();
    let (samples, completion_tokens) = generation.collect().await?;
    let usage = Usage::new(prompt_tokens, completion_tokens);
    Ok(Json(answer.whole(samples, usage)).into_response())
}

/// The events of a streamed answer.
fn streamed(answer: Answer, mut generation: Generation, include_usage: bool) -> impl Stream<Item = String> {
    async_stream::stream! {
        let mut greeted = HashSet::new();
        while let Some(delta) = generation.next().await {
            let delta = match delta {
                Ok(delta) => delta,
                Err(error) => {
                    yield sse::event(&ApiError::from(error).body());
                    return;
                }
            };
            if greeted.insert(delta.sample) {
                yield sse::event(&answer.greeting(delta.sample));
            }
            if let Some(chunk) = answer.chunk(delta) {
                yield sse::event(&chunk);
            }
        }
        if include_usage {
            let usage = Usage::new(generation.prompt_tokens(), generation.completion_tokens());
            yield sse::event(&answer.part(Vec::new(), Some(usage)));
        }
        yield sse::DONE.to_owned();
    }
}

/// What all parts of an answer repeat.
#[derive(Clone, Debug)]
struct Answer {
    id: String,
    created: i64,
    service: Arc<Service>,
    logprobs: bool,
}

impl Answer {
    fn whole(&self, samples: Vec<Sample>, usage: Usage) -> ChatCompletion {
        let fingerprint = samples.first().map(|sample| sample.versions.ended.to_string());
        let choice = |(index, sample): (usize, Sample)| ChatChoice {
            index,
            logprobs: self.log_probabilities(&sample.tokens),
            message: AnswerMessage {
                role: "assistant",
                content: sample.text,
                refusal: None,
            },
            finish_reason: sample.finish.map(Finish::from),
            weight_version: sample.versions,
        };
        ChatCompletion {
            id: self.id.clone(),
            object: "chat.completion",
            created: self.created,
            model: self.service.name.clone(),
            system_fingerprint: fingerprint,
            choices: samples.into_iter().enumerate().map(choice).collect(),
            usage,
        }
    }

    /// The first piece of a choice.
    fn greeting(&self, index: usize) -> ChatChunk {
        let delta = ChunkDelta {
            role: Some("assistant"),
            content: String::new(),
        };
        let choice = ChunkChoice {
            index,
            delta,
            finish_reason: None,
            logprobs: None,
            weight_version: None,
        };
        self.part(vec![choice], None)
    }

    /// None where there is nothing to tell: the token completed no character.
    fn chunk(&self, delta: Delta) -> Option<ChatChunk> {
        if delta.text.is_empty() && delta.finish.is_none() && !self.logprobs {
            return None;
        }
        let choice = ChunkChoice {
            index: delta.sample,
            logprobs: self.log_probabilities(std::slice::from_ref(&delta.token)),
            delta: ChunkDelta {
                role: None,
                content: delta.text,
            },
            finish_reason: delta.finish.map(Finish::from),
            weight_version: delta.finish.map(|_| delta.versions),
        };
        Some(self.part(vec![choice], None))
    }

    fn part(&self, choices: Vec<ChunkChoice>, usage: Option<Usage>) -> ChatChunk {
        ChatChunk {
            id: self.id.clone(),
            object: "chat.completion.chunk",
            created: self.created,
            model: self.service.name.clone(),
            choices,
            usage,
        }
    }

    fn log_probabilities(&self, tokens: &[flotilla_engine::Token]) -> Option<ChatLogprobs> {
        let tokenizer = self.service.processor().tokenizer();
        self.logprobs.then(|| ChatLogprobs::new(tokens, tokenizer))
    }
}

/// Token counts of an answer.
pub fn usage(prompt_tokens: usize, completion_tokens: usize) -> serde_json::Value {
    serde_json::json!(Usage::new(prompt_tokens, completion_tokens))
}
