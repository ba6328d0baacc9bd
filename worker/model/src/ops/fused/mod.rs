//! The operations for the CPU in f32, each one pass over its rows, each with its own backward.
//!
//! Candle's composed operations make a temporary for each step and its backward adds each gradient to a zeroed one;
//! for the small models of a laptop that costs more than the matrix products.
//!
//! # Layout
//!
//! | file | what it is |
//! |---|---|
//! | `norm.rs` | root mean square normalization |
//! | `linear.rs` | matrix product with bias; no work on gradients that nobody asked for |
//! | `gate.rs` | `silu(gate) * up` |
//! | `rotate.rs` | rotary embedding of queries and keys |
//! | `attention.rs` | softmax attention within segments |
//! | `paged.rs` | attention over blocks of keys and values |
//! | `blocks.rs` | what is written into the blocks |
//! | `log_prob.rs` | log-probabilities of given tokens |
//! | `lanes.rs` | sums over rows and the exponential in a form that compilers turn into vector instructions |

mod attention;
mod blocks;
mod gate;
mod lanes;
mod linear;
mod log_prob;
mod norm;
mod paged;
mod rotate;

pub(super) use attention::{LONGEST, attention};
pub(super) use blocks::{copy_blocks, store};
use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, bail};
pub(super) use gate::swiglu;
pub(super) use linear::linear;
pub(super) use log_prob::log_probs;
pub(super) use norm::rms_norm;
pub(super) use paged::{chunk_attention, next_attention};
pub(super) use rotate::rotate;

/// Runs `work` compiled for wide vector registers where the processor has them. That compiles what is inlined into it:
/// closures and functions given to it are `#[inline(always)]`.
#[inline(always)]
fn vectorize<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V3::try_new() {
        return pulp::Simd::vectorize(simd, work);
    }
    work()
}

/// The values of a contiguous f32 operand.
fn operand<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let values = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&values[start..end]),
        None => bail!("a fused operation needs contiguous operands"),
    }
}

/// The values of a contiguous f32 tensor on the CPU.
fn values<'a>(storage: &'a Storage, layout: &Layout) -> Result<&'a [f32]> {
    match storage {
        Storage::Cpu(storage) => operand(storage, layout),
        _ => bail!("a fused operation needs operands on the CPU"),
    }
}

/// A tensor of the shape of `like`.
fn tensor_like(values: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(values, like.shape(), like.device())
}
