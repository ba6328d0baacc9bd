//! Seconds of a training step beside the floor.

use std::fmt;

use flotilla_grpo::policy::cross_entropy_slopes;
use flotilla_kernels::{
    Buffer, Float, Gpu,
    optimizer::{AdamW, Rounding},
    rows,
};
use flotilla_model::{Layout, Visual};
use half::bf16;

use super::{Batch, Learner, Plan, Sequence, Settings, Shapes, micro_batches};
use crate::{
    error::DeviceError,
    measure::vision_operations,
    shape::{QwenVision, TextShape},
    vision::{QwenTower, tokens},
    weights::TextWeights,
};

/// Arithmetic of a dense bf16 product that NVIDIA states for an H100 or H200 (SXM).
pub const DATASHEET: f64 = 989e12;

const ADAMW: AdamW = AdamW {
    learning_rate: 1e-5,
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weight_decay: 0.01,
    step: 1,
    seed: 1,
    rounding: Rounding::Stochastic,
};

/// What to measure.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Sizes of the model, whose weights are random.
    pub shape: TextShape,
    /// Sizes and formats of learning.
    pub settings: Settings,
    /// Lengths of the sequences of one update; every token but the first of each is scored.
    pub lengths: Vec<usize>,
    /// Pictures of an update, whose tower is trained.
    pub pictures: Option<Pictures>,
    /// Updates that are measured, after one that is not.
    pub updates: usize,
}

/// Pictures of one update, each of which goes through the tower once to be seen and once to be learned from. Their tokens are
/// not among those of the sequences.
#[derive(Clone, Debug)]
pub struct Pictures {
    /// Sizes of the tower, whose weights are random.
    pub shape: QwenVision,
    /// Patches each way.
    pub side: usize,
    /// How many.
    pub count: usize,
}

impl Pictures {
    /// Floating-point operations of the tower's gradients, by the convention of [`operations`]: three times those of a forward
    /// pass, windows as they are.
    pub fn operations(&self) -> f64 {
        3.0 * self.count as f64 * vision_operations(&self.shape, self.side * self.side)
    }

    /// Pictures of any values.
    fn draw(&self) -> Vec<Visual> {
        let grid = [1, self.side, self.side];
        let values = self.side * self.side * self.shape.patch_values();
        let visual = |of: usize| Visual {
            values: (0..values)
                .map(|at| ((at * 7919 + of) % 2048) as f32 / 1024.0 - 1.0)
                .collect(),
            layout: Layout::Patches {
                grid,
                time_step: 0.0,
                video: false,
            },
        };
        (0..self.count).map(visual).collect()
    }
}

/// A tower with pictures and the gradients by their features.
struct Shown {
    tower: QwenTower<bf16>,
    visuals: Vec<Visual>,
    gradients: Vec<Buffer<f32>>,
}

impl Shown {
    fn new(gpu: &Gpu, pictures: &Pictures) -> Result<Self, DeviceError> {
        let numbers = tokens(&pictures.shape, &[1, pictures.side, pictures.side]) * pictures.shape.output;
        let gradients = (0..pictures.count as u64).map(|seed| {
            let gradient = gpu.alloc(numbers)?;
            rows::fill_normal(gpu, &gradient, 1e-3, seed)?;
            Ok::<_, DeviceError>(gradient)
        });
        Ok(Self {
            tower: QwenTower::random(gpu, pictures.shape.clone(), 1000)?,
            visuals: pictures.draw(),
            gradients: gradients.collect::<Result<_, _>>()?,
        })
    }
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
    /// Seconds of encoding pictures, upload included.
    pub features: f64,
    /// Seconds of the tower's gradients: upload, forward and backward passes.
    pub tower: f64,
    /// Seconds of the exchange of gradients with other GPUs.
    pub exchange: f64,
    /// Seconds of norm, clipping and update.
    pub update: f64,
    /// Seconds on the host's clock from the first forward pass until the update has been done.
    pub step: f64,
    /// Operations of the model: see [`operations`] and [`Pictures::operations`].
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
    let shown = workload.pictures.as_ref().map(|pictures| Shown::new(gpu, pictures));
    let shown = shown.transpose()?;
    if let Some(shown) = &shown {
        learner.train_vision(shown.tower.clone())?;
    }
    let batches = batches(workload)?;
    let scored: usize = batches.iter().map(|batch| batch.scored.len()).sum();
    let clock = gpu.clock()?;
    let mut stages: [Vec<f64>; 7] = Default::default();
    let mut losses = Vec::new();
    let mut allocations = 0;
    for index in 0..=workload.updates {
        if index == 1 {
            allocations = gpu.allocations();
            stages.iter_mut().for_each(Vec::clear);
        }
        let begin = std::time::Instant::now();
        let (mut forwards, mut backwards, mut features, mut of_tower, mut loss) = (0.0, 0.0, 0.0, 0.0, 0.0);
        if let Some(shown) = &shown {
            let visuals = shown.visuals.iter().collect::<Vec<_>>();
            features = gpu.time(&clock, || shown.tower.encode(&visuals).map(drop))?;
        }
        for batch in &batches {
            let mut slopes = Vec::new();
            forwards += gpu.time(&clock, || {
                let scored_tokens = learner.score(batch, None, 1.0)?;
                let weight = vec![(scored as f32).recip(); batch.scored.len()];
                loss += cross_entropy_slopes(&scored_tokens.log_probs, &weight, &mut slopes);
                Ok::<_, DeviceError>(())
            })?;
            backwards += gpu.time(&clock, || learner.backward(&slopes, None))?;
        }
        if let Some(shown) = &shown {
            let visuals = shown.visuals.iter().collect::<Vec<_>>();
            of_tower = gpu.time(&clock, || learner.vision_backward(&visuals, &shown.gradients))?;
        }
        let exchanges = gpu.time(&clock, || exchange(&mut learner))?;
        let update = gpu.time(&clock, || learner.update(&ADAMW, 1.0))?;
        let step = begin.elapsed().as_secs_f64();
        let all = [forwards, backwards, features, of_tower, exchanges, update, step];
        for (stage, seconds) in stages.iter_mut().zip(all) {
            stage.push(seconds);
        }
        losses.push(loss);
    }
    let [forward, backward, features, tower, exchange, update, step] = stages.map(median);
    let of_pictures = workload.pictures.as_ref();
    let shapes = Shapes {
        text: shape,
        vision: of_pictures.map(|pictures| &pictures.shape),
    };
    Ok(Measured {
        tokens: batches.iter().map(Batch::tokens).sum(),
        micro_batches: batches.len(),
        forward,
        backward,
        features,
        tower,
        exchange,
        update,
        step,
        operations: batches.iter().map(|batch| operations(shape, batch)).sum::<f64>()
            + of_pictures.map_or(0.0, Pictures::operations),
        plan: Plan::new(shapes, bf16::DTYPE, settings, 0, card),
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
            ("features", self.features),
            ("tower", self.tower),
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
