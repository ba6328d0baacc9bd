//! RMSNorm and LayerNorm with the residual that they follow.
//!
//! A row stays in the registers of its block from the load to the store, so that each byte is moved once: the sum with the
//! residual, the statistics and the scaling are one pass. The weight's gradient of RMSNorm is summed without atomics, per block
//! and then over blocks, so that equal inputs give equal bits.

#[cfg(feature = "cuda")]
mod check;
#[cfg(feature = "cuda")]
mod launch;
pub mod reference;

#[cfg(feature = "cuda")]
pub use launch::{
    Norm, RmsNormBackward, layer_norm, rms_norm, rms_norm_backward, rms_norm_backward_scratch, rms_norm_of_parts,
};

#[cfg(feature = "cuda")]
use crate::{bench::Case, check::Check, gpu::source::Source};

#[cfg(feature = "cuda")]
static SOURCE: Source = Source {
    name: "norm",
    text: concat!(include_str!("../rows/pack.cu"), include_str!("kernel.cu")),
};

/// Parity with the reference.
#[cfg(feature = "cuda")]
pub fn checks() -> Vec<Check> {
    check::checks()
}

/// Speed beside the floor.
#[cfg(feature = "cuda")]
pub fn cases() -> Vec<Case> {
    check::cases()
}

/// Sources with the constants of their builds.
#[cfg(feature = "cuda")]
pub fn sources() -> Vec<(&'static Source, Vec<String>)> {
    let builds = [
        "ELEM=bf16 THREADS=224 VECTORS=2",
        "ELEM=bf16 THREADS=448 VECTORS=1",
        "ELEM=bf16 THREADS=448 VECTORS=1 IN_PARTS=1",
        "ELEM=bf16 THREADS=1024 VECTORS=8 PACK=1",
        "ELEM=float THREADS=896 VECTORS=1",
    ];
    let defines = |build: &str| build.split(' ').map(str::to_owned).collect();
    builds.iter().map(|build| (&SOURCE, defines(build))).collect()
}
