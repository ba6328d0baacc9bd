//! Learning the vision tower of Qwen2.5-VL in place, together with the language model.
//!
//! | file | what it is |
//! |---|---|
//! | `plan.rs` | bytes of it, before anything is allocated |
//! | `gradients.rs` | one gradient per weight |
//! | `buffers.rs` | memory of a chunk of patches, allocated once |
//! | `block.rs` | one block, forward and backward |
//! | `passes.rs` | the whole tower, from the gradients by the features of pictures |
//! | `check.rs` | parity with the host's autograd, determinism, what an update changes |
//!
//! Within an update the weights stand still, so the gradients by the features of a picture are summed over all samples that
//! show it, and the tower's passes run once for each picture.

pub(super) mod plan;

pub use plan::encoding_bytes;

#[cfg(feature = "cuda")]
mod block;
#[cfg(feature = "cuda")]
mod buffers;
#[cfg(feature = "cuda")]
pub(super) mod check;
#[cfg(feature = "cuda")]
mod gradients;
#[cfg(feature = "cuda")]
mod passes;

#[cfg(feature = "cuda")]
pub(super) use passes::TowerLearner;
