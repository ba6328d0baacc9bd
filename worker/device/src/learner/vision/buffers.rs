//! Memory of a chunk of patches, allocated once for the largest.

use flotilla_kernels::{Buffer, Element, Float, Gpu, GpuError, activation, attention, norm};

use super::plan;
use crate::{
    learner::plan::Settings,
    shape::QwenVision,
    vision::{self, Layout},
};

/// Activations of the largest chunk; those of a smaller one are its beginnings.
#[derive(Debug)]
pub(super) struct Activations<T> {
    /// Patches as the host has them, and rounded: `[patches, values]` in the order of the grids.
    values: Buffer<f32>,
    rounded: Buffer<T>,
    whole: Chunk<T>,
}

/// Buffers of a chunk.
#[derive(Debug)]
pub(super) struct Chunk<T> {
    /// Patches, the filling included.
    pub rows: usize,
    /// Tokens, the filling included.
    pub tokens: usize,
    pub order: Buffer<i32>,
    pub positions: Buffer<i32>,
    /// Where windows begin, and where the last ends.
    pub near: Buffer<u32>,
    /// The same of frames.
    pub far: Buffer<u32>,
    /// Patches in the order of windows, `[rows, values]`.
    pub patches: Buffer<T>,
    /// The residual stream before each block and after the last, `[rows, hidden]`.
    pub inputs: Vec<Buffer<T>>,
    /// `[rows, hidden]`, as those that follow.
    pub normed: Buffer<T>,
    /// The residual stream between attention and MLP.
    pub middle: Buffer<T>,
    /// What attention gives.
    pub mixed: Buffer<T>,
    /// The gradient of the residual stream.
    pub dx: Buffer<T>,
    pub d_normed: Buffer<T>,
    pub d_mixed: Buffer<T>,
    /// Queries, keys and values before they are turned, `[rows, 3 * hidden]`.
    pub packed: Buffer<T>,
    /// Turned ones behind one another, `[3, rows, hidden]`.
    pub split: Buffer<T>,
    pub d_split: Buffer<T>,
    /// `[rows, 2 * padded]`.
    pub gate_up: Buffer<T>,
    /// `[rows, padded]`.
    pub gated: Buffer<T>,
    /// `[heads, rows]`.
    pub lse: Buffer<f32>,
    pub delta: Buffer<f32>,
    /// Of the norm before the attention, and of that after it.
    pub inverse_rms: [Buffer<f32>; 2],
    /// Gradients by the features, in the order of the grids and in that of windows: `[tokens, output]`.
    pub d_tokens: Buffer<T>,
    pub d_features: Buffer<T>,
    /// Partial sums of gradients of norms and biases.
    pub sums: Buffer<f32>,
}

impl<T: Float> Activations<T> {
    pub fn new(gpu: &Gpu, shape: &QwenVision, settings: &Settings) -> Result<Self, GpuError> {
        let rows = plan::rows(shape, settings);
        let (hidden, padded, unit) = (shape.hidden, shape.padded(), shape.merge * shape.merge);
        let tokens = rows / unit;
        let biases = [
            (rows, 3 * hidden),
            (rows, 2 * padded),
            (tokens, shape.merged()),
            (tokens, shape.output),
        ];
        let biases = biases.map(|(rows, width)| activation::bias_gradient_scratch(rows, width));
        let norms = norm::rms_norm_backward_scratch(gpu, vision::norm(shape, rows));
        let wide = |width: usize| gpu.alloc::<T>(rows * width);
        let narrow = || gpu.alloc::<f32>(rows);
        Ok(Self {
            values: gpu.alloc(rows * shape.patch_values())?,
            rounded: wide(shape.patch_values())?,
            whole: Chunk {
                rows,
                tokens,
                order: gpu.alloc(tokens)?,
                positions: gpu.alloc(2 * rows)?,
                near: gpu.alloc(tokens + 1)?,
                far: gpu.alloc(tokens + 1)?,
                patches: wide(shape.patch_values())?,
                inputs: (0..=shape.depth).map(|_| wide(hidden)).collect::<Result<_, _>>()?,
                normed: wide(hidden)?,
                middle: wide(hidden)?,
                mixed: wide(hidden)?,
                dx: wide(hidden)?,
                d_normed: wide(hidden)?,
                d_mixed: wide(hidden)?,
                packed: wide(3 * hidden)?,
                split: wide(3 * hidden)?,
                d_split: wide(3 * hidden)?,
                gate_up: wide(2 * padded)?,
                gated: wide(padded)?,
                lse: gpu.alloc(shape.heads * rows)?,
                delta: gpu.alloc(attention::backward_scratch(&vision::attention(shape), rows))?,
                inverse_rms: [narrow()?, narrow()?],
                d_tokens: gpu.alloc(tokens * shape.output)?,
                d_features: gpu.alloc(tokens * shape.output)?,
                sums: gpu.alloc(biases.into_iter().fold(norms, usize::max))?,
            },
        })
    }

    /// Patches of so many tokens in the order of the grids: as they come from the host, and rounded.
    pub fn patches(&self, shape: &QwenVision, tokens: usize) -> Result<(Buffer<f32>, Buffer<T>), GpuError> {
        let numbers = tokens * shape.merge * shape.merge * shape.patch_values();
        Ok((self.values.slice(0..numbers)?, self.rounded.slice(0..numbers)?))
    }

    /// Buffers of a chunk, with its layout.
    pub fn chunk(&self, gpu: &Gpu, shape: &QwenVision, layout: &Layout) -> Result<Chunk<T>, GpuError> {
        let whole = &self.whole;
        let rows = layout.rows;
        let tokens = layout.order.len();
        let wide = |buffer: &Buffer<T>| buffer.slice(0..rows * (buffer.len() / whole.rows));
        let narrow = |buffer: &Buffer<f32>| buffer.slice(0..rows * (buffer.len() / whole.rows));
        Ok(Chunk {
            rows,
            tokens,
            order: put(gpu, &whole.order, &layout.order)?,
            positions: put(gpu, &whole.positions, &layout.positions)?,
            near: put(gpu, &whole.near, &layout.near)?,
            far: put(gpu, &whole.far, &layout.far)?,
            patches: wide(&whole.patches)?,
            inputs: whole.inputs.iter().map(wide).collect::<Result<_, _>>()?,
            normed: wide(&whole.normed)?,
            middle: wide(&whole.middle)?,
            mixed: wide(&whole.mixed)?,
            dx: wide(&whole.dx)?,
            d_normed: wide(&whole.d_normed)?,
            d_mixed: wide(&whole.d_mixed)?,
            packed: wide(&whole.packed)?,
            split: wide(&whole.split)?,
            d_split: wide(&whole.d_split)?,
            gate_up: wide(&whole.gate_up)?,
            gated: wide(&whole.gated)?,
            lse: narrow(&whole.lse)?,
            delta: narrow(&whole.delta)?,
            inverse_rms: [narrow(&whole.inverse_rms[0])?, narrow(&whole.inverse_rms[1])?],
            d_tokens: whole.d_tokens.slice(0..layout.tokens * shape.output)?,
            d_features: whole.d_features.slice(0..tokens * shape.output)?,
            sums: whole.sums.clone(),
        })
    }
}

/// Queries, keys and values of a buffer that holds them behind one another.
pub(super) fn thirds<T: Float>(split: &Buffer<T>) -> Result<[Buffer<T>; 3], GpuError> {
    let third = split.len() / 3;
    let part = |index: usize| split.slice(index * third..(index + 1) * third);
    Ok([part(0)?, part(1)?, part(2)?])
}

/// Writes values to the beginning of a buffer and returns that part.
fn put<E: Element>(gpu: &Gpu, buffer: &Buffer<E>, values: &[E]) -> Result<Buffer<E>, GpuError> {
    gpu.write(buffer, values)?;
    buffer.slice(0..values.len())
}
