//! `POST /v1/chat/completions`: text and pictures in, completions out, whole or as a stream.

use std::{convert::Infallible, sync::Arc};

use axum::{
    Json,
    extract::State,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use flotilla_api::role::Purpose;
use flotilla_engine::{FinishReason, Request, Token};
use serde_json::{Value, json};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    api::{Api, Body, check_model},
    chat_request::ChatRequest,
    error::ApiError,
};
use crate::service::{
    Service,
    generation::{Delta, Generation, Sample},
};

/// The endpoint.
pub fn router(state: Api) -> OpenApiRouter {
    OpenApiRouter::new().routes(routes!(chat)).with_state(state)
}

/// What all parts of an answer repeat.
#[derive(Clone, Debug)]
struct Answer {
    id: String,
    created: i64,
    service: Arc<Service>,
    logprobs: bool,
}

/// Answers a conversation, whole or as a stream of server-sent events.
#[utoipa::path(post, path = "/v1/chat/completions", tag = "policy", responses((status = 200, description = "Completions")))]
async fn chat(State(api): State<Api>, Body(request): Body<ChatRequest>) -> Result<Response, ApiError> {
    let service = api.service(Purpose::Policy)?;
    answer(service, request).await.map_err(|error| api.refuse(error))
}

async fn answer(service: Arc<Service>, request: ChatRequest) -> Result<Response, ApiError> {
    check_model(&service, request.model.as_deref())?;
    let stream = request.stream;
    let include_usage = request.stream_options.unwrap_or_default().include_usage;
    let answer = Answer {
        id: format!("chatcmpl-{}", uuid::Uuid::new_v4().simple()),
        created: jiff::Timestamp::now().as_second(),
        service: service.clone(),
        logprobs: request.logprobs,
    };
    let asked = request.into_asked()?;
    let (prompt, max_tokens) = service.prepare(asked.conversation, asked.max_tokens).await?;
    let mut sampling = asked.sampling;
    sampling.max_tokens = max_tokens;
    sampling.stop_ids = service.processor().tokenizer().stop_ids().to_vec();
    let generation = service.generate(Request::new(prompt, asked.n, sampling), &asked.stops)?;
    if stream {
        Ok(streamed(answer, generation, include_usage).into_response())
    } else {
        let prompt_tokens = generation.prompt_tokens();
        let (samples, completion_tokens) = generation.collect().await?;
        Ok(Json(answer.whole(&samples, prompt_tokens, completion_tokens)).into_response())
    }
}

fn streamed(answer: Answer, mut generation: Generation, include_usage: bool) -> impl IntoResponse {
    let events = async_stream::stream! {
        let mut greeted = std::collections::HashSet::new();
        while let Some(delta) = generation.next().await {
            match delta {
                Ok(delta) => {
                    let first = greeted.insert(delta.sample);
                    if let Some(chunk) = answer.chunk(&delta, first) {
                        yield event(&chunk);
                    }
                }
                Err(error) => {
                    yield event(&ApiError::from(error).json());
                    return;
                }
            }
        }
        if include_usage {
            yield event(&answer.usage_chunk(&generation));
        }
        yield Ok(Event::default().data("[DONE]"));
    };
    Sse::new(events).keep_alive(KeepAlive::default())
}

#[allow(clippy::unnecessary_wraps, reason = "the stream's items are results")]
fn event(data: &Value) -> Result<Event, Infallible> {
    Ok(Event::default().data(data.to_string()))
}

impl Answer {
    fn whole(&self, samples: &[Sample], prompt_tokens: usize, completion_tokens: usize) -> Value {
        let choices: Vec<Value> = samples
            .iter()
            .enumerate()
            .map(|(index, sample)| {
                json!({
                    "index": index,
                    "message": {"role": "assistant", "content": sample.text},
                    "finish_reason": reason(sample.finish),
                    "logprobs": self.log_probabilities(&sample.tokens),
                })
            })
            .collect();
        json!({
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.service.name,
            "choices": choices,
            "usage": usage(prompt_tokens, completion_tokens),
        })
    }

    /// None where there is nothing to tell: the token completed no character.
    fn chunk(&self, delta: &Delta, first: bool) -> Option<Value> {
        if delta.text.is_empty() && delta.finish.is_none() && !first && !self.logprobs {
            return None;
        }
        let mut content = json!({"content": delta.text});
        if first {
            content["role"] = json!("assistant");
        }
        let choice = json!({
            "index": delta.sample,
            "delta": content,
            "finish_reason": reason(delta.finish),
            "logprobs": self.log_probabilities(std::slice::from_ref(&delta.token)),
        });
        Some(self.part(&json!([choice]), &Value::Null))
    }

    fn usage_chunk(&self, generation: &Generation) -> Value {
        let usage = usage(generation.prompt_tokens(), generation.completion_tokens());
        self.part(&json!([]), &usage)
    }

    fn part(&self, choices: &Value, usage: &Value) -> Value {
        json!({
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.service.name,
            "choices": choices,
            "usage": usage,
        })
    }

    fn log_probabilities(&self, tokens: &[Token]) -> Option<Value> {
        let tokenizer = self.service.processor().tokenizer();
        self.logprobs.then(|| {
            let content = tokens.iter().map(|token| {
                let text = tokenizer.decode_with_special(&[token.id]).unwrap_or_default();
                json!({"token": text, "logprob": token.log_probability, "bytes": text.as_bytes(), "top_logprobs": []})
            });
            json!({"content": content.collect::<Vec<_>>()})
        })
    }
}

/// Token counts of an answer.
pub fn usage(prompt_tokens: usize, completion_tokens: usize) -> Value {
    json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    })
}

fn reason(finish: Option<FinishReason>) -> Option<&'static str> {
    finish.map(|finish| match finish {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    })
}
