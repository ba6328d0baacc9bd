//! Calls of the split with rotation.

use super::SOURCE;
use crate::{
    Buffer, Float, Gpu, GpuError, ShapeError,
    gpu::{
        launch::{Arg, Grid},
        source::Kernel,
    },
    rows::pack,
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
    /// `[head_dim / 2]`, each below `axes`.
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
    todo!()
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
    todo!()
}
