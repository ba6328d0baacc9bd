//! AdamW with stochastic rounding and 8-bit states; the norm of a gradient.
//!
//! # Stochastic rounding
//!
//! A number between two that bf16 can hold becomes the upper one with the probability that keeps its mean. Late in training an
//! update is far below half an ulp of its parameter (2⁻⁹ of it): rounded to nearest it is lost, every time; rounded
//! stochastically it moves the parameter once in many steps, and on the average as f32 would. The same holds for the second
//! moment, which `beta2 = 0.999` moves by a thousandth at a time. Bits are drawn by Philox from (seed, step, tensor, index): a
//! step that is repeated rounds alike. One call serves eight parameters: 16 bits each, which odd factors reorder for the moments.
//!
//! # Moments of 8 bits
//!
//! As in block-wise quantisation (Dettmers et al., arXiv 2110.02861), 256 neighbours share a scale, their largest moment; but
//! the code is a power instead of a table: `m = unit · q·|q|` with `q` in −127..127, and `√v = unit · q²` with `q` in 0..255.
//! Both are dense near zero: steps are 1.6 % of the largest `m` at the largest and 0.006 % at zero; the denominator `√v` is held
//! within 1/q of itself, 0.4 % for the largest and 8 % for one a hundred times smaller. Two departures matter. Codes are rounded
//! stochastically, without bias in `m` and in `v`: to the nearest, a mean that moves by a thousandth never leaves its code. And
//! a code of 0 is never written for `v`: a second moment that vanishes beside a first one that does not would be an update of
//! `m / epsilon`. Encoding needs one root and no search, and is the same arithmetic on a CPU.
//!
//! What it costs: rounding adds noise of mean zero to `m`, of the size of the update itself for a parameter whose gradients are
//! 10⁻⁴ of the largest of its block, a quarter of it at 10⁻³, and little above.

#[cfg(feature = "cuda")]
mod check;
#[cfg(feature = "cuda")]
mod launch;
pub mod reference;

#[cfg(feature = "cuda")]
pub use launch::{GradientNorm, Pace, States, Update, adamw, clip, squares, sum};

#[cfg(feature = "cuda")]
use crate::{bench::Case, check::Check, gpu::source::Source};

/// Numbers whose squares are one partial sum.
pub const CHUNK: usize = 32_768;

/// Parameters that share the scales of their 8-bit moments.
pub const BLOCK: usize = 256;

/// Partial sums of the squares of so many numbers.
pub fn partials(length: usize) -> usize {
    length.div_ceil(CHUNK)
}

/// How parameters in bf16 are rounded after an update.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Rounding {
    /// Up or down at random, without bias.
    Stochastic,
    /// To the nearest, ties to even.
    Nearest,
}

/// How moments are held.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum StateKind {
    /// 8 bytes a parameter.
    F32,
    /// 4 bytes a parameter.
    Bf16,
    /// 2 bytes a parameter, and 8 for each [`BLOCK`].
    Bit8,
}

impl StateKind {
    /// Bytes of both moments of `length` parameters.
    pub fn bytes(self, length: usize) -> usize {
        match self {
            Self::F32 => 8 * length,
            Self::Bf16 => 4 * length,
            Self::Bit8 => 2 * length + 8 * length.div_ceil(BLOCK),
        }
    }
}

/// AdamW with decoupled weight decay, as `torch.optim.AdamW` computes it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Of this update. Not used with a `Pace`.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// This update's number, from 1: corrects the bias of the moments and draws the rounding. Not used with a `Pace`.
    pub step: u32,
    /// Of stochastic rounding: equal seeds, steps and tensors round equally.
    pub seed: u64,
    /// How parameters in bf16 are rounded; moments are always rounded stochastically.
    pub rounding: Rounding,
}

/// What an update multiplies by, each rounded to f32 once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Factors {
    /// `learning_rate / (1 − beta1^step)`.
    pub step_size: f32,
    /// `1 − learning_rate · weight_decay`.
    pub decay: f32,
    /// `1 / √(1 − beta2^step)`.
    pub correction: f32,
    pub beta2: f32,
    /// `1 − beta1`.
    pub rest1: f32,
    /// `1 − beta2`.
    pub rest2: f32,
    pub epsilon: f32,
}

impl AdamW {
    #[allow(clippy::cast_possible_truncation, reason = "factors are rounded to f32")]
    pub(crate) fn factors(&self) -> Factors {
        let step = f64::from(self.step);
        Factors {
            step_size: (self.learning_rate / (1.0 - self.beta1.powf(step))) as f32,
            decay: (1.0 - self.learning_rate * self.weight_decay) as f32,
            correction: (1.0 / (1.0 - self.beta2.powf(step)).sqrt()) as f32,
            beta2: self.beta2 as f32,
            rest1: (1.0 - self.beta1) as f32,
            rest2: (1.0 - self.beta2) as f32,
            epsilon: self.epsilon as f32,
        }
    }
}

#[cfg(feature = "cuda")]
pub(crate) static ADAMW: Source = Source {
    name: "adamw",
    text: include_str!("kernel.cu"),
};

#[cfg(feature = "cuda")]
pub(crate) static NORM: Source = Source {
    name: "gradient_norm",
    text: include_str!("norm.cu"),
};

/// Parity with the reference.
#[cfg(feature = "cuda")]
pub fn checks() -> Vec<Check> {
    check::checks()
}

/// Speed beside the floor.
#[cfg(feature = "cuda")]
pub fn cases() -> Vec<Case> {
    check::cases()
}

/// Sources with the constants of their builds.
#[cfg(feature = "cuda")]
pub fn sources() -> Vec<(&'static Source, Vec<String>)> {
    let mut builds = Vec::new();
    for elem in ["float", "bf16"] {
        builds.push((&NORM, vec![format!("ELEM={elem}"), format!("CHUNK={CHUNK}")]));
        for state in [StateKind::F32, StateKind::Bf16, StateKind::Bit8] {
            for (gradient, stochastic) in [(1, 0), (0, 1), (1, 1)] {
                if elem == "bf16" || (gradient, stochastic) == (1, 0) {
                    builds.push((
                        &ADAMW,
                        vec![
                            format!("ELEM={elem}"),
                            format!("STATE={}", state as usize),
                            format!("GRADIENT_F32={gradient}"),
                            format!("STOCHASTIC={stochastic}"),
                        ],
                    ));
                }
            }
        }
    }
    builds
}
