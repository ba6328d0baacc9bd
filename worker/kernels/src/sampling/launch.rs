//! Calls of the kernels.

use super::KERNELS;
use crate::{
    Buffer, Float, Gpu, GpuError, ShapeError,
    gpu::{launch::Grid, source::Kernel},
};

/// Threads of a block.
const THREADS: u32 = 512;
/// Blocks of a cluster, which share a row.
const BLOCKS: usize = 8;
/// Bytes of shared memory before the logits: `SHARED_BYTES` of the kernels.
const SHARED_BYTES: usize = 30 << 10;
/// The largest vocabulary: an eighth of it fits into shared memory as f32, and sums of fixed-point weights do not overflow.
const MOST_TOKENS: usize = 1 << 18;
/// The most tokens of [`top_log_probs`].
pub const MOST_TOP: usize = 20;

/// Logits `[rows, vocabulary]`.
#[derive(Clone, Copy, Debug)]
pub struct Draws {
    /// Sequences that each draw one token.
    pub rows: usize,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
}

/// How each row is drawn, each `[rows]` on the device, so that a recorded step can be repeated with others.
#[derive(Clone, Copy, Debug)]
pub struct Parameters<'a> {
    /// What logits are divided by; 0 takes the most likely token, of equals the one with the lowest id.
    pub temperature: &'a Buffer<f32>,
    /// Keeps that many of the most likely tokens, of equals those with the lowest ids; 0 keeps all.
    pub top_k: &'a Buffer<u32>,
    /// Keeps the fewest of the most likely tokens that reach this share of the probability that `top_k` has left; 1 keeps all.
    pub top_p: &'a Buffer<f32>,
    /// Keeps tokens that are at least this likely, as a share of the probability of the most likely; 0 keeps all.
    pub min_p: &'a Buffer<f32>,
    /// In [0, 1): where in the cumulated probability of the kept tokens the drawn one lies. The host draws it from the
    /// generator of the sequence, so that a seed gives the same token whatever else is in the batch.
    pub uniform: &'a Buffer<f32>,
}

/// What is drawn, each `[rows]`.
#[derive(Clone, Copy, Debug)]
pub struct Drawn<'a> {
    /// The token, or [`BROKEN`](super::BROKEN).
    pub token: &'a Buffer<u32>,
    /// Its log-probability in the tempered distribution before anything is cut off; at temperature 0 as at 1. NaN if broken.
    pub log_prob: &'a Buffer<f32>,
    /// Its log-probability at temperature 1. NaN if broken.
    pub model_log_prob: &'a Buffer<f32>,
}

impl Draws {
    fn check<T: Float>(&self, kernel: &'static str, logits: &Buffer<T>) -> Result<(), ShapeError> {
        ShapeError::unless(kernel, (1..=MOST_TOKENS).contains(&self.vocabulary), || {
            format!("{} tokens, 1 to {MOST_TOKENS} are possible", self.vocabulary)
        })?;
        ShapeError::unless(kernel, self.rows < 1 << 28, || format!("{} rows", self.rows))?;
        ShapeError::length(kernel, "logits", logits.len(), self.rows * self.vocabulary)
    }

    /// Tokens of a block: parts begin at multiples of 16 bytes.
    fn part(&self) -> usize {
        self.vocabulary.div_ceil(BLOCKS).next_multiple_of(8)
    }

    fn kernel<T: Float>(&self, name: &'static str) -> (Kernel, Grid) {
        let grid = Grid::new(self.rows * BLOCKS, THREADS).shared(SHARED_BYTES + self.part() * T::DTYPE.bytes());
        (Kernel::new(&KERNELS, name, Some(T::DTYPE)), grid)
    }
}

/// Draws one token for each row of `logits [rows, vocabulary]`. Penalties, biases and constraints are not applied: rows that
/// have any are drawn on the host, or their logits are changed before.
pub fn draw<T: Float>(
    gpu: &Gpu,
    draws: &Draws,
    logits: &Buffer<T>,
    parameters: &Parameters<'_>,
    drawn: &Drawn<'_>,
) -> Result<(), GpuError> {
    const NAME: &str = "sampling_draw";
    draws.check(NAME, logits)?;
    let rows = draws.rows;
    for (operand, length) in [
        ("temperature", parameters.temperature.len()),
        ("top_k", parameters.top_k.len()),
        ("top_p", parameters.top_p.len()),
        ("min_p", parameters.min_p.len()),
        ("uniform", parameters.uniform.len()),
        ("token", drawn.token.len()),
        ("log_prob", drawn.log_prob.len()),
        ("model_log_prob", drawn.model_log_prob.len()),
    ] {
        ShapeError::length(NAME, operand, length, rows)?;
    }
    let (kernel, grid) = draws.kernel::<T>(NAME);
    gpu.launch(
        &kernel,
        grid,
        &[
            logits.into(),
            draws.vocabulary.into(),
            draws.part().into(),
            parameters.temperature.into(),
            parameters.top_k.into(),
            parameters.top_p.into(),
            parameters.min_p.into(),
            parameters.uniform.into(),
            drawn.token.into(),
            drawn.log_prob.into(),
            drawn.model_log_prob.into(),
        ],
    )
}

/// The `count` (at most [`MOST_TOP`]) most likely tokens of each row at temperature 1, most likely first, of equals the lower id
/// first: `ids` and `log_probs`, each `[rows, count]`. Beyond the vocabulary, and in a broken row, ids are
/// [`BROKEN`](super::BROKEN) and log-probabilities NaN.
pub fn top_log_probs<T: Float>(
    gpu: &Gpu,
    draws: &Draws,
    logits: &Buffer<T>,
    count: usize,
    ids: &Buffer<u32>,
    log_probs: &Buffer<f32>,
) -> Result<(), GpuError> {
    const NAME: &str = "sampling_top";
    draws.check(NAME, logits)?;
    ShapeError::unless(NAME, count <= MOST_TOP, || {
        format!("{count} tokens, at most {MOST_TOP} are possible")
    })?;
    ShapeError::length(NAME, "ids", ids.len(), draws.rows * count)?;
    ShapeError::length(NAME, "log_probs", log_probs.len(), draws.rows * count)?;
    if count == 0 {
        return Ok(());
    }
    let (kernel, grid) = draws.kernel::<T>(NAME);
    gpu.launch(
        &kernel,
        grid,
        &[
            logits.into(),
            draws.vocabulary.into(),
            draws.part().into(),
            count.into(),
            ids.into(),
            log_probs.into(),
        ],
    )
}
