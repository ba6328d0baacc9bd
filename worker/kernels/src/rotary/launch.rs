//! Calls of the split with rotation.

use super::SOURCE;
use crate::{
    Buffer, Dtype, Float, Gpu, GpuError, ShapeError,
    gpu::{launch::Grid, source::Kernel},
    rows::{Summed, pack},
};

/// Shape of packed queries, keys and values: each token has `(heads + 2 * kv_heads) * head_dim` numbers, queries first, then
/// keys, then values.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Heads {
    /// Rows of the packed matrix.
    pub tokens: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys, and of values.
    pub kv_heads: usize,
    /// Numbers of a head: even, at most 512.
    pub head_dim: usize,
}

/// How queries and keys are turned. Pair `i` of a head is its numbers `i` and `i + head_dim / 2` (Hugging Face's half
/// rotation); its angle is the f32 product `position * frequencies[i]`, where the position is that of axis `axis_of[i]`.
/// Plain RoPE has one axis; M-RoPE has three and, with sections `[16, 24, 24]`, 16 zeros, 24 ones and 24 twos; the vision
/// tower of Qwen has two, half of the pairs each.
#[derive(Clone, Copy, Debug)]
pub struct Turn<'a> {
    /// Axes of the positions.
    pub axes: usize,
    /// `[axes, tokens]`.
    pub positions: &'a Buffer<i32>,
    /// `[head_dim / 2]`, radians per position.
    pub frequencies: &'a Buffer<f32>,
    /// `[head_dim / 2]`, each below `axes`; a pair of any other is not turned.
    pub axis_of: &'a Buffer<u8>,
}

/// Where keys and values are kept for decoding: the pool of one layer.
#[derive(Clone, Copy, Debug)]
pub struct Cache<'a, T> {
    /// `[blocks, kv_heads, block_size, head_dim]`.
    pub keys: &'a Buffer<T>,
    /// As the keys.
    pub values: &'a Buffer<T>,
    /// `[tokens]`: `block * block_size + offset`. A negative one, or one beyond the pool, is not written.
    pub slots: &'a Buffer<i32>,
    /// Tokens of a block: a power of two.
    pub block_size: usize,
}

/// What [`split`] writes.
#[derive(Clone, Copy, Debug)]
pub struct SplitInto<'a, T> {
    /// Turned queries, `[tokens, heads, head_dim]`.
    pub q: &'a Buffer<T>,
    /// Turned keys, `[tokens, kv_heads, head_dim]`.
    pub k: Option<&'a Buffer<T>>,
    /// Values, `[tokens, kv_heads, head_dim]`.
    pub v: Option<&'a Buffer<T>>,
    /// The pool.
    pub cache: Option<Cache<'a, T>>,
}

/// Splits `qkv` `[tokens, (heads + 2 * kv_heads) * head_dim]` after adding `bias` `[(heads + 2 * kv_heads) * head_dim]`, turns
/// queries and keys (`turn` is `None` where a tower has no rotary embedding), and writes each where it is wanted, all in one
/// pass in f32 with one rounding. May be recorded in a graph: positions and slots are read on the card.
pub fn split<T: Float>(
    gpu: &Gpu,
    shape: Heads,
    qkv: &Buffer<T>,
    bias: Option<&Buffer<T>>,
    turn: Option<Turn<'_>>,
    into: SplitInto<'_, T>,
) -> Result<(), GpuError> {
    ShapeError::at_least("rotary_split", "qkv", qkv.len(), shape.tokens * shape.row())?;
    split_rows(gpu, shape, Summed::Whole(qkv), bias, turn, into)
}

/// [`split`] of a product whose sums are in parts (`streamed::parts`): `parts` `[count, tokens, (heads + 2 * kv_heads) * head_dim]` are added up in
/// their order and rounded to `T` before anything else.
pub fn split_parts<T: Float>(
    gpu: &Gpu,
    shape: Heads,
    (parts, count): (&Buffer<f32>, usize),
    bias: Option<&Buffer<T>>,
    turn: Option<Turn<'_>>,
    into: SplitInto<'_, T>,
) -> Result<(), GpuError> {
    ShapeError::at_least("rotary_split", "parts", parts.len(), count * shape.tokens * shape.row())?;
    split_rows(gpu, shape, Summed::Parts(parts, count), bias, turn, into)
}

fn split_rows<T: Float>(
    gpu: &Gpu,
    shape: Heads,
    qkv: Summed<'_, T>,
    bias: Option<&Buffer<T>>,
    turn: Option<Turn<'_>>,
    into: SplitInto<'_, T>,
) -> Result<(), GpuError> {
    const NAME: &str = "rotary_split";
    let SplitInto { q, k, v, cache } = into;
    let row = shape.row();
    let pairs = shape.check(NAME, turn)?;
    ShapeError::at_least(NAME, "q", q.len(), shape.tokens * shape.heads * shape.head_dim)?;
    let (whole, parts, count) = qkv.operands();
    let mut addresses = vec![qkv.pointer(), q.pointer()];
    if let Some(bias) = bias {
        ShapeError::length(NAME, "bias", bias.len(), row)?;
        addresses.push(bias.pointer());
    }
    for (name, rows) in [("k", k), ("v", v)] {
        if let Some(rows) = rows {
            ShapeError::at_least(NAME, name, rows.len(), shape.tokens * shape.kv_heads * shape.head_dim)?;
            addresses.push(rows.pointer());
        }
    }
    let (mut bits, mut capacity) = (0, 0);
    if let Some(cache) = cache {
        let size = cache.block_size;
        let block = shape.kv_heads * size * shape.head_dim;
        ShapeError::unless(NAME, size.is_power_of_two(), || format!("blocks of {size} tokens"))?;
        ShapeError::unless(NAME, block > 0 && cache.keys.len().is_multiple_of(block), || {
            format!("{} keys are not whole blocks of {block}", cache.keys.len())
        })?;
        ShapeError::length(NAME, "values", cache.values.len(), cache.keys.len())?;
        ShapeError::at_least(NAME, "slots", cache.slots.len(), shape.tokens)?;
        addresses.extend([cache.keys.pointer(), cache.values.pointer()]);
        bits = size.trailing_zeros() as usize;
        capacity = cache.keys.len() / block * size;
        ShapeError::unless(NAME, capacity < 1 << 31, || format!("a pool of {capacity} tokens"))?;
    }
    let (kernel, grid) = shape.kernel(gpu, NAME, T::DTYPE, pack::<T>(pairs, &addresses));
    gpu.launch(
        &kernel.define("IN_PARTS", usize::from(parts.is_some())),
        grid.early(),
        &[
            whole.into(),
            parts.into(),
            count.into(),
            bias.into(),
            turn.map(|turn| turn.positions).into(),
            turn.map(|turn| turn.frequencies).into(),
            turn.map(|turn| turn.axis_of).into(),
            turn.map_or(0, |turn| turn.axes).into(),
            q.into(),
            k.into(),
            v.into(),
            cache.map(|cache| cache.keys).into(),
            cache.map(|cache| cache.values).into(),
            cache.map(|cache| cache.slots).into(),
            shape.tokens.into(),
            shape.heads.into(),
            shape.kv_heads.into(),
            pairs.into(),
            bits.into(),
            capacity.into(),
        ],
    )
}

/// Gradient of [`split`] with respect to `qkv`: turns `dq` `[tokens, heads, head_dim]` and `dk` `[tokens, kv_heads, head_dim]`
/// back and packs them with `dv` into `d_qkv`. The bias's gradient is [`crate::activation::bias_gradient`] of `d_qkv`.
pub fn backward<T: Float>(
    gpu: &Gpu,
    shape: Heads,
    turn: Option<Turn<'_>>,
    (dq, dk, dv): (&Buffer<T>, &Buffer<T>, &Buffer<T>),
    d_qkv: &Buffer<T>,
) -> Result<(), GpuError> {
    const NAME: &str = "rotary_backward";
    let pairs = shape.check(NAME, turn)?;
    let of_keys = shape.tokens * shape.kv_heads * shape.head_dim;
    ShapeError::at_least(NAME, "dq", dq.len(), shape.tokens * shape.heads * shape.head_dim)?;
    ShapeError::at_least(NAME, "dk", dk.len(), of_keys)?;
    ShapeError::at_least(NAME, "dv", dv.len(), of_keys)?;
    ShapeError::at_least(NAME, "d_qkv", d_qkv.len(), shape.tokens * shape.row())?;
    let addresses = [dq.pointer(), dk.pointer(), dv.pointer(), d_qkv.pointer()];
    let (kernel, grid) = shape.kernel(gpu, NAME, T::DTYPE, pack::<T>(pairs, &addresses));
    gpu.launch(
        &kernel,
        grid,
        &[
            dq.into(),
            dk.into(),
            dv.into(),
            turn.map(|turn| turn.positions).into(),
            turn.map(|turn| turn.frequencies).into(),
            turn.map(|turn| turn.axis_of).into(),
            turn.map_or(0, |turn| turn.axes).into(),
            d_qkv.into(),
            shape.tokens.into(),
            shape.heads.into(),
            shape.kv_heads.into(),
            pairs.into(),
        ],
    )
}

impl Heads {
    /// Numbers of a token.
    fn row(self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Checks a head and how it is turned; gives its pairs.
    fn check(self, kernel: &'static str, turn: Option<Turn<'_>>) -> Result<usize, ShapeError> {
        let dim = self.head_dim;
        ShapeError::unless(kernel, dim.is_multiple_of(2) && (2..=512).contains(&dim), || {
            format!("heads of {dim} numbers")
        })?;
        if let Some(turn) = turn {
            ShapeError::at_least(kernel, "positions", turn.positions.len(), turn.axes * self.tokens)?;
            ShapeError::length(kernel, "frequencies", turn.frequencies.len(), dim / 2)?;
            ShapeError::length(kernel, "axis_of", turn.axis_of.len(), dim / 2)?;
        }
        Ok(dim / 2)
    }

    /// A thread for each pack of pairs of a token; where there are many tokens, small blocks that have two of them each.
    fn kernel(self, gpu: &Gpu, name: &'static str, dtype: Dtype, pack: usize) -> (Kernel, Grid) {
        let pairs = self.head_dim / 2;
        let items = (self.heads + 2 * self.kv_heads) * pairs / pack;
        let (tokens, most) = if self.tokens <= 4 * gpu.processors() {
            (1, 512)
        } else {
            (2, 256)
        };
        let threads = items.div_ceil(items.div_ceil(most)).next_multiple_of(32);
        let kernel = Kernel::new(&SOURCE, name, Some(dtype))
            .define("PACK", pack)
            .define("TOKENS", tokens);
        let grid = Grid::new(self.tokens.div_ceil(tokens), u32::try_from(threads).unwrap_or(u32::MAX));
        (kernel, grid.shared(2 * tokens * pairs * size_of::<f32>()))
    }
}
