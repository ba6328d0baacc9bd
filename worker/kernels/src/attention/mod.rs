//! Attention of many query tokens: prefill over paged keys, training with its backward, windows of a vision tower.
//!
//! Three sources compute the same: `simple.cu` every shape and format on plain cores, `tensor.cu` bf16 by `mma.sync` on every
//! card with bf16 tensor cores, `hopper.cu` bf16 by `wgmma`. `tiles.cu` comes before each: segments and block tables are on the
//! device, and a block finds its tile there.

pub mod reference;

#[cfg(feature = "cuda")]
mod bench;
#[cfg(feature = "cuda")]
mod check;
#[cfg(feature = "cuda")]
mod launch;
#[cfg(feature = "cuda")]
mod shapes;

#[cfg(feature = "cuda")]
use crate::{bench::Case, check::Check, gpu::source::Source};

#[cfg(feature = "cuda")]
pub use launch::{Gradients, Pool, Rows, Saved, Segments, backward, backward_scratch, forward, prefill};

/// Heads and the rule of who sees whom.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Heads of the queries: a multiple of `kv_heads`. Query head `h` reads key head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Numbers of one head, at most 256. Tensor cores are used for bf16 and multiples of 8 up to 128.
    pub head_dim: usize,
    /// Factor of the scores, as `1 / sqrt(head_dim)`; above zero.
    pub scale: f32,
    /// Whether query `i` of a segment sees keys up to `keys - queries + i` alone (the last query sees all), or all keys of its
    /// segment.
    pub causal: bool,
}

#[cfg(feature = "cuda")]
static SIMPLE: Source = Source {
    name: "attention_simple",
    text: concat!(include_str!("tiles.cu"), include_str!("simple.cu")),
};

#[cfg(feature = "cuda")]
static TENSOR: Source = Source {
    name: "attention_tensor",
    text: concat!(include_str!("tiles.cu"), include_str!("tensor.cu")),
};

#[cfg(feature = "cuda")]
static HOPPER: Source = Source {
    name: "attention_hopper",
    text: concat!(
        include_str!("tiles.cu"),
        include_str!("../gpu/barriers.cu"),
        include_str!("../gpu/wgmma.cu"),
        include_str!("hopper.cu")
    ),
};

/// Parity with the reference.
#[cfg(feature = "cuda")]
pub fn checks() -> Vec<Check> {
    check::checks()
}

/// Speed beside the floor.
#[cfg(feature = "cuda")]
pub fn cases() -> Vec<Case> {
    bench::cases()
}

/// Sources with the constants of their builds.
#[cfg(feature = "cuda")]
pub fn sources() -> Vec<(&'static Source, Vec<String>)> {
    [
        (&SIMPLE, "ELEM=float HEAD_DIM=128 CAUSAL=1 PAGED=0"),
        (&SIMPLE, "ELEM=float HEAD_DIM=128 CAUSAL=1 PAGED=1"),
        (&TENSOR, "ELEM=bf16 HEAD_DIM=128 CAUSAL=1 PAGED=0 FORWARD WARP_TILES=2"),
        (&TENSOR, "ELEM=bf16 HEAD_DIM=128 CAUSAL=1 PAGED=1 FORWARD WARP_TILES=2"),
        (&TENSOR, "ELEM=bf16 HEAD_DIM=80 CAUSAL=0 PAGED=0 FORWARD WARP_TILES=1"),
        (&TENSOR, "ELEM=bf16 HEAD_DIM=128 CAUSAL=1 PAGED=0 BACKWARD"),
        (&HOPPER, "ELEM=bf16 HEAD_DIM=128 CAUSAL=1 PAGED=0 FORWARD"),
        (&HOPPER, "ELEM=bf16 HEAD_DIM=128 CAUSAL=1 PAGED=1 FORWARD"),
        (&HOPPER, "ELEM=bf16 HEAD_DIM=80 CAUSAL=0 PAGED=0 FORWARD"),
        (&HOPPER, "ELEM=bf16 HEAD_DIM=128 CAUSAL=1 PAGED=0 BACKWARD"),
    ]
    .map(|(source, defines)| (source, defines.split(' ').map(str::to_owned).collect()))
    .into()
}
