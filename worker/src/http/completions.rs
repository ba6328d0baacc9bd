//! `POST /v1/completions`: prompts as they are, without a conversation around them.

use std::{collections::BTreeMap, pin::Pin, sync::Arc};

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use flotilla_api::role::Purpose;
use flotilla_engine::Token;
use flotilla_model::Tokenizer;
use futures::{Stream, StreamExt as _, stream::select_all};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    answer::{self, Finish, Usage, finite},
    api::{Api, Body, check_model},
    chat_request::MAX_TOP_LOGPROBS,
    error::{ApiError, ErrorBody},
    sampling_fields::{MAX_N, SamplingFields},
    sse::{self, ServerSentEvent},
};
use crate::service::{
    Service, ServiceError,
    generation::{Delta, Generation, Versions},
    raw_prompt::RawPrompt,
    wanted::Wanted,
};

/// Length of a completion of which the client says nothing, as OpenAI has it.
const MAX_TOKENS: usize = 16;

/// The endpoint.
pub fn router(state: Api) -> OpenApiRouter {
    OpenApiRouter::new().routes(routes!(completions)).with_state(state)
}

/// Prompts to be continued.
#[derive(Debug, Deserialize, ToSchema)]
pub struct CompletionRequest {
    /// Name of the served model; whatever is served if absent.
    pub model: Option<String>,
    /// One prompt or several.
    pub prompt: Prompts,
    /// Longest completion, in tokens; 16 if absent.
    #[schema(minimum = 1)]
    pub max_tokens: Option<usize>,
    /// Whether log-probabilities are told, with so many most likely tokens at each place.
    #[schema(minimum = 0, maximum = 20)]
    pub logprobs: Option<usize>,
    /// How tokens are drawn; `n` completions for each prompt.
    #[serde(flatten)]
    pub sampling: SamplingFields,
}

/// One prompt or several, as texts or token ids. Prompts times `n` are at most 128.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Prompts {
    /// A text.
    Text(String),
    /// Texts.
    Texts(Vec<String>),
    /// Token ids of one prompt.
    Ids(Vec<u32>),
    /// Token ids of several prompts.
    Several(Vec<Vec<u32>>),
}

impl Prompts {
    fn into_list(self) -> Vec<RawPrompt> {
        match self {
            Self::Text(text) => vec![RawPrompt::Text(text)],
            Self::Texts(texts) => texts.into_iter().map(RawPrompt::Text).collect(),
            Self::Ids(ids) => vec![RawPrompt::Ids(ids)],
            Self::Several(prompts) => prompts.into_iter().map(RawPrompt::Ids).collect(),
        }
    }
}

/// An answer to prompts, or a piece of it.
#[derive(Debug, Serialize, ToSchema)]
struct Completion {
    /// Names the answer.
    id: String,
    /// `text_completion`.
    #[schema(value_type = String)]
    object: &'static str,
    /// Seconds since 1970.
    created: i64,
    /// Name of the served model.
    model: String,
    /// `n` for each prompt, in the order of the prompts.
    choices: Vec<CompletionChoice>,
    /// Token counts; in a stream those of the last piece, if asked for.
    usage: Option<Usage>,
}

/// A completion, or a piece of it.
#[derive(Debug, Serialize, ToSchema)]
struct CompletionChoice {
    /// Number of the prompt times `n`, plus the number of the completion.
    index: usize,
    /// The text, without the prompt, stop token and stop string.
    text: String,
    /// Why it ended; null in all pieces but the last.
    finish_reason: Option<Finish>,
    /// If asked for.
    logprobs: Option<CompletionLogprobs>,
    /// Versions of the weights that drew it; an extension.
    weight_version: Versions,
}

/// Log-probabilities of tokens under the model's own distribution. The lists have one entry for each token.
#[derive(Debug, Default, Serialize, ToSchema)]
struct CompletionLogprobs {
    /// Texts; `bytes:\xe4\xb8` where a token is a part of a character.
    tokens: Vec<String>,
    /// Ids; an extension.
    token_ids: Vec<u32>,
    /// Natural log-probabilities.
    token_logprobs: Vec<f32>,
    /// The most likely tokens and, if it is none of them, the token itself.
    top_logprobs: Vec<BTreeMap<String, f32>>,
    /// Characters of the completion before the token's own text.
    text_offset: Vec<usize>,
}

/// Continues prompts.
///
/// The answer comes whole, or with `stream` as server-sent events: pieces as `data`, then `[DONE]`. An error on the way is an event
/// with `error`, and no `[DONE]` follows.
#[utoipa::path(
    post,
    path = "/v1/completions",
    tag = "policy",
    request_body = CompletionRequest,
    responses(
        (status = 200, description = "The completions, whole or as a stream", content(
            (Completion = "application/json"),
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
async fn completions(State(api): State<Api>, Body(request): Body<CompletionRequest>) -> Result<Response, ApiError> {
    let service = api.service(Purpose::Policy)?;
    answer(service, request).await.map_err(|error| api.refuse(error))
}

async fn answer(service: Arc<Service>, request: CompletionRequest) -> Result<Response, ApiError> {
    check_model(&service, request.model.as_deref())?;
    let top = request.logprobs.unwrap_or(0);
    if top > MAX_TOP_LOGPROBS {
        let message = format!("logprobs is {top}, not 0 to {MAX_TOP_LOGPROBS}");
        return Err(ApiError::invalid("logprobs", message));
    }
    let (streams, include_usage) = (request.sampling.streams(), request.sampling.streams_usage());
    let max_tokens = request.max_tokens.unwrap_or(MAX_TOKENS);
    let wanted = request.sampling.into_wanted(Some(max_tokens), top)?;
    let generations = begin(&service, request.prompt.into_list(), max_tokens, &wanted).await?;
    let prompt_tokens = generations.iter().map(Generation::prompt_tokens).sum();
    let answer = Answer {
        id: format!("cmpl-{}", uuid::Uuid::new_v4().simple()),
        created: jiff::Timestamp::now().as_second(),
        service,
        logprobs: request.logprobs.is_some(),
        offsets: vec![0; generations.len() * wanted.n],
        prompt_tokens,
        completion_tokens: 0,
    };
    let deltas = merged(generations, wanted.n);
    if streams {
        return Ok(sse::response(streamed(answer, deltas, include_usage)));
    }
    Ok(Json(answer.whole(deltas).await?).into_response())
}

/// Begins to draw after every prompt. Should one be refused, those before it are dropped and end.
async fn begin(
    service: &Arc<Service>,
    prompts: Vec<RawPrompt>,
    max_tokens: usize,
    wanted: &Wanted,
) -> Result<Vec<Generation>, ApiError> {
    let (count, n) = (prompts.len(), wanted.n);
    if !(1..=MAX_N).contains(&(count * n)) {
        let message = format!("{count} prompts with n = {n} are not 1 to {MAX_N} completions");
        return Err(ApiError::invalid("prompt", message));
    }
    let mut prepared = Vec::with_capacity(count);
    for prompt in prompts {
        prepared.push(service.prepare_raw(prompt, max_tokens).await?);
    }
    let mut generations = Vec::with_capacity(count);
    for prompt in prepared {
        generations.push(service.draw(prompt, max_tokens, wanted).await?);
    }
    Ok(generations)
}

type Deltas = Pin<Box<dyn Stream<Item = Result<Delta, ServiceError>> + Send>>;

/// The deltas of all prompts as they come, numbered by choice.
fn merged(generations: Vec<Generation>, n: usize) -> Deltas {
    let numbered = |(prompt, mut generation): (usize, Generation)| {
        let deltas = async_stream::stream! {
            while let Some(delta) = generation.next().await {
                yield delta.map(|delta| Delta { sample: prompt * n + delta.sample, ..delta });
            }
        };
        Box::pin(deltas) as Deltas
    };
    Box::pin(select_all(generations.into_iter().enumerate().map(numbered)))
}

fn streamed(mut answer: Answer, mut deltas: Deltas, include_usage: bool) -> impl Stream<Item = String> {
    async_stream::stream! {
        while let Some(delta) = deltas.next().await {
            match delta {
                Ok(delta) => {
                    let silent = delta.text.is_empty() && delta.finish.is_none() && !answer.logprobs;
                    let choice = answer.choice(delta);
                    if !silent {
                        yield sse::event(&answer.part(vec![choice], None));
                    }
                }
                Err(error) => {
                    yield sse::event(&ApiError::from(error).body());
                    return;
                }
            }
        }
        if include_usage {
            let usage = answer.usage();
            yield sse::event(&answer.part(Vec::new(), Some(usage)));
        }
        yield sse::DONE.to_owned();
    }
}

/// What all parts of an answer repeat, and how far its choices are.
#[derive(Debug)]
struct Answer {
    id: String,
    created: i64,
    service: Arc<Service>,
    logprobs: bool,
    /// Characters of each choice so far.
    offsets: Vec<usize>,
    prompt_tokens: usize,
    completion_tokens: usize,
}

impl Answer {
    /// One delta as a piece of its choice.
    fn choice(&mut self, delta: Delta) -> CompletionChoice {
        self.completion_tokens += 1;
        let mut logprobs = None;
        if self.logprobs {
            let offset = self.offsets.get(delta.sample).copied().unwrap_or(0);
            let mut told = CompletionLogprobs::default();
            told.push(&delta.token, offset, self.service.processor().tokenizer());
            logprobs = Some(told);
        }
        if let Some(offset) = self.offsets.get_mut(delta.sample) {
            *offset += delta.text.chars().count();
        }
        CompletionChoice {
            index: delta.sample,
            text: delta.text,
            finish_reason: delta.finish.map(Finish::from),
            logprobs,
            weight_version: delta.versions,
        }
    }

    async fn whole(mut self, mut deltas: Deltas) -> Result<Completion, ApiError> {
        let mut choices: Vec<Option<CompletionChoice>> = self.offsets.iter().map(|_| None).collect();
        while let Some(delta) = deltas.next().await {
            let piece = self.choice(delta?);
            if let Some(choice) = choices.get_mut(piece.index) {
                match choice {
                    Some(choice) => choice.append(piece),
                    None => *choice = Some(piece),
                }
            }
        }
        let usage = self.usage();
        Ok(self.part(choices.into_iter().flatten().collect(), Some(usage)))
    }

    fn usage(&self) -> Usage {
        Usage::new(self.prompt_tokens, self.completion_tokens)
    }

    fn part(&self, choices: Vec<CompletionChoice>, usage: Option<Usage>) -> Completion {
        Completion {
            id: self.id.clone(),
            object: "text_completion",
            created: self.created,
            model: self.service.name.clone(),
            choices,
            usage,
        }
    }
}

impl CompletionChoice {
    fn append(&mut self, piece: Self) {
        self.text.push_str(&piece.text);
        self.finish_reason = piece.finish_reason;
        self.weight_version = piece.weight_version;
        if let (Some(all), Some(more)) = (&mut self.logprobs, piece.logprobs) {
            all.tokens.extend(more.tokens);
            all.token_ids.extend(more.token_ids);
            all.token_logprobs.extend(more.token_logprobs);
            all.top_logprobs.extend(more.top_logprobs);
            all.text_offset.extend(more.text_offset);
        }
    }
}

impl CompletionLogprobs {
    fn push(&mut self, token: &Token, offset: usize, tokenizer: &Tokenizer) {
        let text = spell(tokenizer, token.id);
        let logprob = finite(token.model_log_probability);
        let top = token
            .top
            .iter()
            .map(|(id, logprob)| (spell(tokenizer, *id), finite(*logprob)));
        let mut top: BTreeMap<String, f32> = top.collect();
        if !token.top.is_empty() {
            top.entry(text.clone()).or_insert(logprob);
        }
        self.tokens.push(text);
        self.token_ids.push(token.id);
        self.token_logprobs.push(logprob);
        self.top_logprobs.push(top);
        self.text_offset.push(offset);
    }
}

/// A token's text, its bytes spelled out where they are none: what it may be confused with otherwise is another entry of a map.
fn spell(tokenizer: &Tokenizer, id: u32) -> String {
    let (_, bytes) = answer::spell(tokenizer, id);
    String::from_utf8(bytes).unwrap_or_else(|error| {
        let hex = error.as_bytes().iter().map(|byte| format!("\\x{byte:02x}"));
        format!("bytes:{}", hex.collect::<String>())
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn prompts(prompt: &Value) -> Result<Vec<RawPrompt>, serde_json::Error> {
        let request: CompletionRequest = serde_json::from_value(json!({"prompt": prompt}))?;
        Ok(request.prompt.into_list())
    }

    #[test]
    fn a_prompt_is_a_text_or_ids_or_a_list_of_them() {
        let text = |text: &str| RawPrompt::Text(text.to_owned());
        for (prompt, expected) in [
            (json!("a"), vec![text("a")]),
            (json!(["a", "b"]), vec![text("a"), text("b")]),
            (json!([1, 2]), vec![RawPrompt::Ids(vec![1, 2])]),
            (
                json!([[1], [2, 3]]),
                vec![RawPrompt::Ids(vec![1]), RawPrompt::Ids(vec![2, 3])],
            ),
        ] {
            assert_eq!(prompts(&prompt).expect("valid"), expected);
        }
        for prompt in [json!({"a": 1}), json!(["a", 1]), json!([-1]), json!(null)] {
            assert!(prompts(&prompt).is_err(), "{prompt}");
        }
    }
}
