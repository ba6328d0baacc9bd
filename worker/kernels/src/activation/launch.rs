//! Calls of the activations.

use super::{Gelu, SOURCE};
use crate::{
    Buffer, Float, Gpu, GpuError, ShapeError,
    gpu::{
        launch::{Arg, Grid},
        source::Kernel,
    },
    rows::{column_sums, column_sums_scratch, pack},
};

/// SwiGLU: `out = silu(gate) * up` in f32, rounded once. `gate_up` is `[rows, 2 * ff]`, in each row the gate first; `out` is
/// `[rows, ff]`. One launch; may be recorded in a graph.
pub fn swiglu<T: Float>(
    gpu: &Gpu,
    rows: usize,
    ff: usize,
    gate_up: &Buffer<T>,
    out: &Buffer<T>,
) -> Result<(), GpuError> {
    const NAME: &str = "swiglu";
    ShapeError::at_least(NAME, "gate_up", gate_up.len(), 2 * rows * ff)?;
    ShapeError::at_least(NAME, "out", out.len(), rows * ff)?;
    let pack = pack::<T>(ff, &[gate_up.pointer(), out.pointer()]);
    let kernel = Kernel::new(&SOURCE, NAME, Some(T::DTYPE)).define("PACK", pack);
    launch(gpu, kernel, (rows, ff / pack), &[gate_up.into(), out.into()])
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
    const NAME: &str = "swiglu_backward";
    ShapeError::at_least(NAME, "gate_up", gate_up.len(), 2 * rows * ff)?;
    ShapeError::at_least(NAME, "dout", dout.len(), rows * ff)?;
    ShapeError::at_least(NAME, "d_gate_up", d_gate_up.len(), 2 * rows * ff)?;
    if let Some(out) = out {
        ShapeError::at_least(NAME, "out", out.len(), rows * ff)?;
    }
    let again = out.map_or(0, Buffer::pointer);
    let pack = pack::<T>(ff, &[gate_up.pointer(), dout.pointer(), d_gate_up.pointer(), again]);
    let kernel = Kernel::new(&SOURCE, NAME, Some(T::DTYPE)).define("PACK", pack);
    launch(
        gpu,
        kernel,
        (rows, ff / pack),
        &[gate_up.into(), dout.into(), d_gate_up.into(), out.into()],
    )
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
    const NAME: &str = "gelu";
    let pack = biased(NAME, (rows, width), bias, &[("x", x), ("out", out)])?;
    let kernel = gelu_kernel::<T>(NAME, kind).define("PACK", pack);
    launch(gpu, kernel, (rows, width / pack), &[x.into(), bias.into(), out.into()])
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
    const NAME: &str = "gelu_backward";
    let pack = biased(NAME, (rows, width), bias, &[("x", x), ("dout", dout), ("dx", dx)])?;
    let kernel = gelu_kernel::<T>(NAME, kind).define("PACK", pack);
    launch(
        gpu,
        kernel,
        (rows, width / pack),
        &[x.into(), bias.into(), dout.into(), dx.into()],
    )
}

/// `x += bias`: `x` is `[rows, width]`, `bias` `[width]`.
pub fn add_bias<T: Float>(
    gpu: &Gpu,
    rows: usize,
    width: usize,
    bias: &Buffer<T>,
    x: &Buffer<T>,
) -> Result<(), GpuError> {
    const NAME: &str = "add_bias";
    let pack = biased(NAME, (rows, width), Some(bias), &[("x", x)])?;
    let kernel = Kernel::new(&SOURCE, NAME, Some(T::DTYPE)).define("PACK", pack);
    launch(gpu, kernel, (rows, width / pack), &[bias.into(), x.into()])
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

/// Threads of a block, as in the source.
const THREADS: u32 = 256;

fn gelu_kernel<T: Float>(name: &'static str, kind: Gelu) -> Kernel {
    let number = match kind {
        Gelu::Tanh => 0,
        Gelu::Erf => 1,
        Gelu::Quick => 2,
    };
    Kernel::new(&SOURCE, name, Some(T::DTYPE)).define("GELU", number)
}

/// Checks matrices and a bias of their width, and says how many numbers one access may move.
fn biased<T: Float>(
    kernel: &'static str,
    (rows, width): (usize, usize),
    bias: Option<&Buffer<T>>,
    matrices: &[(&str, &Buffer<T>)],
) -> Result<usize, ShapeError> {
    let mut addresses = Vec::with_capacity(matrices.len() + 1);
    for (name, matrix) in matrices {
        ShapeError::at_least(kernel, name, matrix.len(), rows * width)?;
        addresses.push(matrix.pointer());
    }
    if let Some(bias) = bias {
        ShapeError::length(kernel, "bias", bias.len(), width)?;
        addresses.push(bias.pointer());
    }
    Ok(pack::<T>(width, &addresses))
}

/// Over all packs of `rows` rows; the last two arguments are the packs of a row and all of them. Where every pack can have a
/// thread at once it gets one, else a thread has two.
fn launch(gpu: &Gpu, kernel: Kernel, (rows, packs): (usize, usize), args: &[Arg]) -> Result<(), GpuError> {
    let total = rows * packs;
    ShapeError::unless(kernel.name, total < 1 << 31, || format!("{total} packs are too many"))?;
    let unroll = if total <= 4096 * gpu.processors() { 1 } else { 2 };
    let grid = Grid::new(total.div_ceil(THREADS as usize * unroll), THREADS);
    let kernel = kernel.define("UNROLL", unroll);
    gpu.launch(&kernel, grid, &[args, &[packs.into(), total.into()]].concat())
}
