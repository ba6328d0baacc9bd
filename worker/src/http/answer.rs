//! What the answers of chat and completions have in common.

use flotilla_engine::{FinishReason, Token};
use flotilla_model::Tokenizer;
use serde::Serialize;
use utoipa::ToSchema;

/// The log-probability that stands for an impossible token, since JSON has no infinity; OpenAI's servers send the same.
const IMPOSSIBLE: f32 = -9999.0;

/// Token counts of an answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, ToSchema)]
pub struct Usage {
    /// Tokens of the prompts, each counted once.
    pub prompt_tokens: usize,
    /// Tokens drawn, over all choices.
    pub completion_tokens: usize,
    /// Both together.
    pub total_tokens: usize,
}

impl Usage {
    /// Of a prompt and its completions.
    pub fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
        }
    }
}

/// Why a choice ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// A stop token or stop string was met, or what the text must be is complete.
    Stop,
    /// `max_tokens` were drawn.
    Length,
}

impl From<FinishReason> for Finish {
    fn from(reason: FinishReason) -> Self {
        match reason {
            FinishReason::Stop => Self::Stop,
            FinishReason::Length => Self::Length,
        }
    }
}

/// A log-probability as JSON can say it.
pub fn finite(log_probability: f32) -> f32 {
    log_probability.max(IMPOSSIBLE)
}

/// A token's text, a stop token as it is written, incomplete characters as U+FFFD; and its bytes.
pub fn spell(tokenizer: &Tokenizer, id: u32) -> (String, Vec<u8>) {
    let bytes = tokenizer.token_bytes(id).map(|token| token.bytes).unwrap_or_default();
    (String::from_utf8_lossy(&bytes).into_owned(), bytes)
}

/// Log-probabilities of the tokens of a chat choice.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct ChatLogprobs {
    /// One for each token, a stop token included.
    pub content: Vec<TokenLogprob>,
}

/// A drawn token.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct TokenLogprob {
    /// Its text; an incomplete character is U+FFFD.
    pub token: String,
    /// Its id; an extension.
    pub token_id: u32,
    /// Its natural log-probability under the model's own distribution: no temperature, bias, penalty or constraint.
    pub logprob: f32,
    /// Its log-probability under the distribution it was drawn from, before `top_k`, `top_p` and `min_p` cut that; an extension.
    pub sampling_logprob: f32,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The most likely tokens at its place, most likely first.
    pub top_logprobs: Vec<TopLogprob>,
}

/// A token that might have been drawn.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct TopLogprob {
    /// Its text.
    pub token: String,
    /// Its id; an extension.
    pub token_id: u32,
    /// Its log-probability under the model's own distribution.
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl ChatLogprobs {
    /// Of these tokens.
    pub fn new(tokens: &[Token], tokenizer: &Tokenizer) -> Self {
        let top = |(id, logprob): &(u32, f32)| {
            let (token, bytes) = spell(tokenizer, *id);
            TopLogprob {
                token,
                token_id: *id,
                logprob: finite(*logprob),
                bytes,
            }
        };
        let of = |token: &Token| {
            let (text, bytes) = spell(tokenizer, token.id);
            TokenLogprob {
                token: text,
                token_id: token.id,
                logprob: finite(token.model_log_probability),
                sampling_logprob: finite(token.log_probability),
                bytes,
                top_logprobs: token.top.iter().map(top).collect(),
            }
        };
        Self {
            content: tokens.iter().map(of).collect(),
        }
    }
}
