//! Calls of the norms.

use super::SOURCE;
use crate::{
    Buffer, Float, Gpu, GpuError, ShapeError,
    gpu::{launch::Grid, source::Kernel},
    rows::{Summed, add_partials, pack},
};

/// Shape of a norm over the rows of a matrix `[rows, width]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Rows, each normed by itself.
    pub rows: usize,
    /// Numbers of a row: up to 32,768 where they are a multiple of 8, else up to 8,192.
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
    ShapeError::at_least("rms_norm", "x", x.len(), norm.rows * norm.width)?;
    norm_rows(gpu, norm, Summed::Whole(x), residual, weight, out, inverse_rms)
}

/// [`rms_norm`] of the sum of `residual` and a product whose sums are in parts (`streamed::parts`): `parts` `[count, rows, width]` are added up
/// in their order and rounded to `T` before they are added to the residual.
pub fn rms_norm_of_parts<T: Float>(
    gpu: &Gpu,
    norm: Norm,
    (parts, count): (&Buffer<f32>, usize),
    residual: &Buffer<T>,
    weight: &Buffer<T>,
    out: &Buffer<T>,
) -> Result<(), GpuError> {
    ShapeError::at_least("rms_norm", "parts", parts.len(), count * norm.rows * norm.width)?;
    norm_rows(
        gpu,
        norm,
        Summed::Parts(parts, count),
        Some(residual),
        weight,
        out,
        None,
    )
}

fn norm_rows<T: Float>(
    gpu: &Gpu,
    norm: Norm,
    x: Summed<'_, T>,
    residual: Option<&Buffer<T>>,
    weight: &Buffer<T>,
    out: &Buffer<T>,
    inverse_rms: Option<&Buffer<f32>>,
) -> Result<(), GpuError> {
    const NAME: &str = "rms_norm";
    let matrix = norm.rows * norm.width;
    ShapeError::at_least(NAME, "out", out.len(), matrix)?;
    ShapeError::length(NAME, "weight", weight.len(), norm.width)?;
    if let Some(residual) = residual {
        ShapeError::at_least(NAME, "residual", residual.len(), matrix)?;
    }
    if let Some(inverse) = inverse_rms {
        ShapeError::at_least(NAME, "inverse_rms", inverse.len(), norm.rows)?;
    }
    let past = residual.map_or(0, Buffer::pointer);
    let (whole, parts, count) = x.operands();
    let pack = pack::<T>(norm.width, &[x.pointer(), past, weight.pointer(), out.pointer()]);
    let (kernel, grid) = by_rows::<T>(gpu, NAME, norm, pack)?;
    gpu.launch(
        &kernel.define("IN_PARTS", usize::from(parts.is_some())),
        grid.early(),
        &[
            whole.into(),
            parts.into(),
            count.into(),
            residual.into(),
            weight.into(),
            out.into(),
            inverse_rms.into(),
            norm.width.into(),
            norm.eps.into(),
        ],
    )
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
    const NAME: &str = "rms_norm_backward";
    let RmsNormBackward {
        dy,
        x,
        weight,
        inverse_rms,
        dx,
        accumulate,
        dweight,
    } = operands;
    let matrix = norm.rows * norm.width;
    ShapeError::at_least(NAME, "dy", dy.len(), matrix)?;
    ShapeError::at_least(NAME, "x", x.len(), matrix)?;
    ShapeError::at_least(NAME, "dx", dx.len(), matrix)?;
    ShapeError::length(NAME, "weight", weight.len(), norm.width)?;
    ShapeError::at_least(NAME, "inverse_rms", inverse_rms.len(), norm.rows)?;
    let blocks = backward_blocks(gpu, norm.rows);
    let mut pack = pack::<T>(norm.width, &[dy.pointer(), x.pointer(), weight.pointer(), dx.pointer()]);
    if let Some((dweight, scratch)) = dweight {
        ShapeError::length(NAME, "dweight", dweight.len(), norm.width)?;
        ShapeError::at_least(NAME, "scratch", scratch.len(), blocks * norm.width)?;
        if !scratch.pointer().is_multiple_of(16) {
            pack = 1;
        }
    }
    let (threads, vectors) = spread(NAME, norm.width, pack, 1)?;
    let kernel = Kernel::new(&SOURCE, NAME, Some(T::DTYPE))
        .define("PACK", pack)
        .define("THREADS", threads)
        .define("VECTORS", vectors)
        .define("WEIGHT_GRADIENT", usize::from(dweight.is_some()));
    gpu.launch(
        &kernel,
        Grid::new(blocks, u32::try_from(threads).unwrap_or(u32::MAX)),
        &[
            dy.into(),
            x.into(),
            weight.into(),
            inverse_rms.into(),
            dx.into(),
            i32::from(accumulate).into(),
            dweight.map(|(_, scratch)| scratch).into(),
            norm.rows.into(),
            norm.width.into(),
        ],
    )?;
    match dweight {
        Some((dweight, scratch)) => add_partials(gpu, blocks, norm.width, scratch, dweight),
        None => Ok(()),
    }
}

/// LayerNorm: `out = T((x - mean) / sqrt(variance + eps) * weight + bias)`, all in f32 with one rounding, the variance summed
/// from the deviations. `weight` and `bias` are `[width]`; `x`, `out` and `residual` are as of [`rms_norm`].
///
/// There is no backward pass: the tower of LLaVA-OneVision, which alone uses it, is not trained on the card.
pub fn layer_norm<T: Float>(
    gpu: &Gpu,
    norm: Norm,
    x: &Buffer<T>,
    residual: Option<&Buffer<T>>,
    weight: &Buffer<T>,
    bias: &Buffer<T>,
    out: &Buffer<T>,
) -> Result<(), GpuError> {
    const NAME: &str = "layer_norm";
    let matrix = norm.rows * norm.width;
    ShapeError::at_least(NAME, "x", x.len(), matrix)?;
    ShapeError::at_least(NAME, "out", out.len(), matrix)?;
    ShapeError::length(NAME, "weight", weight.len(), norm.width)?;
    ShapeError::length(NAME, "bias", bias.len(), norm.width)?;
    if let Some(residual) = residual {
        ShapeError::at_least(NAME, "residual", residual.len(), matrix)?;
    }
    let past = residual.map_or(0, Buffer::pointer);
    let addresses = [x.pointer(), past, weight.pointer(), bias.pointer(), out.pointer()];
    let (kernel, grid) = by_rows::<T>(gpu, NAME, norm, pack::<T>(norm.width, &addresses))?;
    gpu.launch(
        &kernel,
        grid,
        &[
            x.into(),
            residual.into(),
            weight.into(),
            bias.into(),
            out.into(),
            norm.width.into(),
            norm.eps.into(),
        ],
    )
}

/// Blocks of the backward pass, and rows of partial sums.
fn backward_blocks(gpu: &Gpu, rows: usize) -> usize {
    rows.min(2 * gpu.processors())
}

/// A kernel with one block per row. Few rows want many threads each, so that each is done soon; where there are many, two packs
/// per thread halve the warps that a barrier waits for.
fn by_rows<T: Float>(gpu: &Gpu, name: &'static str, norm: Norm, pack: usize) -> Result<(Kernel, Grid), GpuError> {
    let vectors = if norm.rows <= 8 * gpu.processors() { 1 } else { 2 };
    let (threads, vectors) = spread(name, norm.width, pack, vectors)?;
    let kernel = Kernel::new(&SOURCE, name, Some(T::DTYPE))
        .define("PACK", pack)
        .define("THREADS", threads)
        .define("VECTORS", vectors);
    Ok((kernel, Grid::new(norm.rows, u32::try_from(threads).unwrap_or(u32::MAX))))
}

/// Threads of a block and packs of a thread for a row: about as many packs as wanted, more where a row is too wide for a block.
fn spread(kernel: &'static str, width: usize, pack: usize, wanted: usize) -> Result<(usize, usize), ShapeError> {
    let packs = width / pack;
    let threads = packs.div_ceil(wanted).next_multiple_of(32).clamp(32, 1024);
    let vectors = packs.div_ceil(threads).max(1);
    ShapeError::unless(kernel, vectors <= 8, || format!("rows of {width} numbers are too wide"))?;
    Ok((threads, vectors))
}
