//! One sample on its way.

use std::sync::Arc;

use crate::{
    error::EngineError,
    request::{FinishReason, Sampling, Token},
    sampler::Sampler,
};

/// Number of a request within an engine.
pub type RequestId = u64;

/// One sample of a request.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// The request it belongs to.
    pub request: RequestId,
    /// Its index in the request.
    pub sample: usize,
    /// The caller has seen enough.
    pub ended: bool,
    sampling: Arc<Sampling>,
    sampler: Sampler,
    generated: usize,
    last: u32,
}

impl Sequence {
    /// Before its first token.
    pub fn new(request: RequestId, sample: usize, sampling: Arc<Sampling>) -> Self {
        let sampler = Sampler::new(sampling.seed, sample);
        Self {
            request,
            sample,
            ended: false,
            sampling,
            sampler,
            generated: 0,
            last: 0,
        }
    }

    /// The newest token, which the next decode step takes as its input.
    pub fn last(&self) -> u32 {
        self.last
    }

    /// Draws the next token; the reason is set if it is the last one.
    pub fn extend(&mut self, logits: &[f32]) -> Result<(Token, Option<FinishReason>), EngineError> {
        let token = self
            .sampler
            .draw(logits, &self.sampling)
            .ok_or(EngineError::NotFinite {
                sample: self.sample,
                tokens: self.generated,
            })?;
        self.generated += 1;
        self.last = token.id;
        let finish = if self.sampling.stop_ids.contains(&token.id) {
            Some(FinishReason::Stop)
        } else if self.generated >= self.sampling.max_tokens {
            Some(FinishReason::Length)
        } else {
            None
        };
        Ok((token, finish))
    }
}
