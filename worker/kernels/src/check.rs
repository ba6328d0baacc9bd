//! Parity of kernels with their references, on fresh random inputs. `flotilla-worker doctor` and `make test-cuda` run them.

use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use crate::{Float, Gpu, GpuError};

/// One comparison of a kernel with its reference.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// Kernel, number format and what is special about the inputs, as `rms_norm bf16 odd width`.
    pub name: &'static str,
    /// Draws inputs, poisons outputs, runs kernel and reference, and says how far they are apart.
    pub run: fn(&Gpu, &mut Draw) -> Result<Distance, CheckError>,
}

/// Why a check could not be done.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The GPU failed.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// What must be equal is not.
    #[error("{0}")]
    Differs(String),
}

/// How far a result is from its reference, and how far it may be.
#[derive(Clone, Copy, Debug)]
pub struct Distance {
    /// `‖out − reference‖ / ‖reference‖`, of the worst output.
    pub relative: f64,
    /// The most that it may be.
    pub bound: f64,
}

impl Distance {
    /// Exactly equal outputs.
    pub const EQUAL: Self = Self {
        relative: 0.0,
        bound: 0.0,
    };

    /// Whether it is near enough. A NaN never is.
    pub fn holds(&self) -> bool {
        self.relative <= self.bound
    }

    /// The worse of two, each against its bound.
    pub fn worst(self, other: Self) -> Self {
        let share = |one: Self| match one.relative {
            0.0 => 0.0,
            relative => relative / one.bound,
        };
        if !other.holds() || (self.holds() && share(other) > share(self)) {
            other
        } else {
            self
        }
    }

    /// Of an output in the format `T`: an error of f32 sums, or of one rounding to bf16 per output.
    pub fn of<T: Float>(out: &[T], reference: &[f32]) -> Result<Self, CheckError> {
        let bound = match T::DTYPE {
            crate::Dtype::F32 => 1e-5,
            crate::Dtype::Bf16 => 4e-3,
        };
        Self::within(out, reference, bound)
    }

    /// With a bound of one's own.
    pub fn within<T: Float>(out: &[T], reference: &[f32], bound: f64) -> Result<Self, CheckError> {
        if out.len() != reference.len() {
            return Err(CheckError::Differs(format!(
                "{} numbers, {} expected",
                out.len(),
                reference.len()
            )));
        }
        let (mut apart, mut size) = (0f64, 0f64);
        for (out, reference) in out.iter().zip(reference) {
            apart += (f64::from(out.to_f32()) - f64::from(*reference)).powi(2);
            size += f64::from(*reference).powi(2);
        }
        let relative = if apart == 0.0 { 0.0 } else { (apart / size).sqrt() };
        Ok(Self { relative, bound })
    }

    /// Equal numbers, or the first that differ.
    pub fn equal<T: PartialEq + std::fmt::Debug>(out: &[T], reference: &[T]) -> Result<Self, CheckError> {
        if out.len() != reference.len() {
            return Err(CheckError::Differs(format!(
                "{} values, {} expected",
                out.len(),
                reference.len()
            )));
        }
        match out.iter().zip(reference).position(|(out, reference)| out != reference) {
            None => Ok(Self::EQUAL),
            Some(at) => Err(CheckError::Differs(format!(
                "at {at}: {:?}, {:?} expected",
                out[at], reference[at]
            ))),
        }
    }
}

/// Random inputs.
#[derive(Debug)]
pub struct Draw(ChaCha8Rng);

impl Draw {
    /// Equal seeds draw equal inputs.
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// The generator.
    pub fn random(&mut self) -> &mut ChaCha8Rng {
        &mut self.0
    }

    /// Numbers of a normal distribution with this deviation, representable in `T`: kernel and reference see the same.
    pub fn normal<T: Float>(&mut self, length: usize, deviation: f32) -> Vec<T> {
        let one = |random: &mut ChaCha8Rng| {
            // Box and Muller.
            let radius = (-2.0 * (1.0 - random.random::<f32>()).ln()).sqrt();
            radius * (std::f32::consts::TAU * random.random::<f32>()).cos()
        };
        (0..length).map(|_| T::from_f32(one(&mut self.0) * deviation)).collect()
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.0.random_range(0..end)
    }

    /// A number between two, the second included.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        self.0.random_range(low..=high)
    }

    /// The numbers below `end` in random order.
    pub fn order(&mut self, end: usize) -> Vec<u32> {
        let mut order = (0..u32::try_from(end).unwrap_or(u32::MAX)).collect::<Vec<_>>();
        order.shuffle(&mut self.0);
        order
    }
}

/// Numbers as f32, for a reference.
pub fn widen<T: Float>(values: &[T]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}

/// Every check of the crate.
pub fn all() -> Vec<Check> {
    [
        crate::activation::checks(),
        crate::attention::checks(),
        crate::gpu::post_checks(),
        crate::norm::checks(),
        crate::optimizer::checks(),
        crate::paged::checks(),
        crate::pictures::checks(),
        crate::rotary::checks(),
        crate::rows::checks(),
        crate::sampling::checks(),
        crate::skinny::checks(),
        crate::streamed::checks(),
        crate::vocabulary::checks(),
    ]
    .concat()
}
