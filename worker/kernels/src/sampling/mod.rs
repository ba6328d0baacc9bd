//! Draws tokens from logits.
//!
//! A row is one sequence's logits over the vocabulary. The rules are those of the engine's sampler on the CPU: logits are
//! divided by the temperature; `top_k`, then `top_p` of what is left, then `min_p` cut tokens off; of the rest the one is taken
//! at which the cumulated probability exceeds `uniform`. It is cumulated in falling probability where `top_k` or `top_p` cut,
//! otherwise in the order of the ids, so that the same number gives the token that it gives on the CPU, but for the rounding of
//! sums. One thing differs: where more than [`reference::MOST_SORTED`] tokens are left, which the CPU would sort, the order is
//! that of the ids too: the same distribution, but other tokens for the same numbers.
//!
//! A cluster of eight blocks keeps a row in its shared memory, so that logits are read from memory once. The highest logits of
//! 128 groups of threads give a bound that the `top_k` most likely tokens reach, and few others: those are sent to one block
//! while the weights are summed, and sorted there. Where they are not enough, passes over the shared memory narrow a bracket
//! around the last token that is kept: each measures how many tokens, and how much probability, lie above eight pivots, until at
//! most 1,024 tokens are between, whose order settles everything, ties by ids included.
//!
//! Sums over threads are fixed-point numbers and do not depend on an order: a row gives the same token, bit for bit, wherever in
//! a batch it is.

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
