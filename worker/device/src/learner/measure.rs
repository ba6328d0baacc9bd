//! Seconds of a training step beside the floor.

use std::fmt;

use flotilla_kernels::{
    Float, Gpu,
    optimizer::{AdamW, Rounding},
};
use half::bf16;

use super::{Batch, Learner, Plan, Sequence, Settings, cross_entropy, micro_batches};
use crate::{error::DeviceError, shape::TextShape, weights::TextWeights};

/// Arithmetic of a dense bf16 product that NVIDIA states for an H100 or H200 (SXM).
pub const DATASHEET: f64 = 989e12;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Sizes of the model, whose weights are random.
    pub shape: TextShape,
    /// Sizes and formats of learning.
    pub settings: Settings,
    /// Lengths of the sequences of one update; every token but the first of each is scored.
    pub lengths: Vec<usize>,
    /// Updates that are measured, after one that is not.
    pub updates: usize,
}

/// Medians over updates.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Tokens of an update.
    pub tokens: usize,
    /// Micro-batches of an update.
    pub micro_batches: usize,
    /// Seconds of forward passes, log-probabilities on the host included.
    pub forward: f64,
    /// Seconds of backward passes.
    pub backward: f64,
    /// Seconds of the exchange of gradients with other GPUs.
    pub exchange: f64,
    /// Seconds of norm, clipping and update.
    pub update: f64,
    /// Seconds on the host's clock from the first forward pass until the update has been done.
    pub step: f64,
    /// Operations of the model: see [`operations`].
    pub operations: f64,
    /// Bytes as computed.
    pub plan: Plan,
    /// The most bytes in buffers at once.
    pub peak_bytes: usize,
    /// Allocations during the measured updates.
    pub allocations: usize,
    /// Mean loss of the first and of the last update.
    pub losses: (f64, f64),
}

/// Floating-point operations of one update, by the convention of model-FLOPs utilisation: `6 N` per token, with `N` the
/// parameters of matrices, the head included and the embedding table not, and for attention `12 · layers · heads · head_dim` per
/// pair of a token with one that it sees (half of all pairs). What is computed again does not count.
pub fn operations(shape: &TextShape, batch: &Batch) -> f64 {
    3.0 * (shape.token_operations() * batch.tokens() as f64 + shape.attention_operations(1) * batch.pairs())
}

/// Measures training with weights of bf16 and gradients summed in `G`. `exchange` is called before every update.
pub fn measure<G: Float>(
    gpu: &Gpu,
    workload: &Workload,
    card: usize,
    mut exchange: impl FnMut(&mut Learner<bf16, G>) -> Result<(), DeviceError>,
) -> Result<Measured, DeviceError> {
    let Workload { shape, settings, .. } = workload;
    gpu.reset_peak();
    let weights = TextWeights::<bf16>::random(gpu, shape, 1)?;
    let mut learner = Learner::<bf16, G>::new(gpu, weights, *settings)?;
    let batches = batches(workload)?;
    let scored: usize = batches.iter().map(|batch| batch.scored.len()).sum();
    let adamw = AdamW {
        learning_rate: 1e-5,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        step: 1,
        seed: 1,
        rounding: Rounding::Stochastic,
    };
    let clock = gpu.clock()?;
    let mut stages: [Vec<f64>; 5] = Default::default();
    let mut losses = Vec::new();
    let mut allocations = 0;
    for index in 0..=workload.updates {
        if index == 1 {
            allocations = gpu.allocations();
            stages.iter_mut().for_each(Vec::clear);
        }
        let begin = std::time::Instant::now();
        let (mut forwards, mut backwards, mut loss) = (0.0, 0.0, 0.0);
        for batch in &batches {
            let mut slopes = Vec::new();
            forwards += gpu.time(&clock, || {
                let scored_tokens = learner.score(batch, None, 1.0)?;
                let weight = vec![(scored as f32).recip(); batch.scored.len()];
                loss += cross_entropy(&scored_tokens.log_probs, &weight, &mut slopes);
                Ok::<_, DeviceError>(())
            })?;
            backwards += gpu.time(&clock, || learner.backward(&slopes, None))?;
        }
        let exchanges = gpu.time(&clock, || exchange(&mut learner))?;
        let update = gpu.time(&clock, || learner.update(&adamw, 1.0))?;
        let step = begin.elapsed().as_secs_f64();
        for (stage, seconds) in stages.iter_mut().zip([forwards, backwards, exchanges, update, step]) {
            stage.push(seconds);
        }
        losses.push(loss);
    }
    let [forward, backward, exchange, update, step] = stages.map(median);
    Ok(Measured {
        tokens: batches.iter().map(Batch::tokens).sum(),
        micro_batches: batches.len(),
        forward,
        backward,
        exchange,
        update,
        step,
        operations: batches.iter().map(|batch| operations(shape, batch)).sum(),
        plan: Plan::new(shape, bf16::DTYPE, settings, 0, card),
        peak_bytes: gpu.peak_bytes(),
        allocations: gpu.allocations() - allocations,
        losses: (losses[0], losses[losses.len() - 1]),
    })
}

/// Micro-batches of random tokens.
fn batches(workload: &Workload) -> Result<Vec<Batch>, DeviceError> {
    let vocabulary = u32::try_from(workload.shape.vocabulary).unwrap_or(u32::MAX);
    let bins = micro_batches(&workload.lengths, workload.settings.tokens, workload.settings.sequences)?;
    let batches = bins.iter().map(|bin| {
        let sequences = bin.iter().map(|index| {
            let length = u32::try_from(workload.lengths[*index]).unwrap_or(u32::MAX);
            let of = u32::try_from(*index).unwrap_or_default();
            // Any tokens; a linear congruence spreads them over the vocabulary.
            let id =
                |at: u32| (at.wrapping_mul(1_664_525).wrapping_add(of.wrapping_mul(1_013_904_223)) >> 8) % vocabulary;
            let ids = (0..length).map(id).collect::<Vec<_>>();
            let positions = (0..length).map(|at| [at; 3]).collect::<Vec<_>>();
            (ids, positions, 1..length as usize)
        });
        let sequences = sequences.collect::<Vec<_>>();
        let sequences = sequences.iter().map(|(ids, positions, scored)| Sequence {
            ids,
            positions,
            scored,
            placeholders: &[],
        });
        Ok(Batch::pack(sequences)?)
    });
    batches.collect()
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

impl Measured {
    /// Share of an arithmetic rate that the model's operations take in a whole step.
    pub fn utilisation(&self, rate: f64) -> f64 {
        self.operations / self.step / rate
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let share = |seconds: f64| 100.0 * seconds / self.step;
        writeln!(f, "{} tokens in {} micro-batches", self.tokens, self.micro_batches)?;
        for (name, seconds) in [
            ("forward", self.forward),
            ("backward", self.backward),
            ("exchange", self.exchange),
            ("update", self.update),
        ] {
            writeln!(f, "{name:<10} {seconds:>8.4} s {:>5.1} %", share(seconds))?;
        }
        writeln!(
            f,
            "{:<10} {:>8.4} s, {:.0} tokens/s, {:.0} TFLOP/s",
            "step",
            self.step,
            self.tokens as f64 / self.step,
            self.operations / self.step / 1e12
        )?;
        writeln!(f, "loss       {:.4} to {:.4}", self.losses.0, self.losses.1)?;
        writeln!(f, "{}", self.plan)?;
        write!(
            f,
            "measured           {:>8.2} GB at most, {} allocations after the first update",
            self.peak_bytes as f64 / 1e9,
            self.allocations
        )
    }
}
