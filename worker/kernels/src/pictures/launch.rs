//! Calls that cut squares and mix rows.

use super::{SOURCE, Squares, TAPS};
use crate::{
    Buffer, Float, Gpu, GpuError, ShapeError,
    gpu::{launch::Grid, source::Kernel},
    rows::pack,
};

/// Threads of a block, as in the source.
const THREADS: u32 = 256;

/// Patches of squares of pixels: `out` is `[squares.patches(), width]`, each row a patch's numbers and zeros up to `width`, so
/// that rows of a product can begin at multiples of 16 bytes. `pixels` is `[count, channels, side, side]`; numbers are rounded
/// once. One launch; may be recorded in a graph.
pub fn patches<T: Float>(
    gpu: &Gpu,
    squares: Squares,
    pixels: &Buffer<f32>,
    width: usize,
    out: &Buffer<T>,
) -> Result<(), GpuError> {
    const NAME: &str = "patches";
    let fits = squares.patch > 0 && squares.grid() > 0 && width >= squares.patch_values();
    ShapeError::unless(NAME, fits, || format!("{squares:?} in rows of {width} numbers"))?;
    ShapeError::at_least(NAME, "pixels", pixels.len(), squares.values())?;
    ShapeError::at_least(NAME, "out", out.len(), squares.patches() * width)?;
    let pack = pack::<T>(width, &[out.pointer()]);
    let packs = width / pack;
    let total = squares.patches() * packs;
    ShapeError::unless(NAME, total < 1 << 31, || format!("{total} packs are too many"))?;
    let kernel = Kernel::new(&SOURCE, NAME, Some(T::DTYPE))
        .define("PACK", pack)
        .define("PATCH", squares.patch)
        .define("CHANNELS", squares.channels);
    gpu.launch(
        &kernel,
        Grid::new(total.div_ceil(THREADS as usize), THREADS),
        &[
            pixels.into(),
            out.into(),
            squares.side.into(),
            squares.grid().into(),
            packs.into(),
            total.into(),
        ],
    )
}

/// Rows mixed of rows: `out[i] = Σ weights[i][t] * from[at[i][t]]` over the four `t`, summed in f32 in their order and rounded
/// once. `from` is rows of `width`, `at` and `weights` are `[rows, 4]`, `out` is `[rows, width]`. An index that is negative or too
/// large adds nothing; one row with the weight 1 is copied. One launch; may be recorded in a graph.
pub fn mix_rows<T: Float>(
    gpu: &Gpu,
    width: usize,
    from: &Buffer<T>,
    at: &Buffer<i32>,
    weights: &Buffer<f32>,
    out: &Buffer<T>,
) -> Result<(), GpuError> {
    const NAME: &str = "mix_rows";
    let from_rows = from.len().checked_div(width).unwrap_or_default();
    ShapeError::unless(NAME, from_rows * width == from.len() && from_rows < 1 << 31, || {
        format!("from has {} elements, not rows of {width}", from.len())
    })?;
    let rows = at.len() / TAPS;
    ShapeError::length(NAME, "at", at.len(), rows * TAPS)?;
    ShapeError::length(NAME, "weights", weights.len(), at.len())?;
    ShapeError::at_least(NAME, "out", out.len(), rows * width)?;
    let aligned = at.pointer().is_multiple_of(16) && weights.pointer().is_multiple_of(16);
    ShapeError::unless(NAME, aligned, || {
        format!("lists at {:#x} and {:#x}", at.pointer(), weights.pointer())
    })?;
    let pack = pack::<T>(width, &[from.pointer(), out.pointer()]);
    let packs = width / pack;
    let total = rows * packs;
    ShapeError::unless(NAME, total < 1 << 31, || format!("{total} packs are too many"))?;
    let kernel = Kernel::new(&SOURCE, NAME, Some(T::DTYPE)).define("PACK", pack);
    gpu.launch(
        &kernel,
        Grid::new(total.div_ceil(THREADS as usize), THREADS),
        &[
            from.into(),
            from_rows.into(),
            at.into(),
            weights.into(),
            out.into(),
            packs.into(),
            total.into(),
        ],
    )
}
