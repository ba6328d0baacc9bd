//! What a completion may be.

use std::sync::Arc;

/// Narrows the tokens that may be drawn. Cloning shares what was compiled.
#[derive(Clone, Debug)]
pub enum Constraint {
    /// Sample `i` is exactly the tokens `i`: no draw, but the log-probabilities of an answer that is given. A request with
    /// one sample for each answer of a set gives the model's distribution over the set, and all of them share the prompt.
    Forced(Arc<[Vec<u32>]>),
}

impl Constraint {
    /// The tokens that a sample is forced to be.
    pub fn forced(&self, sample: usize) -> Option<&[u32]> {
        match self {
            Self::Forced(answers) => answers.get(sample).map(Vec::as_slice),
        }
    }
}
