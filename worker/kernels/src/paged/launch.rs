use super::{SOURCE, layout::Layout};
use crate::{
    Buffer, Gpu, GpuError, ShapeError,
    element::{Dtype, Float},
    gpu::{
        launch::{Arg, Grid},
        source::Kernel,
    },
};

/// Attention of one new token per sequence: what stays the same from step to step, and so may be part of a
/// [recorded](Gpu::record) graph. Lengths, block tables and groups are read from the card at every step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decode {
    /// Sequences of the batch, unused ones included.
    pub rows: usize,
    /// Query heads; a multiple of `kv_heads`, at most 8 for each of them.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Numbers of one head, a multiple of 8 up to 256. 64 and 128 are the fast ones.
    pub head_dim: usize,
    /// Tokens of a block of the pool, a power of two from 8.
    pub block_size: usize,
    /// Entries of a row of the block table.
    pub max_blocks: usize,
    /// The most groups of rows that share a prefix; 0 for a kernel that knows none.
    pub groups: usize,
    /// Factor of the scores, positive: `1 / sqrt(head_dim)` as a rule.
    pub scale: f32,
}

/// What one layer reads and writes.
#[derive(Clone, Copy, Debug)]
pub struct Operands<'a, T> {
    /// Queries, `[rows, heads, head_dim]`.
    pub q: &'a Buffer<T>,
    /// Keys of the layer, `[blocks, kv_heads, block_size, head_dim]`. Those of the new tokens are already in it. What lies
    /// beyond a sequence's length may be anything, NaN as well.
    pub keys: &'a Buffer<T>,
    /// Values of the layer, as the keys.
    pub values: &'a Buffer<T>,
    /// Which blocks hold a sequence, in order: `[rows, max_blocks]`. Entries beyond its length are not read.
    pub tables: &'a Buffer<u32>,
    /// The result, `[rows, heads, head_dim]`; zeros for unused rows.
    pub out: &'a Buffer<T>,
    /// `ln Σ exp(scale * score)` of every query head, `[rows, heads]`; minus infinity for unused rows.
    pub lse: Option<&'a Buffer<f32>>,
}

/// Work lists and partial results of a step. One is enough for all layers, and for all smaller batches as well.
#[derive(Clone, Debug)]
pub struct Scratch {
    /// Written by [`plan`], read by [`attend`].
    plan: Buffer<i32>,
    /// Sums, maxima and unscaled outputs of parts of a context.
    partials: Buffer<f32>,
}

impl Scratch {
    /// Scratch memory for batches up to this one. It must be kept as long as a graph that uses it.
    pub fn new(gpu: &Gpu, largest: &Decode) -> Result<Self, GpuError> {
        largest.check()?;
        let layout = Layout::new(largest, gpu.processors());
        Ok(Self {
            plan: gpu.zeros(layout.plan_length())?,
            partials: gpu.alloc(layout.partial_length())?,
        })
    }
}

/// Divides the work of a step evenly over the card; once per step, before the first layer's [`attend`].
///
/// `lengths` `[rows]`: tokens of each sequence in the cache, the new one included; 0 for an unused row.
///
/// `groups` `[groups, 3]`, where [`Decode::groups`] is not 0: first row, number of rows, and tokens that these rows share, a
/// multiple of `block_size`. The blocks that hold them are the first entries of the first row's table, which are read once for
/// the whole group. The rows of a group follow one another, no row is in two groups, and every used row of a group is at least
/// as long as its prefix. A group of no rows or no tokens is none. Rows in no group attend alone.
pub fn plan(
    gpu: &Gpu,
    decode: &Decode,
    lengths: &Buffer<i32>,
    groups: Option<&Buffer<i32>>,
    scratch: &Scratch,
) -> Result<(), GpuError> {
    todo!()
}

/// `out = softmax(scale * q · keysᵀ) · values` for every query head over the whole sequence of its row, for one layer, by the
/// work list that [`plan`] made for the same `decode`.
pub fn attend<T: Float>(
    gpu: &Gpu,
    decode: &Decode,
    operands: &Operands<'_, T>,
    scratch: &Scratch,
) -> Result<(), GpuError> {
    todo!()
}
