//! Normalization, linear, gate, rotation and attention over packed rows `[rows, width]`.
//!
//! Every operation has two forms with the same result and gradient: composed from candle operations (any device and
//! dtype) and fused for the CPU in f32. Sequences are [`Segments`] of the rows, so nothing depends on padding.

pub mod composed;
mod fused;
mod segments;
mod spans;
#[cfg(test)]
mod tests;

use candle_core::{DType, Tensor};
pub use segments::Segments;
pub use spans::PagedSpan;
use spans::SpanKind;

use crate::{ModelError, Result, rope::Rotary};

/// Which form of the operations runs.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Kernels {
    /// Fused where there is a fused form for the device and dtype, composed elsewhere.
    #[default]
    Auto,
    /// Always composed; the reference for tests and measurements.
    Composed,
}

/// Heads of an attention whose queries, keys and values lie side by side in a row:
/// `heads + 2 * kv_heads` times `head_dim` values.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key heads, and as many value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl Heads {
    /// Width of the queries.
    pub fn q_size(self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the keys (and of the values).
    pub fn kv_size(self) -> usize {
        self.kv_heads * self.head_dim
    }
}

impl Kernels {
    fn fuses(self, x: &Tensor) -> bool {
        self == Self::Auto && x.device().is_cpu() && x.dtype() == DType::F32
    }

    /// `x / rms(x) * weight` for each row of `[rows, width]`.
    pub fn rms_norm(self, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
        if self.fuses(x) {
            return Ok(fused::rms_norm(x, weight, eps)?);
        }
        Ok(composed::rms_norm(x, weight, eps)?)
    }

    /// `(x - mean) / deviation * weight + bias` for each row of `[rows, width]`.
    pub fn layer_norm(self, x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
        Ok(composed::layer_norm(x, weight, bias, eps)?)
    }

    /// `x weight^T + bias`: `[rows, in]`, `[out, in]`, `[out]` to `[rows, out]`.
    pub fn linear(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        if self.fuses(x) {
            return Ok(fused::linear(x, weight, bias)?);
        }
        Ok(composed::linear(x, weight, bias)?)
    }

    /// `silu(gate) * up`.
    pub fn swiglu(self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        if self.fuses(gate) {
            return Ok(fused::swiglu(gate, up)?);
        }
        Ok(composed::swiglu(gate, up)?)
    }

    /// Turns queries and keys of `qkv` by the angles of their rows; values stay.
    pub fn rotate(self, qkv: &Tensor, heads: Heads, rotary: &Rotary) -> Result<Tensor> {
        if self.fuses(qkv) {
            return Ok(fused::rotate(qkv, heads, rotary)?);
        }
        Ok(composed::rotate(qkv, heads, rotary)?)
    }

    /// Softmax attention within each segment of `qkv`, `[rows, (heads + 2 kv_heads) * head_dim]`, to
    /// `[rows, heads * head_dim]`. Rows of no segment get unspecified finite values.
    pub fn attention(self, qkv: &Tensor, heads: Heads, segments: &Segments) -> Result<Tensor> {
        if self.fuses(qkv) && segments.longest() <= fused::LONGEST {
            return Ok(fused::attention(qkv, heads, segments)?);
        }
        Ok(composed::attention(qkv, heads, segments)?)
    }

    /// Causal attention of consecutive spans of rows, `[rows, (heads + 2 kv_heads) * head_dim]`, each over what its sequence
    /// has in a layer's blocks, `[blocks, block_size, kv_heads * head_dim]`; to `[rows, heads * head_dim]`. Keys and values of
    /// the rows themselves are in their slots already.
    pub fn paged_attention(
        self,
        qkv: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        spans: &[PagedSpan<'_>],
        heads: Heads,
    ) -> Result<Tensor> {
        let mut mixed = Vec::new();
        let mut start = 0;
        let alike = |a: &PagedSpan<'_>, b: &PagedSpan<'_>| a.kind() == b.kind() && self.far(a) == self.far(b);
        for run in spans.chunk_by(alike) {
            let rows = run.iter().map(|span| span.length).sum();
            let part = qkv.narrow(0, start, rows)?;
            start += rows;
            let fuses = self.fuses(qkv) && !run.iter().any(|span| self.far(span));
            mixed.push(match run[0].kind() {
                SpanKind::Fresh => {
                    let lengths = run.iter().map(|span| span.length).collect::<Vec<_>>();
                    let segments = Segments::consecutive(&lengths).causal();
                    self.attention(&part, heads, &segments)?
                }
                SpanKind::Next if fuses => fused::next_attention(&part, keys, values, run, heads)?,
                SpanKind::Next => composed::next_attention(&part, keys, values, run, heads)?,
                SpanKind::Chunk if fuses => fused::chunk_attention(&part, keys, values, run, heads)?,
                SpanKind::Chunk => composed::chunk_attention(&part, keys, values, run, heads)?,
            });
        }
        match mixed.len() {
            1 => Ok(mixed.remove(0)),
            _ => Ok(Tensor::cat(&mixed, 0)?),
        }
    }

    /// Whether a span looks back so far that matrix products over whole heads are faster.
    fn far(self, span: &PagedSpan<'_>) -> bool {
        span.kind() == SpanKind::Chunk && span.seen() > fused::LONGEST
    }

    /// Writes the keys and values of each row of `qkv` into its slot of a layer's blocks, `[blocks, block_size, kv_heads *
    /// head_dim]`, in place.
    pub fn store(self, qkv: &Tensor, keys: &Tensor, values: &Tensor, slots: &[u32], heads: Heads) -> Result<()> {
        if self.fuses(qkv) {
            return Ok(fused::store(qkv, keys, values, slots, heads)?);
        }
        Ok(composed::store(qkv, keys, values, slots, heads)?)
    }

    /// Copies whole blocks of `[blocks, block_size, width]`, from the first of each pair to the second, in place. No pair
    /// reads what one before it has written, and no block is written twice.
    pub fn copy_blocks(self, blocks: &Tensor, pairs: &[(u32, u32)]) -> Result<()> {
        if self.fuses(blocks) {
            return Ok(fused::copy_blocks(blocks, pairs)?);
        }
        Ok(composed::copy_blocks(blocks, pairs)?)
    }

    /// Log-probability `[rows]` of one token per row under the softmax of `logits / temperature`, `[rows, vocab]`.
    pub fn log_probs(self, logits: &Tensor, targets: &[u32], temperature: f64) -> Result<Tensor> {
        let (rows, vocab) = logits.dims2()?;
        if targets.len() != rows || targets.iter().any(|id| *id as usize >= vocab) || temperature <= 0.0 {
            let problem = format!(
                "{} targets at temperature {temperature} for logits [{rows}, {vocab}]",
                targets.len()
            );
            return Err(ModelError::Input(problem));
        }
        if self.fuses(logits) {
            return Ok(fused::log_probs(logits, targets, temperature)?);
        }
        Ok(composed::log_probs(logits, targets, temperature)?)
    }
}
