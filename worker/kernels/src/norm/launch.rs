//! Calls of the norms.

use super::SOURCE;
use crate::{
    Buffer, Float, Gpu, GpuError, ShapeError,
    gpu::{
        launch::{Arg, Grid},
        source::Kernel,
    },
    rows::{add_partials, pack},
};

/// Shape of a norm over the rows of a matrix `[rows, width]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Rows, each normed by itself.
    pub rows: usize,
    /// Numbers of a row: up to 65,536 where they are a multiple of 8, else up to 8,192.
    pub width: usize,
    /// Added to the mean square (RMSNorm) or to the variance (LayerNorm).
    pub eps: f32,
}

/// RMSNorm: `out = weight * T(x / sqrt(mean(x²) + eps))`, statistics in f32, the normed value rounded to `T` before the
/// weight as in Hugging Face's `Qwen2RMSNorm`.
///
/// With a `residual` `[rows, width]` the norm is of the sum: `residual <- T(residual + x)`, then `out = norm(residual)`.
/// `weight` is `[width]`; `x` and `out` are `[rows, width]` and may be the same buffer. `inverse_rms` `[rows]` receives
/// `1 / sqrt(mean(x²) + eps)` for the backward pass. One launch; may be recorded in a graph.
pub fn rms_norm<T: Float>(
    gpu: &Gpu,
    norm: Norm,
    x: &Buffer<T>,
    residual: Option<&Buffer<T>>,
    weight: &Buffer<T>,
    out: &Buffer<T>,
    inverse_rms: Option<&Buffer<f32>>,
) -> Result<(), GpuError> {
    todo!()
}

/// Operands of [`rms_norm_backward`].
#[derive(Clone, Copy, Debug)]
pub struct RmsNormBackward<'a, T> {
    /// Gradient of the norm's output, `[rows, width]`.
    pub dy: &'a Buffer<T>,
    /// What was normed, `[rows, width]`: with a residual, the residual after the sum.
    pub x: &'a Buffer<T>,
    /// `[width]`.
    pub weight: &'a Buffer<T>,
    /// As [`rms_norm`] left it, `[rows]`.
    pub inverse_rms: &'a Buffer<f32>,
    /// Receives the gradient of `x`, `[rows, width]`. May be `dy` unless `accumulate`.
    pub dx: &'a Buffer<T>,
    /// `dx` holds the gradient that flows past the norm along the residual: the norm's is added to it.
    pub accumulate: bool,
    /// Gradient of the weight, `[width]` in f32: added to. With it, scratch of [`rms_norm_backward_scratch`] numbers.
    pub dweight: Option<(&'a Buffer<f32>, &'a Buffer<f32>)>,
}

/// Numbers of scratch that [`rms_norm_backward`] needs for a weight's gradient. Their values need not be kept.
pub fn rms_norm_backward_scratch(gpu: &Gpu, norm: Norm) -> usize {
    backward_blocks(gpu, norm.rows) * norm.width
}

/// Gradient of [`rms_norm`] with respect to `x` and `weight`. Equal inputs give equal bits: the weight's gradient is summed per
/// block in the order of its rows, then over blocks in their order.
pub fn rms_norm_backward<T: Float>(gpu: &Gpu, norm: Norm, operands: RmsNormBackward<'_, T>) -> Result<(), GpuError> {
    todo!()
}

/// LayerNorm: `out = T((x - mean) / sqrt(variance + eps) * weight + bias)`, all in f32 with one rounding, the variance summed
/// from the deviations. `weight` and `bias` are `[width]`; `x`, `out` and `residual` are as of [`rms_norm`].
///
/// There is no backward pass: vision towers, which alone use it, are frozen.
pub fn layer_norm<T: Float>(
    gpu: &Gpu,
    norm: Norm,
    x: &Buffer<T>,
    residual: Option<&Buffer<T>>,
    weight: &Buffer<T>,
    bias: &Buffer<T>,
    out: &Buffer<T>,
) -> Result<(), GpuError> {
    todo!()
}

/// Blocks of the backward pass, and rows of partial sums.
fn backward_blocks(gpu: &Gpu, rows: usize) -> usize {
    rows.min(2 * gpu.processors())
}
