//! A request that has not ended: its prompt and its samples.

use std::sync::Arc;

use crate::{
    blocks::Block,
    prefix::Key,
    recipe::Recipe,
    row::{Row, Ticket},
    sequence::{RequestId, Sequence},
    shared::SharedLogits,
};

/// A request that has not ended.
#[derive(Debug)]
pub struct Group {
    /// Its number.
    pub request: RequestId,
    /// How tokens are drawn.
    pub recipe: Arc<Recipe>,
    /// Samples.
    pub n: usize,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Keys of the full blocks of the prompt.
    pub keys: Vec<Key>,
    /// Virtual time at which it came.
    pub tag: u64,
    /// Samples that have not ended.
    pub unfinished: usize,
    /// Samples that hold nothing: no blocks and no token.
    pub unstarted: usize,
    /// Whether any sample has ever started.
    pub started: bool,
    /// How far the prompt is.
    pub prompt: PromptState,
}

/// How far the prompt of a group is.
#[derive(Debug)]
pub enum PromptState {
    /// The next sample that starts computes it.
    Open,
    /// This sample is computing it.
    Computing(usize),
    /// It is computed, and more samples may start from it.
    Kept(Kept),
}

/// A computed prompt.
#[derive(Debug)]
pub struct Kept {
    /// Its blocks, the last one perhaps not full.
    pub blocks: Vec<Block>,
    /// Logits after it.
    pub logits: Arc<SharedLogits>,
}

impl Group {
    /// Nothing of it has started.
    pub fn new(request: RequestId, n: usize, recipe: Arc<Recipe>, prompt_tokens: usize, keys: Vec<Key>) -> Self {
        Self {
            request,
            recipe,
            n,
            prompt_tokens,
            keys,
            tag: 0,
            unfinished: n,
            unstarted: n,
            started: false,
            prompt: PromptState::Open,
        }
    }

    /// The place of a sample in the queue.
    pub fn ticket(&self, sample: usize) -> Ticket {
        Ticket {
            tag: self.tag + sample as u64,
            request: self.request,
            sample,
        }
    }

    /// A sample before its first token.
    pub fn row(&self, sample: usize) -> Row {
        let sequence = Sequence::new(self.request, sample, self.recipe.clone());
        Row::new(sequence, self.prompt_tokens, self.keys.clone())
    }

    /// The computed prompt, while it is kept.
    pub fn kept(&self) -> Option<&Kept> {
        match &self.prompt {
            PromptState::Kept(kept) => Some(kept),
            PromptState::Open | PromptState::Computing(_) => None,
        }
    }

    /// A sample computes the prompt no more. False if it did not.
    pub fn leave_prompt(&mut self, sample: usize) -> bool {
        let computed = matches!(self.prompt, PromptState::Computing(by) if by == sample);
        if computed {
            self.prompt = PromptState::Open;
        }
        computed
    }

    /// Gives up the computed prompt; its blocks are the caller's to release.
    pub fn drop_kept(&mut self) -> Option<Vec<Block>> {
        match std::mem::replace(&mut self.prompt, PromptState::Open) {
            PromptState::Kept(kept) => Some(kept.blocks),
            other => {
                self.prompt = other;
                None
            }
        }
    }
}
