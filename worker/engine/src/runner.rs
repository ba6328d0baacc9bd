//! What a model must offer to be run by the engine.

use crate::request::Request;

/// Why a model call failed.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Logits of several rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Logits {
    /// Row after row, `[rows * vocabulary]`.
    pub values: Vec<f32>,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
}

impl Logits {
    /// The logits of one row, `[vocabulary]`; empty if there is no such row.
    pub fn row(&self, row: usize) -> &[f32] {
        let start = row * self.vocabulary;
        self.values.get(start..start + self.vocabulary).unwrap_or_default()
    }
}

/// A model with a cache of keys and values. Rows of a cache have their own lengths.
pub trait Runner {
    /// A prompt, ready to be computed.
    type Prompt;
    /// Keys and values of the rows that are being decoded.
    type Cache;

    /// Ids of a prompt's tokens, placeholders of visuals included.
    fn prompt_ids<'a>(&self, prompt: &'a Self::Prompt) -> &'a [u32];

    /// Tokens of a prompt.
    fn prompt_tokens(&self, prompt: &Self::Prompt) -> usize {
        self.prompt_ids(prompt).len()
    }

    /// Computes each prompt once and lays prompt `i` `repeat[i]` times into a new cache with room for `room` more tokens
    /// a row. The logits are those after the prompt, one row for each row of the cache.
    fn prefill(&self, prompts: &[&Self::Prompt], repeat: &[usize], room: usize)
    -> Result<(Self::Cache, Logits), Cause>;

    /// Appends one token to each row and gives the logits after it.
    fn decode(&self, cache: &mut Self::Cache, ids: &[u32]) -> Result<Logits, Cause>;

    /// Keeps the rows at these indices, in this order.
    fn keep(&self, cache: &mut Self::Cache, rows: &[usize]) -> Result<(), Cause>;

    /// Adds the rows of `other` after those of `cache`.
    fn append(&self, cache: &mut Self::Cache, other: Self::Cache) -> Result<(), Cause>;
}

impl<R: Runner> Runner for &R {
    type Prompt = R::Prompt;
    type Cache = R::Cache;

    fn prompt_ids<'a>(&self, prompt: &'a Self::Prompt) -> &'a [u32] {
        (**self).prompt_ids(prompt)
    }

    fn prompt_tokens(&self, prompt: &Self::Prompt) -> usize {
        (**self).prompt_tokens(prompt)
    }

    fn prefill(
        &self,
        prompts: &[&Self::Prompt],
        repeat: &[usize],
        room: usize,
    ) -> Result<(Self::Cache, Logits), Cause> {
        (**self).prefill(prompts, repeat, room)
    }

    fn decode(&self, cache: &mut Self::Cache, ids: &[u32]) -> Result<Logits, Cause> {
        (**self).decode(cache, ids)
    }

    fn keep(&self, cache: &mut Self::Cache, rows: &[usize]) -> Result<(), Cause> {
        (**self).keep(cache, rows)
    }

    fn append(&self, cache: &mut Self::Cache, other: Self::Cache) -> Result<(), Cause> {
        (**self).append(cache, other)
    }
}

/// A request for runner `R`.
pub type RequestFor<R> = Request<<R as Runner>::Prompt>;
