//! Calls of the kernels.

use super::KERNELS;
use crate::{
    Buffer, Float, Gemm, Gpu, GpuError, ShapeError,
    gpu::{launch::Grid, source::Kernel},
};

/// Threads of a block; a block takes a row of a chunk.
const THREADS: u32 = 128;
/// Where parts of the scratch memory begin, in bytes.
const ALIGNMENT: usize = 256;
/// Floats of a row's state between chunks: highest logit, sum, weighted sum, the target's logit.
const STATE: usize = 4;

/// A head: logits `hidden · weightᵀ` of `rows` tokens over a vocabulary, divided by a temperature. Logits exist for
/// `row_chunk x vocabulary_chunk` at a time, in f32 as they leave the tensor cores.
#[derive(Clone, Copy, Debug)]
pub struct Vocabulary {
    /// Tokens.
    pub rows: usize,
    /// Numbers of a hidden state.
    pub width: usize,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// What logits are divided by, above 0. That of the sampler, so that ratios of log-probabilities are of one distribution.
    pub temperature: f32,
    /// Rows at a time.
    pub row_chunk: usize,
    /// Tokens of the vocabulary at a time, a multiple of 8.
    pub vocabulary_chunk: usize,
}

/// What [`forward`] writes, each `[rows]`.
#[derive(Clone, Copy, Debug)]
pub struct Scores<'a> {
    /// Natural logarithm of the target's probability: minus the cross-entropy. 0 in ignored rows; minus infinity for a target
    /// outside the vocabulary.
    pub log_prob: &'a Buffer<f32>,
    /// Entropy of the distribution in nats. 0 in ignored rows.
    pub entropy: Option<&'a Buffer<f32>>,
    /// Logarithm of the sum of the exponentials of the divided logits, for [`backward`].
    pub lse: &'a Buffer<f32>,
}

/// What [`backward`] needs to know of the loss, each `[rows]`.
#[derive(Clone, Copy, Debug)]
pub struct Losses<'a> {
    /// As [`forward`] wrote it.
    pub lse: &'a Buffer<f32>,
    /// Gradient of the loss by each log-probability. Not read in ignored rows.
    pub d_log_prob: &'a Buffer<f32>,
    /// The entropy as [`forward`] wrote it, and the gradient of the loss by it.
    pub entropy: Option<(&'a Buffer<f32>, &'a Buffer<f32>)>,
}

impl Vocabulary {
    /// With chunks that were the fastest on an H100 and an H200: whole waves of tiles of 128 x 256 on 132 multiprocessors.
    /// Smaller ones, whose logits stay in the cache, lose more in the products than they save in the reductions.
    ///
    /// Products are planned for each number of rows that is met: pad ragged batches with ignored rows.
    pub fn new(rows: usize, width: usize, vocabulary: usize, temperature: f32) -> Self {
        Self {
            rows,
            width,
            vocabulary,
            temperature,
            row_chunk: rows.clamp(1, 4096),
            vocabulary_chunk: vocabulary.next_multiple_of(8).clamp(8, 8448),
        }
    }

    /// Bytes of scratch memory that [`forward`] needs.
    pub fn forward_bytes(&self) -> usize {
        self.logits_bytes() + self.state_bytes()
    }

    /// Bytes of scratch memory that [`backward`] needs for activations `T`.
    pub fn backward_bytes<T: Float>(&self) -> usize {
        self.logits_bytes() + self.d_logits_bytes::<T>() + self.d_hidden_bytes()
    }

    fn rows_at_once(&self) -> usize {
        self.row_chunk.min(self.rows)
    }

    fn logits_bytes(&self) -> usize {
        (self.rows_at_once() * self.vocabulary_chunk * size_of::<f32>()).next_multiple_of(ALIGNMENT)
    }

    fn state_bytes(&self) -> usize {
        self.rows_at_once() * STATE * size_of::<f32>()
    }

    fn d_logits_bytes<T: Float>(&self) -> usize {
        (self.rows_at_once() * self.vocabulary_chunk * T::DTYPE.bytes()).next_multiple_of(ALIGNMENT)
    }

    fn d_hidden_bytes(&self) -> usize {
        self.rows_at_once() * self.width * size_of::<f32>()
    }

    fn check<T: Float>(
        &self,
        kernel: &'static str,
        hidden: &Buffer<T>,
        weight: &Buffer<T>,
        targets: &Buffer<i32>,
    ) -> Result<(), ShapeError> {
        let sizes = [self.width, self.vocabulary, self.row_chunk];
        ShapeError::unless(kernel, sizes.iter().all(|size| *size > 0), || format!("{self:?}"))?;
        ShapeError::unless(
            kernel,
            self.vocabulary_chunk > 0 && self.vocabulary_chunk.is_multiple_of(8),
            || format!("{} tokens at a time are not a multiple of 8", self.vocabulary_chunk),
        )?;
        ShapeError::unless(kernel, self.temperature > 0.0 && self.temperature.is_finite(), || {
            format!("a temperature of {}", self.temperature)
        })?;
        ShapeError::unless(kernel, self.vocabulary < 1 << 31 && self.rows < 1 << 31, || {
            format!("{} rows, {} tokens", self.rows, self.vocabulary)
        })?;
        ShapeError::length(kernel, "hidden", hidden.len(), self.rows * self.width)?;
        ShapeError::length(kernel, "weight", weight.len(), self.vocabulary * self.width)?;
        ShapeError::length(kernel, "targets", targets.len(), self.rows)
    }

    /// First row and number of rows of each chunk.
    fn row_chunks(&self) -> impl Iterator<Item = (usize, usize)> {
        chunks(self.rows, self.row_chunk)
    }

    /// First token and number of tokens of each chunk.
    fn vocabulary_chunks(&self) -> impl Iterator<Item = (usize, usize)> {
        chunks(self.vocabulary, self.vocabulary_chunk)
    }

    /// `logits[count, tokens]`, rows `vocabulary_chunk` apart.
    fn logits<T: Float>(
        &self,
        gpu: &Gpu,
        (hidden, weight): (&Buffer<T>, &Buffer<T>),
        (rows, tokens): (usize, usize),
        logits: &Buffer<f32>,
    ) -> Result<(), GpuError> {
        let product = Gemm::linear(rows, tokens, self.width).strided(self.width, self.width, self.vocabulary_chunk);
        gpu.gemm(product, hidden, weight, logits)
    }
}

fn chunks(length: usize, chunk: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..length)
        .step_by(chunk.max(1))
        .map(move |first| (first, chunk.min(length - first)))
}

/// Log-probabilities of `targets [rows]` and, if asked for, entropies, from `hidden [rows, width]` and
/// `weight [vocabulary, width]`. A negative target marks a row to ignore. `scratch` has [`Vocabulary::forward_bytes`].
pub fn forward<T: Float>(
    gpu: &Gpu,
    vocabulary: &Vocabulary,
    hidden: &Buffer<T>,
    weight: &Buffer<T>,
    targets: &Buffer<i32>,
    scores: &Scores<'_>,
    scratch: &Buffer<u8>,
) -> Result<(), GpuError> {
    const NAME: &str = "vocabulary_forward";
    vocabulary.check(NAME, hidden, weight, targets)?;
    let rows = vocabulary.rows;
    ShapeError::length(NAME, "log_prob", scores.log_prob.len(), rows)?;
    ShapeError::length(NAME, "lse", scores.lse.len(), rows)?;
    if let Some(entropy) = scores.entropy {
        ShapeError::length(NAME, "entropy", entropy.len(), rows)?;
    }
    ShapeError::at_least(NAME, "scratch", scratch.len(), vocabulary.forward_bytes())?;
    let logits_bytes = vocabulary.logits_bytes();
    let logits = scratch.slice(0..logits_bytes)?.cast::<f32>()?;
    let state = scratch.slice(logits_bytes..vocabulary.forward_bytes())?.cast::<f32>()?;
    let kernel = Kernel::new(&KERNELS, NAME, None);
    let width = vocabulary.width;
    for (row, count) in vocabulary.row_chunks() {
        let hidden = hidden.slice(row * width..(row + count) * width)?;
        let part = |buffer: &Buffer<f32>| buffer.slice(row..row + count);
        let (log_prob, lse) = (part(scores.log_prob)?, part(scores.lse)?);
        let entropy = scores.entropy.map(part).transpose()?;
        let targets = targets.slice(row..row + count)?;
        for (token, tokens) in vocabulary.vocabulary_chunks() {
            let weight = weight.slice(token * width..(token + tokens) * width)?;
            vocabulary.logits(gpu, (&hidden, &weight), (count, tokens), &logits)?;
            gpu.launch(
                &kernel,
                Grid::new(count, THREADS),
                &[
                    (&logits).into(),
                    vocabulary.vocabulary_chunk.into(),
                    token.into(),
                    tokens.into(),
                    vocabulary.vocabulary.into(),
                    (1.0 / vocabulary.temperature).into(),
                    (&targets).into(),
                    (&state).into(),
                    (&log_prob).into(),
                    entropy.as_ref().into(),
                    (&lse).into(),
                ],
            )?;
        }
    }
    Ok(())
}

/// Gradients of a loss by hidden states and weight: `d_hidden [rows, width]` is overwritten, to `d_weight
/// [vocabulary, width]`, if there is one, is added. Logits are computed again, chunk by chunk; their gradients are rounded to
/// `T` for the tensor cores, and sums over the vocabulary stay in f32. `scratch` has [`Vocabulary::backward_bytes`].
pub fn backward<T: Float, D: Float>(
    gpu: &Gpu,
    vocabulary: &Vocabulary,
    (hidden, weight, targets): (&Buffer<T>, &Buffer<T>, &Buffer<i32>),
    losses: &Losses<'_>,
    d_hidden: &Buffer<T>,
    d_weight: Option<&Buffer<D>>,
    scratch: &Buffer<u8>,
) -> Result<(), GpuError> {
    const NAME: &str = "vocabulary_backward";
    vocabulary.check(NAME, hidden, weight, targets)?;
    let (rows, width, chunk) = (vocabulary.rows, vocabulary.width, vocabulary.vocabulary_chunk);
    ShapeError::length(NAME, "lse", losses.lse.len(), rows)?;
    ShapeError::length(NAME, "d_log_prob", losses.d_log_prob.len(), rows)?;
    if let Some((entropy, d_entropy)) = losses.entropy {
        ShapeError::length(NAME, "entropy", entropy.len(), rows)?;
        ShapeError::length(NAME, "d_entropy", d_entropy.len(), rows)?;
    }
    ShapeError::length(NAME, "d_hidden", d_hidden.len(), rows * width)?;
    if let Some(d_weight) = d_weight {
        ShapeError::length(NAME, "d_weight", d_weight.len(), vocabulary.vocabulary * width)?;
    }
    ShapeError::at_least(NAME, "scratch", scratch.len(), vocabulary.backward_bytes::<T>())?;
    let logits_end = vocabulary.logits_bytes();
    let d_logits_end = logits_end + vocabulary.d_logits_bytes::<T>();
    let sums_end = d_logits_end + vocabulary.d_hidden_bytes();
    let logits = scratch.slice(0..logits_end)?.cast::<f32>()?;
    let d_logits = scratch.slice(logits_end..d_logits_end)?.cast::<T>()?;
    let sums = scratch.slice(d_logits_end..sums_end)?.cast::<f32>()?;
    let kernel = Kernel::new(&KERNELS, NAME, Some(T::DTYPE));
    let round = Kernel::new(&KERNELS, "vocabulary_round", Some(T::DTYPE));
    for (row, count) in vocabulary.row_chunks() {
        let hidden = hidden.slice(row * width..(row + count) * width)?;
        let part = |buffer: &Buffer<f32>| buffer.slice(row..row + count);
        let (lse, d_log_prob) = (part(losses.lse)?, part(losses.d_log_prob)?);
        let entropy = losses.entropy.map(|(entropy, _)| part(entropy)).transpose()?;
        let d_entropy = losses.entropy.map(|(_, gradient)| part(gradient)).transpose()?;
        let targets = targets.slice(row..row + count)?;
        for (token, tokens) in vocabulary.vocabulary_chunks() {
            let weight = weight.slice(token * width..(token + tokens) * width)?;
            vocabulary.logits(gpu, (&hidden, &weight), (count, tokens), &logits)?;
            gpu.launch(
                &kernel,
                Grid::new(count, THREADS),
                &[
                    (&logits).into(),
                    chunk.into(),
                    token.into(),
                    tokens.into(),
                    (1.0 / vocabulary.temperature).into(),
                    (&targets).into(),
                    (&lse).into(),
                    (&d_log_prob).into(),
                    entropy.as_ref().into(),
                    d_entropy.as_ref().into(),
                    (&d_logits).into(),
                ],
            )?;
            let by_hidden = Gemm::input_gradient(count, tokens, width).strided(chunk, width, width);
            let by_hidden = if token == 0 { by_hidden } else { by_hidden.accumulate() };
            gpu.gemm(by_hidden, &d_logits, &weight, &sums)?;
            if let Some(d_weight) = d_weight {
                let d_weight = d_weight.slice(token * width..(token + tokens) * width)?;
                let by_weight = Gemm::weight_gradient(count, tokens, width).strided(chunk, width, width);
                gpu.gemm(by_weight.accumulate(), &d_logits, &hidden, &d_weight)?;
            }
        }
        let numbers = count * width;
        let d_hidden = d_hidden.slice(row * width..row * width + numbers)?;
        gpu.launch(
            &round,
            Grid::new(numbers.div_ceil(8 * 256), 256),
            &[(&sums).into(), (&d_hidden).into(), (numbers as u64).into()],
        )?;
    }
    Ok(())
}
