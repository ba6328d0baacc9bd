//! Attention of many query tokens: prefill over paged keys, training with its backward, windows of a vision tower.

#[cfg(feature = "cuda")]
mod launch;

#[cfg(feature = "cuda")]
use crate::{bench::Case, check::Check, gpu::source::Source};

#[cfg(feature = "cuda")]
pub use launch::{Attention, Gradients, Pool, Rows, Saved, Segments, backward, backward_scratch, forward, prefill};

/// Parity with the reference.
#[cfg(feature = "cuda")]
pub fn checks() -> Vec<Check> {
    Vec::new()
}

/// Speed beside the floor.
#[cfg(feature = "cuda")]
pub fn cases() -> Vec<Case> {
    Vec::new()
}

/// Sources with the constants of their builds.
#[cfg(feature = "cuda")]
pub fn sources() -> Vec<(&'static Source, Vec<String>)> {
    Vec::new()
}
