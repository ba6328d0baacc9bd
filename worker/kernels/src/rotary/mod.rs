//! Splits packed queries, keys and values, turns them by their positions and stores keys and values.
//!
//! One kernel serves every tower: which position axis turns a pair is a table, so that plain RoPE, the sections of M-RoPE and
//! the two axes of a vision tower differ in data alone. The bias, the rotation, the rows for attention and the write to the paged
//! pool are one pass over the packed rows.

#[cfg(feature = "cuda")]
mod check;
#[cfg(feature = "cuda")]
mod launch;
pub mod reference;

#[cfg(feature = "cuda")]
pub use launch::{Cache, Heads, SplitInto, Turn, backward, split, split_parts};

#[cfg(feature = "cuda")]
use crate::{bench::Case, check::Check, gpu::source::Source};

#[cfg(feature = "cuda")]
static SOURCE: Source = Source {
    name: "rotary",
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
        "ELEM=bf16 TOKENS=1",
        "ELEM=bf16 TOKENS=2",
        "ELEM=bf16 TOKENS=1 PACK=1",
        "ELEM=float TOKENS=1",
    ];
    let defines = |build: &str| build.split(' ').map(str::to_owned).collect();
    builds.iter().map(|build| (&SOURCE, defines(build))).collect()
}
