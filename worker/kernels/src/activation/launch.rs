//! Calls of the activations.

use super::SOURCE;
use crate::{
    Buffer, Float, Gpu, GpuError, ShapeError,
    gpu::{
        launch::{Arg, Grid},
        source::Kernel,
    },
    rows::{column_sums, column_sums_scratch, pack},
};

/// Which GELU.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Gelu {
    /// By `tanh`: `gelu_pytorch_tanh` of SigLIP.
    Tanh,
    /// Exact, by `erf`: mergers and projectors.
    Erf,
    /// `x * sigmoid(1.702 x)`.
    Quick,
}

/// SwiGLU: `out = silu(gate) * up` in f32, rounded once. `gate_up` is `[rows, 2 * ff]`, in each row the gate first; `out` is
/// `[rows, ff]`. One launch; may be recorded in a graph.
pub fn swiglu<T: Float>(
    gpu: &Gpu,
    rows: usize,
    ff: usize,
    gate_up: &Buffer<T>,
    out: &Buffer<T>,
) -> Result<(), GpuError> {
    todo!()
}

/// Gradient of [`swiglu`]: `d_gate_up` `[rows, 2 * ff]` from `dout` `[rows, ff]`. `d_gate_up` may be `gate_up` itself.
///
/// With `out` `[rows, ff]`, the output of the forward pass is computed again on the way, since the gradient of the down
/// projection's weight needs it; it may be `dout` itself.
pub fn swiglu_backward<T: Float>(
    gpu: &Gpu,
    rows: usize,
    ff: usize,
    gate_up: &Buffer<T>,
    dout: &Buffer<T>,
    d_gate_up: &Buffer<T>,
    out: Option<&Buffer<T>>,
) -> Result<(), GpuError> {
    todo!()
}

/// `out = gelu(x + bias)` in f32, rounded once. `x` and `out` are `[rows, width]` and may be the same buffer; `bias` is
/// `[width]`.
pub fn gelu<T: Float>(
    gpu: &Gpu,
    kind: Gelu,
    (rows, width): (usize, usize),
    x: &Buffer<T>,
    bias: Option<&Buffer<T>>,
    out: &Buffer<T>,
) -> Result<(), GpuError> {
    todo!()
}

/// Gradient of [`gelu`]: `dx = dout * gelu'(x + bias)`, all `[rows, width]`. `dx` may be `dout` or `x`.
pub fn gelu_backward<T: Float>(
    gpu: &Gpu,
    kind: Gelu,
    (rows, width): (usize, usize),
    x: &Buffer<T>,
    bias: Option<&Buffer<T>>,
    dout: &Buffer<T>,
    dx: &Buffer<T>,
) -> Result<(), GpuError> {
    todo!()
}

/// `x += bias`: `x` is `[rows, width]`, `bias` `[width]`.
pub fn add_bias<T: Float>(
    gpu: &Gpu,
    rows: usize,
    width: usize,
    bias: &Buffer<T>,
    x: &Buffer<T>,
) -> Result<(), GpuError> {
    todo!()
}

/// Numbers of scratch that [`bias_gradient`] needs. Their values need not be kept.
pub fn bias_gradient_scratch(rows: usize, width: usize) -> usize {
    column_sums_scratch(rows, width)
}

/// Gradient of a bias: adds the sums of the columns of `dy` `[rows, width]` to `dbias` `[width]`. Equal inputs give equal bits.
pub fn bias_gradient<T: Float>(
    gpu: &Gpu,
    rows: usize,
    width: usize,
    dy: &Buffer<T>,
    dbias: &Buffer<f32>,
    scratch: &Buffer<f32>,
) -> Result<(), GpuError> {
    column_sums(gpu, rows, width, dy, dbias, scratch)
}
