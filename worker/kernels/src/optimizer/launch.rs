//! Clipping and AdamW on the GPU.
//!
//! A step: [`GradientNorm::begin`], [`GradientNorm::add`] for each gradient, [`GradientNorm::clip`], then [`adamw`] for each
//! parameter with the buffer that `clip` returned. Nothing waits for the GPU; the host reads the norm when it wants it. With a
//! [`Pace`] the same launches can be recorded as a graph and replayed with other learning rates.

use half::bf16;

use super::{ADAMW, AdamW, BLOCK, CHUNK, NORM, Rounding, StateKind, partials};
use crate::{
    Buffer, Dtype, Element, Float, Gpu, GpuError, ShapeError,
    gpu::{
        launch::{Arg, Grid},
        source::Kernel,
    },
};

/// Threads of a block of the kernels that read parameters or gradients.
const THREADS: u32 = 256;
/// Threads of the one block that sums partial sums.
const SUMMING: u32 = 1024;

/// The sum of squares of a gradient in pieces of [`CHUNK`] numbers: `partials[i]` is that of the `i`th piece. Summed in f32 in
/// an order that depends on the length alone. `partials` is as long as [`partials`]`(gradient.len())`, a slice of the scratch
/// of all gradients.
pub fn squares<T: Float>(gpu: &Gpu, gradient: &Buffer<T>, partials: &Buffer<f32>) -> Result<(), GpuError> {
    let kernel = "squares";
    let pieces = super::partials(gradient.len());
    ShapeError::length(kernel, "partials", partials.len(), pieces)?;
    aligned(kernel, "gradient", gradient)?;
    gpu.launch(
        &norm_kernel(kernel, T::DTYPE),
        Grid::new(pieces, THREADS),
        &[gradient.into(), Arg::U64(gradient.len() as u64), partials.into()],
    )
}

/// Sums partial sums in f64 in a fixed order and rounds to `sum[0]`: what ranks that hold parts of a gradient exchange. The sums
/// of all ranks, gathered, are partial sums again.
pub fn sum(gpu: &Gpu, partials: &Buffer<f32>, sum: &Buffer<f32>) -> Result<(), GpuError> {
    ShapeError::length("sum_partials", "sum", sum.len(), 1)?;
    gpu.launch(
        &norm_kernel("sum_partials", Dtype::F32),
        Grid::new(1, SUMMING),
        &[partials.into(), Arg::U64(partials.len() as u64), sum.into()],
    )
}

/// The norm of all gradients times `factor` from their partial sums, and what gradients are to be multiplied by:
/// `clip = [norm, scale]` with `norm = factor * sqrt(sum)` and `scale = factor * min(1, max_norm / (norm + 1e-6))`. `factor`
/// turns summed gradients into means (1 over tokens, micro-batches or ranks; else 1). Where the sum is not finite, `clip` is
/// `[norm, 0]`, and [`adamw`] changes nothing. `max_norm` may be infinite: then nothing is scaled down.
pub fn clip(gpu: &Gpu, partials: &Buffer<f32>, factor: f32, max_norm: f32, clip: &Buffer<f32>) -> Result<(), GpuError> {
    ShapeError::length("clip", "clip", clip.len(), 2)?;
    gpu.launch(
        &norm_kernel("clip", Dtype::F32),
        Grid::new(1, SUMMING),
        &[
            partials.into(),
            Arg::U64(partials.len() as u64),
            factor.into(),
            max_norm.into(),
            clip.into(),
        ],
    )
}

/// The buffers of a gradient norm over many gradients.
#[derive(Debug)]
pub struct GradientNorm {
    partials: Buffer<f32>,
    used: usize,
    clip: Buffer<f32>,
}

impl GradientNorm {
    /// For gradients of these lengths.
    pub fn new(gpu: &Gpu, lengths: impl IntoIterator<Item = usize>) -> Result<Self, GpuError> {
        Ok(Self {
            partials: gpu.zeros(lengths.into_iter().map(partials).sum())?,
            used: 0,
            clip: gpu.zeros(2)?,
        })
    }

    /// A new norm, of nothing so far.
    pub fn begin(&mut self) {
        self.used = 0;
    }

    /// Adds the squares of one gradient.
    pub fn add<T: Float>(&mut self, gpu: &Gpu, gradient: &Buffer<T>) -> Result<(), GpuError> {
        let end = self.used + partials(gradient.len());
        squares(gpu, gradient, &self.partials.slice(self.used..end)?)?;
        self.used = end;
        Ok(())
    }

    /// `[norm, scale]` of what was added, see [`clip`]. The buffer is the same each time.
    pub fn clip(&self, gpu: &Gpu, factor: f32, max_norm: f32) -> Result<&Buffer<f32>, GpuError> {
        clip(gpu, &self.partials.slice(0..self.used)?, factor, max_norm, &self.clip)?;
        Ok(&self.clip)
    }

    /// The partial sums of what was added, for [`sum`].
    pub fn added(&self) -> Result<Buffer<f32>, GpuError> {
        self.partials.slice(0..self.used)
    }
}

/// The moments of one parameter. Zero at the beginning.
#[derive(Clone, Debug)]
pub enum States {
    /// 8 bytes a parameter.
    F32 {
        /// First moments.
        m: Buffer<f32>,
        /// Second moments.
        v: Buffer<f32>,
    },
    /// 4 bytes a parameter, both rounded stochastically.
    Bf16 {
        /// First moments.
        m: Buffer<bf16>,
        /// Second moments.
        v: Buffer<bf16>,
    },
    /// 2 bytes a parameter and 8 for each 256, rounded stochastically. See the module on the code.
    Bit8 {
        /// Codes of first moments.
        m: Buffer<i8>,
        /// Codes of second moments.
        v: Buffer<u8>,
        /// `[ceil(parameters / 256), 2]`: what the codes of a block are multiplied by, of `m` and of the root of `v`.
        units: Buffer<f32>,
    },
}

impl States {
    /// Zero moments of a parameter of `length` numbers.
    pub fn zeros(gpu: &Gpu, kind: StateKind, length: usize) -> Result<Self, GpuError> {
        Ok(match kind {
            StateKind::F32 => Self::F32 {
                m: gpu.zeros(length)?,
                v: gpu.zeros(length)?,
            },
            StateKind::Bf16 => Self::Bf16 {
                m: gpu.zeros(length)?,
                v: gpu.zeros(length)?,
            },
            StateKind::Bit8 => Self::Bit8 {
                m: gpu.zeros(length)?,
                v: gpu.zeros(length)?,
                units: gpu.zeros(2 * length.div_ceil(BLOCK))?,
            },
        })
    }

    /// Which they are.
    pub fn kind(&self) -> StateKind {
        match self {
            Self::F32 { .. } => StateKind::F32,
            Self::Bf16 { .. } => StateKind::Bf16,
            Self::Bit8 { .. } => StateKind::Bit8,
        }
    }

    /// Numbers of the parameter.
    pub fn len(&self) -> usize {
        match self {
            Self::F32 { m, .. } => m.len(),
            Self::Bf16 { m, .. } => m.len(),
            Self::Bit8 { m, .. } => m.len(),
        }
    }

    /// Whether the parameter has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Learning rate and count of updates on the GPU, for steps that are recorded as a graph. [`Self::advance`] is part of the
/// graph, after [`clip`] and before [`adamw`]; [`Self::set_learning_rate`] is called between replays.
#[derive(Debug)]
pub struct Pace {
    learning_rate: Buffer<f32>,
    updates: Buffer<u32>,
    factors: Buffer<f32>,
}

impl Pace {
    /// After `updates` updates.
    pub fn new(gpu: &Gpu, updates: u32) -> Result<Self, GpuError> {
        Ok(Self {
            learning_rate: gpu.zeros(1)?,
            updates: gpu.upload(&[updates])?,
            factors: gpu.zeros(3)?,
        })
    }

    /// For the updates that follow in the stream.
    pub fn set_learning_rate(&self, gpu: &Gpu, learning_rate: f32) -> Result<(), GpuError> {
        gpu.write(&self.learning_rate, &[learning_rate])
    }

    /// Counts an update, unless `clip` says that it is to be skipped, and computes what [`adamw`] reads.
    pub fn advance(&self, gpu: &Gpu, optimizer: &AdamW, clip: &Buffer<f32>) -> Result<(), GpuError> {
        ShapeError::length("pace", "clip", clip.len(), 2)?;
        gpu.launch(
            &norm_kernel("pace", Dtype::F32),
            Grid::new(1, 32),
            &[
                clip.into(),
                (&self.learning_rate).into(),
                Arg::U64(optimizer.beta1.to_bits()),
                Arg::U64(optimizer.beta2.to_bits()),
                Arg::U64(optimizer.weight_decay.to_bits()),
                (&self.updates).into(),
                (&self.factors).into(),
            ],
        )
    }

    /// Updates that were applied, after waiting for the GPU.
    pub fn updates(&self, gpu: &Gpu) -> Result<u32, GpuError> {
        let mut updates = [0];
        gpu.read(&self.updates, &mut updates)?;
        Ok(updates[0])
    }
}

/// What one launch of [`adamw`] works on.
#[derive(Clone, Copy, Debug)]
pub struct Update<'a, T, G> {
    /// Changed in place. 16-byte aligned, as all operands are.
    pub parameters: &'a Buffer<T>,
    /// As long as the parameters; in their format or in f32.
    pub gradients: &'a Buffer<G>,
    /// As long as the parameters, changed in place.
    pub states: &'a States,
    /// Number of the tensor, so that no two round by the same random numbers.
    pub tensor: u32,
    /// `[norm, scale]` of [`clip`]: gradients are multiplied by the scale as they are read, and a scale of 0 changes nothing.
    /// Without it, gradients are taken as they are, finite or not.
    pub clip: Option<&'a Buffer<f32>>,
    /// Learning rate and step from the GPU in place of those of [`AdamW`].
    pub pace: Option<&'a Pace>,
    /// Leaves zeros in `gradients`, also where the update is skipped.
    pub zero_gradients: bool,
}

/// One update of one parameter, in one pass: parameters, gradients and moments are read once and written once. Computed in f32
/// with each operation rounded as `reference::adamw` rounds it, so that the two agree bit by bit. With moments of 8
/// bits, roots and quotients are approximate to the last bit, and a rare code is a step apart.
pub fn adamw<T: Float, G: Float>(gpu: &Gpu, optimizer: &AdamW, update: &Update<'_, T, G>) -> Result<(), GpuError> {
    let kernel = "adamw";
    let length = update.parameters.len();
    ShapeError::length(kernel, "gradients", update.gradients.len(), length)?;
    ShapeError::unless(kernel, G::DTYPE == T::DTYPE || G::DTYPE == Dtype::F32, || {
        format!("gradients in {} of parameters in {}", G::DTYPE.name(), T::DTYPE.name())
    })?;
    ShapeError::unless(kernel, optimizer.epsilon > 0.0, || {
        format!("epsilon {} must be above 0", optimizer.epsilon)
    })?;
    aligned(kernel, "parameters", update.parameters)?;
    aligned(kernel, "gradients", update.gradients)?;
    let (m, v, units) = operands(update.states, length)?;
    if let Some(clip) = update.clip {
        ShapeError::length(kernel, "clip", clip.len(), 2)?;
    }
    let stochastic = T::DTYPE == Dtype::Bf16 && optimizer.rounding == Rounding::Stochastic;
    let factors = optimizer.factors();
    gpu.launch(
        &Kernel::new(&ADAMW, kernel, Some(T::DTYPE))
            .define("STATE", update.states.kind() as usize)
            .define("GRADIENT_F32", usize::from(G::DTYPE == Dtype::F32))
            .define("STOCHASTIC", usize::from(stochastic)),
        Grid::new(length.div_ceil(BLOCK * THREADS as usize / 32), THREADS),
        &[
            update.parameters.into(),
            update.gradients.into(),
            m,
            v,
            units,
            Arg::U64(length as u64),
            update.clip.into(),
            update.pace.map(|pace| &pace.factors).into(),
            update.pace.map(|pace| &pace.updates).into(),
            factors.step_size.into(),
            factors.decay.into(),
            factors.correction.into(),
            factors.beta2.into(),
            factors.rest1.into(),
            factors.rest2.into(),
            factors.epsilon.into(),
            Arg::U64(optimizer.seed),
            optimizer.step.into(),
            update.tensor.into(),
            u32::from(update.zero_gradients).into(),
        ],
    )
}

/// Pointers to the moments of a parameter of `length` numbers.
fn operands(states: &States, length: usize) -> Result<(Arg, Arg, Arg), GpuError> {
    fn moments<M: Element, V: Element>(m: &Buffer<M>, v: &Buffer<V>, length: usize) -> Result<(Arg, Arg), GpuError> {
        ShapeError::length("adamw", "m", m.len(), length)?;
        ShapeError::length("adamw", "v", v.len(), length)?;
        aligned("adamw", "m", m)?;
        aligned("adamw", "v", v)?;
        Ok((m.into(), v.into()))
    }
    let ((m, v), units) = match states {
        States::F32 { m, v } => (moments(m, v, length)?, Arg::Pointer(0)),
        States::Bf16 { m, v } => (moments(m, v, length)?, Arg::Pointer(0)),
        States::Bit8 { m, v, units } => {
            ShapeError::length("adamw", "units", units.len(), 2 * length.div_ceil(BLOCK))?;
            aligned("adamw", "units", units)?;
            (moments(m, v, length)?, units.into())
        }
    };
    Ok((m, v, units))
}

fn norm_kernel(name: &'static str, dtype: Dtype) -> Kernel {
    Kernel::new(&NORM, name, Some(dtype)).define("CHUNK", CHUNK)
}

/// Vectors of 16 bytes are read.
fn aligned<T: Element>(kernel: &'static str, operand: &str, buffer: &Buffer<T>) -> Result<(), ShapeError> {
    ShapeError::unless(kernel, buffer.pointer().is_multiple_of(16), || {
        format!("{operand} begins at {:#x}, which 16 does not divide", buffer.pointer())
    })
}
