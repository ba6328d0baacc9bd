//! What the samples of a request share.

use crate::{constraint::Constraint, error::EngineError, request::Sampling};

/// How the samples of a request are drawn, checked.
#[derive(Clone, Debug)]
pub struct Recipe {
    sampling: Sampling,
    constraint: Option<Constraint>,
    /// The different ids of the prompt, rising; empty if no penalty counts them.
    prompt_ids: Vec<u32>,
}

impl Recipe {
    /// For `n` samples after a prompt of these ids. Refuses what cannot be drawn.
    pub fn new(
        sampling: &Sampling,
        constraint: Option<&Constraint>,
        n: usize,
        prompt_ids: &[u32],
    ) -> Result<Self, EngineError> {
        sampling.validate()?;
        if let Some(constraint) = constraint {
            constraint.validate(n, sampling)?;
        }
        let mut ids = Vec::new();
        if sampling.penalizes_repetition() {
            ids.extend_from_slice(prompt_ids);
            ids.sort_unstable();
            ids.dedup();
        }
        Ok(Self {
            sampling: sampling.clone(),
            constraint: constraint.cloned(),
            prompt_ids: ids,
        })
    }

    /// How tokens are drawn.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// What a completion may be.
    pub fn constraint(&self) -> Option<&Constraint> {
        self.constraint.as_ref()
    }

    /// The different ids of the prompt, rising, if a penalty counts them.
    pub fn prompt_ids(&self) -> &[u32] {
        &self.prompt_ids
    }
}
