//! A sample with its place in the queue and its blocks.

use std::sync::Arc;

use crate::{
    blocks::Block,
    prefix::Key,
    sequence::{RequestId, Sequence},
    shared::SharedLogits,
};

/// Place of a sample in the order of admission: the smallest is first.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Ticket {
    /// Virtual time at which its turn is.
    pub tag: u64,
    /// The request.
    pub request: RequestId,
    /// Index of the sample in its request.
    pub sample: usize,
}

/// A sample that runs, or that ran until its blocks were needed by others.
#[derive(Clone, Debug)]
pub struct Row {
    /// What draws its tokens.
    pub sequence: Sequence,
    /// Tokens of its prompt.
    pub prompt_tokens: usize,
    /// Tokens drawn so far. Keys and values of the last one are never stored.
    pub drawn: Vec<u32>,
    /// Blocks of prompt and drawn tokens in their order.
    pub blocks: Vec<Block>,
    /// Tokens whose keys and values are in the blocks.
    pub stored: usize,
    /// Keys of its full blocks, as far as they are known.
    pub keys: Vec<Key>,
    /// Blocks whose keys the prefix cache was told.
    pub remembered: usize,
    /// Logits after the prompt, where another sample has computed it and no token is drawn yet.
    pub first: Option<Arc<SharedLogits>>,
}

impl Row {
    /// Before its first token, without blocks.
    pub fn new(sequence: Sequence, prompt_tokens: usize, keys: Vec<Key>) -> Self {
        Self {
            sequence,
            prompt_tokens,
            drawn: Vec::new(),
            blocks: Vec::new(),
            stored: 0,
            keys,
            remembered: 0,
            first: None,
        }
    }

    /// Tokens of prompt and completion.
    pub fn tokens(&self) -> usize {
        self.prompt_tokens + self.drawn.len()
    }

    /// Tokens that must go through the model before the next one can be drawn.
    pub fn remaining(&self) -> usize {
        self.tokens() - self.stored
    }
}
