//! Draws tokens from logits.
//!
//! A row is one sequence's logits over the vocabulary. The rules are those of the engine's sampler on the CPU: logits are
//! divided by the temperature; `top_k`, then `top_p` of what is left, then `min_p` cut tokens off; of the rest the one is taken
//! at which the cumulated probability exceeds `uniform`. Two things differ. The CPU cumulates in falling probability when
//! `top_k` or `top_p` cuts anything off and in the order of the ids otherwise; here it is always the order of the ids, so a
//! truncated draw has the same distribution, but not the same token for the same number. And `uniform` is an f32.
//!
//! Nothing is sorted but a few candidates. A cluster of eight blocks keeps a row in its shared memory, so that logits are read
//! from memory once, and narrows a bracket around the last token that is kept: each pass measures how many tokens, and how much
//! probability, lie above eight pivots. When at most 1,024 tokens are between, they are sorted, which settles ties by ids.
//! Cumulated probabilities are fixed-point numbers: their sums do not depend on an order, and a row gives the same token
//! bit for bit wherever in a batch it is.

#[cfg(feature = "cuda")]
mod check;
#[cfg(feature = "cuda")]
mod launch;
pub mod reference;

#[cfg(feature = "cuda")]
use crate::{bench::Case, check::Check, gpu::source::Source};

#[cfg(feature = "cuda")]
pub use launch::{Drawn, Draws, MOST_TOP, Parameters, draw, top_log_probs};

/// In place of a token: the logits give no distribution (a NaN, a positive infinity, or nothing finite).
pub const BROKEN: u32 = u32::MAX;

#[cfg(feature = "cuda")]
static KERNELS: Source = Source {
    name: "sampling",
    text: include_str!("kernel.cu"),
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
    vec![
        (&KERNELS, vec!["ELEM=float".to_owned()]),
        (&KERNELS, vec!["ELEM=bf16".to_owned()]),
    ]
}
