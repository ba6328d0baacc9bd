//! What a model must offer to be run by the engine, on whatever device.

use std::ops::Range;

use crate::{blocks::Block, request::Request};

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

/// The next tokens of one sequence: a part of its prompt, a token that was drawn, or both where it is computed again.
#[derive(Debug)]
pub struct Chunk<'a, P> {
    /// The prompt of the sequence.
    pub prompt: &'a P,
    /// Tokens that follow the prompt.
    pub drawn: &'a [u32],
    /// Tokens of prompt and drawn tokens whose keys and values are stored.
    pub stored: usize,
    /// Tokens to compute after them.
    pub tokens: usize,
    /// Blocks of the sequence in its order; they have room for the tokens.
    pub blocks: &'a [Block],
    /// Whether the logits after the last token are wanted.
    pub wanted: bool,
}

impl<P> Chunk<'_, P> {
    /// Indices of the tokens to compute.
    pub fn range(&self) -> Range<usize> {
        self.stored..self.stored + self.tokens
    }
}

/// How often features of pictures and videos were needed, and how often they were there.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct VisualCounts {
    /// Visuals that prompts needed the features of.
    pub queries: usize,
    /// Those whose features were cached.
    pub hits: usize,
}

/// A model with a pool of blocks for keys and values.
pub trait Runner {
    /// A prompt, ready to be computed.
    type Prompt;
    /// Blocks of keys and values.
    type Pool;

    /// Ids of a prompt's tokens, placeholders of visuals included.
    fn prompt_ids<'a>(&self, prompt: &'a Self::Prompt) -> &'a [u32];

    /// Tokens of a prompt.
    fn prompt_tokens(&self, prompt: &Self::Prompt) -> usize {
        self.prompt_ids(prompt).len()
    }

    /// Appends to `out` what the tokens in `range` of the prompt followed by `drawn` are: equal bytes after equal bytes must
    /// mean equal keys and values.
    fn content(
        &self,
        prompt: &Self::Prompt,
        drawn: &[u32],
        range: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), Cause>;

    /// A pool of `blocks` blocks of `block_size` tokens.
    fn pool(&self, blocks: usize, block_size: usize) -> Result<Self::Pool, Cause>;

    /// Copies whole blocks, from the first of each pair to the second, as if in order.
    fn copy(&mut self, pool: &mut Self::Pool, pairs: &[(Block, Block)]) -> Result<(), Cause>;

    /// Computes chunks of different sequences together and stores their keys and values. Gives one row of logits for each
    /// chunk that wants it, in their order.
    fn step(&mut self, pool: &mut Self::Pool, chunks: &[Chunk<'_, Self::Prompt>]) -> Result<Logits, Cause>;

    /// Forgets what was computed from the weights: they have changed.
    fn flush(&mut self) {}

    /// Counts since the beginning.
    fn visual_counts(&self) -> VisualCounts {
        VisualCounts::default()
    }
}

impl<R: Runner> Runner for &mut R {
    type Prompt = R::Prompt;
    type Pool = R::Pool;

    fn prompt_ids<'a>(&self, prompt: &'a Self::Prompt) -> &'a [u32] {
        (**self).prompt_ids(prompt)
    }

    fn prompt_tokens(&self, prompt: &Self::Prompt) -> usize {
        (**self).prompt_tokens(prompt)
    }

    fn content(
        &self,
        prompt: &Self::Prompt,
        drawn: &[u32],
        range: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), Cause> {
        (**self).content(prompt, drawn, range, out)
    }

    fn pool(&self, blocks: usize, block_size: usize) -> Result<Self::Pool, Cause> {
        (**self).pool(blocks, block_size)
    }

    fn copy(&mut self, pool: &mut Self::Pool, pairs: &[(Block, Block)]) -> Result<(), Cause> {
        (**self).copy(pool, pairs)
    }

    fn step(&mut self, pool: &mut Self::Pool, chunks: &[Chunk<'_, Self::Prompt>]) -> Result<Logits, Cause> {
        (**self).step(pool, chunks)
    }

    fn flush(&mut self) {
        (**self).flush();
    }

    fn visual_counts(&self) -> VisualCounts {
        (**self).visual_counts()
    }
}

/// A request for runner `R`.
pub type RequestFor<R> = Request<<R as Runner>::Prompt>;
