//! Log-probability, entropy and cross-entropy over a vocabulary, never holding all logits.
//!
//! The logits of 4,096 tokens over a vocabulary of 152,064 would be 2.5 GB in f32. Here they exist a chunk at a time: a matrix
//! product writes a chunk of them in f32, and a kernel folds it into four numbers of each row. Backward computes them again,
//! turns each chunk into gradients, and multiplies those with the weight and the hidden states.
//!
//! Logits are never rounded to bf16: the sampler draws from f32 logits, and this computes with f32 logits too, so that the
//! log-probability of a drawn token is the same in both but for the order of sums. Their gradients are rounded to the format of
//! the weight, because tensor cores multiply them with it; sums over the vocabulary stay in f32.
//!
//! With `z` the logits divided by the temperature, `p` their softmax, `H` its entropy and `t` the target,
//! `log_prob = z[t] - logsumexp(z)`, `H = logsumexp(z) - Σ p z`, and the gradient of a loss by a logit is
//! `(d_log_prob (1[t] - p) - d_entropy p (ln p + H)) / temperature`.

#[cfg(feature = "cuda")]
mod check;
#[cfg(feature = "cuda")]
mod launch;
pub mod reference;

#[cfg(feature = "cuda")]
use crate::{bench::Case, check::Check, gpu::source::Source};

#[cfg(feature = "cuda")]
pub use launch::{Losses, Scores, Vocabulary, backward, forward};

#[cfg(feature = "cuda")]
static KERNELS: Source = Source {
    name: "vocabulary",
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
        (&KERNELS, Vec::new()),
        (&KERNELS, vec!["ELEM=float".to_owned()]),
        (&KERNELS, vec!["ELEM=bf16".to_owned()]),
    ]
}
