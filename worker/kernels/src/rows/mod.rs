//! Rows moved: embeddings, features into their places, conversions, random weights.

#[cfg(feature = "cuda")]
use crate::{bench::Case, check::Check, gpu::source::Source};

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
