//! Calls that move, sum and fill rows.

use super::{Groups, SOURCE, pack::pack};
use crate::{
    Buffer, Dtype, Element, Float, Gpu, GpuError, ShapeError,
    gpu::{
        launch::{Arg, Grid},
        source::Kernel,
    },
};

/// Rows of a table by their ids: `out[i] = table[ids[i]]`. `table` is `[vocabulary, width]`, `out` `[ids.len(), width]`. An id
/// that the table does not have gives a row of zeros.
pub fn embed<T: Float>(
    gpu: &Gpu,
    width: usize,
    table: &Buffer<T>,
    ids: &Buffer<u32>,
    out: &Buffer<T>,
) -> Result<(), GpuError> {
    todo!()
}

/// Rows of a matrix: `out[i] = from[at[i]]`. `out` is `[at.len(), width]`. An index that is negative or too large gives a row
/// of zeros.
pub fn gather_rows<T: Float>(
    gpu: &Gpu,
    width: usize,
    from: &Buffer<T>,
    at: &Buffer<i32>,
    out: &Buffer<T>,
) -> Result<(), GpuError> {
    todo!()
}

/// The inverse: `out[at[i]] = features[i]`, other rows stay: image features over the rows of their placeholders, or gradients
/// of gathered rows. `features` is `[at.len(), width]`. Indices are distinct; a negative or too large one is left out.
pub fn place<T: Float>(
    gpu: &Gpu,
    width: usize,
    features: &Buffer<T>,
    at: &Buffer<i32>,
    out: &Buffer<T>,
) -> Result<(), GpuError> {
    todo!()
}

/// [`Groups`] on the card.
#[derive(Clone, Debug)]
pub struct DeviceGroups {
    /// As [`Groups::ids`].
    pub ids: Buffer<u32>,
    /// As [`Groups::starts`].
    pub starts: Buffer<u32>,
    /// As [`Groups::order`].
    pub order: Buffer<u32>,
}

impl DeviceGroups {
    /// Copies them to the card.
    pub fn upload(gpu: &Gpu, groups: &Groups) -> Result<Self, GpuError> {
        Ok(Self {
            ids: gpu.upload(&groups.ids)?,
            starts: gpu.upload(&groups.starts)?,
            order: gpu.upload(&groups.order)?,
        })
    }
}

/// Gradient of [`embed`]: `dtable[id] += Σ dy[i]` over the tokens `i` of each id, in the order of the group, summed in f32.
/// `dtable` is `[vocabulary, width]`, in f32 or as the weights are. Equal inputs give equal bits.
pub fn embedding_gradient<T: Float, G: Float>(
    gpu: &Gpu,
    width: usize,
    groups: &DeviceGroups,
    dy: &Buffer<T>,
    dtable: &Buffer<G>,
) -> Result<(), GpuError> {
    todo!()
}

/// Numbers of scratch that [`column_sums`] needs. Their values need not be kept.
pub fn column_sums_scratch(rows: usize, width: usize) -> usize {
    column_parts(rows) * width
}

/// Adds the sums of the columns of `x` `[rows, width]` to `sums` `[width]`. Equal inputs give equal bits, on any card.
pub fn column_sums<T: Float>(
    gpu: &Gpu,
    rows: usize,
    width: usize,
    x: &Buffer<T>,
    sums: &Buffer<f32>,
    scratch: &Buffer<f32>,
) -> Result<(), GpuError> {
    todo!()
}

/// Adds the sums of the columns of `partials` `[parts, width]` to `sums` `[width]`, in the order of the parts.
pub(crate) fn add_partials(
    gpu: &Gpu,
    parts: usize,
    width: usize,
    partials: &Buffer<f32>,
    sums: &Buffer<f32>,
) -> Result<(), GpuError> {
    todo!()
}

/// The same numbers in another format, rounded to nearest. `to` is at least as long as `from`.
pub fn cast<A: Float, B: Float>(gpu: &Gpu, from: &Buffer<A>, to: &Buffer<B>) -> Result<(), GpuError> {
    todo!()
}

/// `a += b`, rounded once. `b` is as long as `a`.
pub fn add<T: Float>(gpu: &Gpu, a: &Buffer<T>, b: &Buffer<T>) -> Result<(), GpuError> {
    todo!()
}

/// `x *= factor`, rounded once.
pub fn scale<T: Float>(gpu: &Gpu, x: &Buffer<T>, factor: f32) -> Result<(), GpuError> {
    todo!()
}

/// Random numbers of a normal distribution with mean 0. The number at an index depends on the seed and the index alone.
pub fn fill_normal<T: Float>(gpu: &Gpu, out: &Buffer<T>, deviation: f32, seed: u64) -> Result<(), GpuError> {
    todo!()
}

/// Random numbers from `low` (included) to `high` (excluded, unless rounding to `T` reaches it). The number at an index depends
/// on the seed and the index alone.
pub fn fill_uniform<T: Float>(gpu: &Gpu, out: &Buffer<T>, (low, high): (f32, f32), seed: u64) -> Result<(), GpuError> {
    todo!()
}

/// Copies blocks of a layer's pool before they are written to by one of their sharers: for each pair `(from, to)` of `pairs`
/// `[n, 2]`, keys and values of block `from` go to block `to`. `block_elements` is `kv_heads * block_size * head_dim`. No
/// block may be both a source and a target. A pair with a block that the pool does not have, or of a block with itself,
/// copies nothing: `pairs` may be padded for a graph.
pub fn copy_blocks<T: Float>(
    gpu: &Gpu,
    keys: &Buffer<T>,
    values: &Buffer<T>,
    pairs: &Buffer<u32>,
    block_elements: usize,
) -> Result<(), GpuError> {
    todo!()
}

/// Rows of partial sums: about 32 rows each, up to 64.
fn column_parts(rows: usize) -> usize {
    rows.div_ceil(32).min(64)
}
