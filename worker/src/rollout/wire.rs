//! The bodies of `POST /v1/rollouts` and `PUT /v1/weights`.

use std::collections::BTreeMap;

use flotilla_engine::{Completion, FinishReason, Group, Token};
use flotilla_model::Layout;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// Media type of a stream of [`Line`]s, one JSON value each.
pub const NDJSON: &str = "application/x-ndjson";
/// Media type of weights: one safetensors file.
pub const SAFETENSORS: &str = "application/octet-stream";

/// Query of `PUT /v1/weights`.
#[derive(Clone, Debug, Deserialize, Eq, IntoParams, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct WeightsQuery {
    /// Names the weights; every answer that was drawn with them repeats it.
    #[param(min_length = 1, max_length = 253)]
    pub version: String,
}

/// Answer of `PUT /v1/weights`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct WeightsAnswer {
    /// The version that is loaded now.
    pub weight_version: String,
}

/// Body of `POST /v1/rollouts`: prompts that are sampled together.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Piece {
    /// The version to sample with; a pod that has loaded another one answers 409.
    pub weight_version: String,
    /// Completions of each prompt.
    pub n: usize,
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f64,
    /// Nucleus.
    pub top_p: f64,
    /// Longest completion, in tokens.
    pub max_tokens: usize,
    /// The prompts.
    pub prompts: Vec<PiecePrompt>,
    /// Pictures by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub images: BTreeMap<String, PieceImage>,
}

/// A picture of a [`Piece`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PieceImage {
    /// Base64 of a PNG, JPEG or other file; the pod computes its features, all of a piece together.
    Encoded(String),
    /// What the vision tower made of it. A learner sends these: the last bits of features depend on how many pictures went
    /// through the tower together.
    Features(PieceFeatures),
}

/// Features of a picture.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PieceFeatures {
    /// What the picture became: `{"patches": {"grid": [1, 4, 6], "time_step": 0.0, "video": false}}` and the like.
    pub layout: Layout,
    /// Base64 of little-endian f32, `(tokens, hidden_size)`.
    pub values: String,
}

/// A prompt of a [`Piece`].
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PiecePrompt {
    /// Token ids, the placeholders of pictures expanded.
    pub token_ids: Vec<u32>,
    /// Names of its pictures in the order of their placeholders.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<String>,
    /// Seed of its draws; sample `i` uses stream `i` of it.
    pub seed: u64,
}

/// A line of the answer. Groups come as they finish; a stream without [`Line::Done`] at its end was cut off.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// All completions of one prompt.
    Group(GroupLine),
    /// Every group was sent.
    Done {
        /// How many.
        groups: usize,
    },
    /// The model failed on the piece.
    Error {
        /// What happened.
        message: String,
        /// Another pod would fail in the same way.
        permanent: bool,
    },
}

/// The completions of one prompt.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct GroupLine {
    /// Index of the prompt.
    pub index: usize,
    /// The version that drew them, from their first to their last token.
    pub weight_version: String,
    /// By sample.
    pub completions: Vec<Sample>,
}

/// One completion.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Sample {
    /// Token ids; a token that ended the sample is the last.
    pub token_ids: Vec<u32>,
    /// Log-probability of each token under the tempered distribution: f32 values, which survive the way through JSON.
    pub logprobs: Vec<f64>,
    /// Log-probability of each token under the model's own distribution, without temperature: what a learner computes again
    /// to check a pod.
    pub model_logprobs: Vec<f64>,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

impl From<Completion> for Sample {
    fn from(completion: Completion) -> Self {
        let model = |token: &Token| f64::from(token.model_log_probability);
        Self {
            token_ids: completion.ids(),
            logprobs: completion.log_probabilities().into_iter().map(f64::from).collect(),
            model_logprobs: completion.tokens.iter().map(model).collect(),
            finish_reason: completion.finish,
        }
    }
}

impl From<Sample> for Completion {
    fn from(sample: Sample) -> Self {
        let token = |((id, drawn), model): ((u32, f64), f64)| Token {
            id,
            log_probability: drawn as f32,
            model_log_probability: model as f32,
            ..Token::default()
        };
        let drawn = sample.token_ids.into_iter().zip(sample.logprobs);
        Self {
            tokens: drawn.zip(sample.model_logprobs).map(token).collect(),
            finish: sample.finish_reason,
        }
    }
}

impl GroupLine {
    /// The completions as the engine gives them; None where a token has no log-probability.
    pub fn group(self) -> Option<Group> {
        let whole = |sample: &Sample| {
            let tokens = sample.token_ids.len();
            tokens > 0 && sample.logprobs.len() == tokens && sample.model_logprobs.len() == tokens
        };
        self.completions.iter().all(whole).then(|| Group {
            completions: self.completions.into_iter().map(Completion::from).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_log_probability_survives_json_bit_by_bit(bits: u32) {
            let value = f32::from_bits(bits);
            prop_assume!(value.is_finite());
            let completion = Completion {
                tokens: vec![Token { id: 7, log_probability: value, ..Token::default() }],
                finish: FinishReason::Stop,
            };
            let line = GroupLine { index: 0, weight_version: "v".into(), completions: vec![completion.into()] };
            let text = serde_json::to_string(&Line::Group(line)).expect("serializes");
            let Line::Group(read) = serde_json::from_str(&text).expect("parses") else {
                panic!("another line");
            };
            let group = read.group().expect("whole");
            prop_assert_eq!(group.completions[0].log_probabilities()[0].to_bits(), bits);
        }
    }

    #[test]
    fn a_sample_without_a_log_probability_is_no_group() {
        let sample = Sample {
            token_ids: vec![1, 2],
            logprobs: vec![-0.5],
            model_logprobs: vec![-0.5],
            finish_reason: FinishReason::Length,
        };
        let line = GroupLine {
            index: 0,
            weight_version: "v".into(),
            completions: vec![sample],
        };
        assert_eq!(line.group(), None);
    }
}
