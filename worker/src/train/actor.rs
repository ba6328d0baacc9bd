//! The model that a run trains, wherever it is computed, and what a step asks of it.
//!
//! Two hold to this: [`super::autograd`] by candle's tensors, on the CPU or a GPU, and `super::packed` by the kernels of
//! `flotilla-device` over one packed copy of the weights that the engine reads and the learner changes.

use std::{fmt, path::Path};

use flotilla_engine::Completion;
use flotilla_grpo::{
    adamw::Update,
    policy::{PolicyLoss, PolicyStatistics},
};
use serde::{Deserialize, Serialize};

use super::{error::TrainError, examples::Example, fleet::Fleet};

/// How completions are drawn.
#[derive(Clone, Copy, Debug)]
pub struct Draw {
    /// Completions of each prompt.
    pub n: usize,
    /// 0: the most likely token.
    pub temperature: f64,
    /// Nucleus.
    pub top_p: f64,
    /// Longest completion.
    pub max_tokens: usize,
}

/// Where and until when completions are drawn.
#[derive(Clone, Copy)]
pub struct Turn<'a> {
    /// Pods that draw; None: this process does.
    pub fleet: Option<&'a Fleet>,
    /// Step after which the weights were made.
    pub step: u32,
    /// Asked between two tokens; once it says yes drawing ends with [`TrainError::Cancelled`].
    pub cancelled: &'a (dyn Fn() -> bool + Sync),
}

impl fmt::Debug for Turn<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Turn").field("step", &self.step).finish_non_exhaustive()
    }
}

/// A prompt and one completion of it.
#[derive(Clone, Copy, Debug)]
pub struct Scored<'a> {
    /// The prompt.
    pub example: &'a Example,
    /// The completion's tokens, at least one.
    pub completion: &'a [u32],
}

impl Scored<'_> {
    /// Tokens of prompt and completion.
    pub fn tokens(&self) -> usize {
        self.example.prompt.ids.len() + self.completion.len()
    }
}

/// A sample as the policy loss sees it. Slices have a number for each token of the completion.
#[derive(Clone, Copy, Debug)]
pub struct PolicyRow<'a> {
    /// Prompt and completion.
    pub scored: Scored<'a>,
    /// Log-probabilities that the sampler told.
    pub drawn: &'a [f32],
    /// Log-probabilities under the weights that the step began with; None where the weights still are those: then what the
    /// update itself computes serves.
    pub old: Option<&'a [f32]>,
    /// Log-probabilities under the frozen reference; None leaves the KL term out.
    pub reference: Option<&'a [f32]>,
    /// Advantage.
    pub advantage: f32,
    /// Weight of each of its tokens.
    pub weight: f32,
}

/// The loss of a policy update.
#[derive(Clone, Copy, Debug)]
pub struct PolicyObjective {
    /// Its formula.
    pub loss: PolicyLoss,
    /// Temperature of the distribution that log-probabilities are taken of.
    pub temperature: f64,
}

/// How far the sampler's log-probabilities are from those that the learner computes. Parts add up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Apart {
    /// The largest difference of a token.
    pub largest: f64,
    /// Sum of all differences.
    pub sum: f64,
    /// Tokens.
    pub tokens: usize,
}

impl Apart {
    /// Of one sample.
    pub fn new(drawn: &[f32], learned: &[f32]) -> Self {
        let differences = drawn.iter().zip(learned).map(|(a, b)| f64::from((a - b).abs()));
        differences.fold(Self::default(), |sum, difference| Self {
            largest: sum.largest.max(difference),
            sum: sum.sum + difference,
            tokens: sum.tokens + 1,
        })
    }

    /// The mean difference of a token.
    pub fn mean(&self) -> f64 {
        self.sum / self.tokens.max(1) as f64
    }
}

impl std::ops::AddAssign for Apart {
    fn add_assign(&mut self, other: Self) {
        self.largest = self.largest.max(other.largest);
        self.sum += other.sum;
        self.tokens += other.tokens;
    }
}

/// What a policy update has done.
#[derive(Clone, Copy, Debug)]
pub struct Learned {
    /// The optimiser's part.
    pub update: Update,
    /// Means over the tokens.
    pub statistics: PolicyStatistics,
    /// Of sampler and learner.
    pub apart: Apart,
}

/// Says that an update has changed nothing.
pub fn tell_skipped(update: &Update) {
    if !update.applied {
        tracing::warn!(
            grad_norm = update.grad_norm,
            "update skipped: the gradient is not finite"
        );
    }
}

/// How a checkpoint holds the optimiser's moments: who wrote them can go on with them.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Moments {
    /// In f32, by the names of the parameters.
    #[default]
    ByParameter,
    /// In f32, packed as on the GPU.
    PackedF32,
    /// In bf16, packed.
    PackedBf16,
    /// In 8 bits with scales, packed.
    Packed8Bit,
}

/// What an actor has written of its optimiser.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Saved {
    /// Updates that the moments have seen.
    pub updates: u64,
    /// Their form.
    pub moments: Moments,
}

/// The model that a run trains.
pub trait Actor: fmt::Debug {
    /// Completions of each prompt, in order, drawn with one seed for each.
    fn sample(
        &mut self,
        prompts: &[&Example],
        draw: Draw,
        seeds: &[u64],
        turn: Turn<'_>,
    ) -> Result<Vec<Vec<Completion>>, TrainError>;

    /// Log-probabilities of completions under the frozen initial weights.
    fn score_by_reference(&mut self, rows: &[Scored<'_>], temperature: f64) -> Result<Vec<Vec<f32>>, TrainError>;

    /// Whether the sampler rounds more than the learner, so that its log-probabilities are not good enough as old ones.
    fn rescores(&self) -> bool;

    /// Log-probabilities of completions under the weights as they are.
    fn score(&mut self, rows: &[Scored<'_>], temperature: f64) -> Result<Vec<Vec<f32>>, TrainError>;

    /// One update by the policy loss over all rows, at least one.
    fn learn(&mut self, rows: &[PolicyRow<'_>], objective: PolicyObjective, rate: f64) -> Result<Learned, TrainError>;

    /// One update by the cross-entropy of the completions, each with the weight of its tokens; also returns the loss.
    fn imitate(&mut self, rows: &[(Scored<'_>, f32)], rate: f64) -> Result<(Update, f64), TrainError>;

    /// Writes the weights into a checkpoint's directory, and the optimiser's moments into one for the trainer alone.
    fn save(&mut self, weights: &Path, trainer: &Path) -> Result<Saved, TrainError>;

    /// Gauges of the run so far, such as memory.
    fn gauges(&self) -> Vec<(&'static str, f64)> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_of_parts_add_up_to_those_of_the_whole() {
        let (drawn, learned) = ([-1.0, -2.0, -0.5], [-1.25, -2.0, -1.0]);
        let whole = Apart::new(&drawn, &learned);
        assert_eq!((whole.largest, whole.mean(), whole.tokens), (0.5, 0.25, 3));
        let mut sum = Apart::new(&drawn[..1], &learned[..1]);
        sum += Apart::new(&drawn[1..], &learned[1..]);
        assert_eq!(sum, whole);
        assert_eq!(Apart::default().mean(), 0.0);
    }
}
