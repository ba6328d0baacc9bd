//! What is asked for and what comes back.

use std::{sync::Arc, time::Instant};

use serde::{Deserialize, Serialize};

use crate::{constraint::Constraint, error::EngineError};

/// How tokens are drawn. The order of its steps, each on what the one before left: bias, penalties, constraint, temperature,
/// `top_k`, `top_p`, `min_p`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Draw from the smallest set of most likely tokens whose probability reaches this share (1: from all).
    pub top_p: f32,
    /// Draw from so many most likely tokens (0: from all).
    pub top_k: usize,
    /// Draw from tokens at least this share as likely as the most likely one (0: from all).
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens of the prompt and of the completion (1: none).
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens of the completion (0: none).
    pub presence_penalty: f32,
    /// Subtracted from the logits of tokens of the completion for each time that they were drawn (0: none).
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Tokens after which a sample ends as [`FinishReason::Length`].
    pub max_tokens: usize,
    /// Tokens before which no stop token is drawn.
    pub min_tokens: usize,
    /// Seed of every draw; sample `i` uses stream `i` of it.
    pub seed: u64,
    /// Tokens that end a sample. The token that ended it is the last of its tokens.
    pub stop_ids: Vec<u32>,
    /// Tokens whose log-probability (of the untempered distribution) is recorded at each position, drawn or not: the
    /// log-odds of two verdicts are read from them.
    pub watched_ids: Vec<u32>,
    /// Most likely tokens that are recorded at each position.
    pub top_log_probabilities: usize,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            max_tokens: 16,
            min_tokens: 0,
            seed: 0,
            stop_ids: Vec::new(),
            watched_ids: Vec::new(),
            top_log_probabilities: 0,
        }
    }
}

/// Most likely tokens that may be recorded at a position.
pub const MAX_TOP: usize = 256;

impl Sampling {
    /// Refuses what no distribution can be drawn from.
    pub fn validate(&self) -> Result<(), EngineError> {
        match self.fault() {
            Some((_, fault)) => Err(EngineError::InvalidRequest(fault)),
            None => Ok(()),
        }
    }

    /// The first field that is wrong, and what is wrong with it.
    pub fn fault(&self) -> Option<(&'static str, String)> {
        let number =
            |field, value: f32, range: &str, valid: bool| (field, valid, format!("{field} is {value}, not {range}"));
        let wrong_bias = self
            .logit_bias
            .iter()
            .find(|(_, bias)| bias.is_nan() || *bias == f32::INFINITY);
        let checks = [
            number(
                "temperature",
                self.temperature,
                "a number of at least 0",
                self.temperature >= 0.0 && self.temperature.is_finite(),
            ),
            number(
                "top_p",
                self.top_p,
                "above 0 and at most 1",
                self.top_p > 0.0 && self.top_p <= 1.0,
            ),
            number("min_p", self.min_p, "0 to 1", (0.0..=1.0).contains(&self.min_p)),
            number(
                "repetition_penalty",
                self.repetition_penalty,
                "a number above 0",
                self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite(),
            ),
            number(
                "presence_penalty",
                self.presence_penalty,
                "a number",
                self.presence_penalty.is_finite(),
            ),
            number(
                "frequency_penalty",
                self.frequency_penalty,
                "a number",
                self.frequency_penalty.is_finite(),
            ),
            (
                "logit_bias",
                wrong_bias.is_none(),
                wrong_bias.map_or_else(String::new, |(id, bias)| {
                    format!("logit_bias of token {id} is {bias}, not a number")
                }),
            ),
            (
                "max_tokens",
                self.max_tokens > 0,
                "max_tokens is 0, not at least 1".to_owned(),
            ),
            (
                "min_tokens",
                self.min_tokens <= self.max_tokens,
                format!("min_tokens is {}, max_tokens only {}", self.min_tokens, self.max_tokens),
            ),
            (
                "top_log_probabilities",
                self.top_log_probabilities <= MAX_TOP,
                format!(
                    "top_log_probabilities is {}, not 0 to {MAX_TOP}",
                    self.top_log_probabilities
                ),
            ),
        ];
        let wrong = checks.into_iter().find(|(_, valid, _)| !valid);
        wrong.map(|(field, _, fault)| (field, fault))
    }

    /// Whether tokens that were there before are drawn less or more often.
    pub fn penalizes_repetition(&self) -> bool {
        self.repetition_penalty != 1.0
    }

    /// Whether a penalty counts the tokens of the completion.
    pub fn counts_tokens(&self) -> bool {
        self.penalizes_repetition() || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// `n` samples over one prompt; the prompt is computed once.
#[derive(Clone, Debug)]
pub struct Request<P> {
    /// The prompt, in the form that the [`Runner`](crate::runner::Runner) takes.
    pub prompt: Arc<P>,
    /// Samples.
    pub n: usize,
    /// How their tokens are drawn.
    pub sampling: Sampling,
    /// What a completion may be.
    pub constraint: Option<Constraint>,
    /// When the request fails with [`EngineError::Deadline`], finished or not.
    pub deadline: Option<Instant>,
}

impl<P> Request<P> {
    /// Without constraint and deadline.
    pub fn new(prompt: impl Into<Arc<P>>, n: usize, sampling: Sampling) -> Self {
        Self {
            prompt: prompt.into(),
            n,
            sampling,
            constraint: None,
            deadline: None,
        }
    }
}

/// Why a sample ended.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// A stop token was drawn, or what the constraint allows is complete.
    Stop,
    /// `max_tokens` were drawn.
    Length,
}

/// One drawn token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Its log-probability under the tempered distribution (under the untempered one at temperature 0), before `top_k`,
    /// `top_p` and `min_p` cut it.
    pub log_probability: f32,
    /// Its log-probability under the model's own distribution: no bias, penalty, constraint or temperature.
    pub model_log_probability: f32,
    /// Log-probabilities of [`Sampling::watched_ids`], in their order, under the model's own distribution.
    pub watched: Vec<f32>,
    /// The [`Sampling::top_log_probabilities`] most likely tokens under the model's own distribution, most likely first.
    pub top: Vec<(u32, f32)>,
}

/// One finished sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// Tokens in order; a stop token that ended the sample is the last.
    pub tokens: Vec<Token>,
    /// Why the sample ended.
    pub finish: FinishReason,
}

impl Completion {
    /// Ids of the tokens.
    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }

    /// Log-probabilities of the tokens, see [`Token::log_probability`].
    pub fn log_probabilities(&self) -> Vec<f32> {
        self.tokens.iter().map(|token| token.log_probability).collect()
    }
}

/// The `n` completions of one request, by sample index.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Group {
    /// Sample `i` is drawn from stream `i` of the request's seed.
    pub completions: Vec<Completion>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_said_with_its_field_and_value() {
        let of = |change: &dyn Fn(&mut Sampling)| {
            let mut sampling = Sampling::default();
            change(&mut sampling);
            sampling.fault()
        };
        assert_eq!(of(&|_| {}), None);
        let faults = [
            of(&|sampling| sampling.temperature = -1.0),
            of(&|sampling| sampling.top_p = 0.0),
            of(&|sampling| sampling.min_p = 1.5),
            of(&|sampling| sampling.repetition_penalty = 0.0),
            of(&|sampling| sampling.presence_penalty = f32::NAN),
            of(&|sampling| sampling.frequency_penalty = f32::INFINITY),
            of(&|sampling| sampling.logit_bias = vec![(5, f32::NAN)]),
            of(&|sampling| sampling.max_tokens = 0),
            of(&|sampling| sampling.min_tokens = 17),
            of(&|sampling| sampling.top_log_probabilities = 257),
        ];
        let values = ["-1", "0", "1.5", "0", "NaN", "inf", "NaN", "0", "17", "257"];
        for (fault, value) in faults.into_iter().zip(values) {
            let (field, message) = fault.expect("refused");
            assert!(message.starts_with(field) && message.contains(value), "{message}");
        }
    }
}
