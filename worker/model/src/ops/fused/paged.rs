//! Attention over blocks of keys and values.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{
    attention::{columns_dot, mix, normalize, transpose},
    lanes::{LANES, add_scaled, dot, exp, max, sum},
    operand, vectorize,
};
use crate::ops::{Heads, PagedSpan};

/// See [`crate::ops::Kernels::paged_attention`]: spans of one row.
pub fn next_attention(
    qkv: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    spans: &[PagedSpan<'_>],
    heads: Heads,
) -> Result<Tensor> {
    run(qkv, keys, values, spans, heads, |paged, spans, qkv, output| {
        paged.next(spans, qkv, output);
    })
}

/// See [`crate::ops::Kernels::paged_attention`]: spans of several rows. Each row is computed exactly as it is by
/// [`super::attention`] over the whole sequence.
pub fn chunk_attention(
    qkv: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    spans: &[PagedSpan<'_>],
    heads: Heads,
) -> Result<Tensor> {
    run(qkv, keys, values, spans, heads, |paged, spans, qkv, output| {
        paged.chunks(spans, qkv, output);
    })
}

type Form = fn(&Paged<'_>, &[PagedSpan<'_>], &[f32], &mut [f32]);

fn run(
    qkv: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    spans: &[PagedSpan<'_>],
    heads: Heads,
    form: Form,
) -> Result<Tensor> {
    let block_size = keys.dim(1)?;
    let attention = PagedAttention {
        heads,
        spans,
        block_size,
        form,
    };
    qkv.contiguous()?.apply_op3_no_bwd(keys, values, &attention)
}

struct PagedAttention<'a> {
    heads: Heads,
    spans: &'a [PagedSpan<'a>],
    block_size: usize,
    form: Form,
}

/// Blocks of one layer.
struct Paged<'a> {
    heads: Heads,
    block_size: usize,
    keys: &'a [f32],
    values: &'a [f32],
}

/// Multiplications that are worth a second thread.
const SHARED: usize = 1 << 20;

impl CustomOp3 for PagedAttention<'_> {
    fn name(&self) -> &'static str {
        "fused-paged-attention"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (qkv, keys, values) = (operand(s1, l1)?, operand(s2, l2)?, operand(s3, l3)?);
        let Heads {
            heads,
            kv_heads,
            head_dim,
        } = self.heads;
        let (width, q_size) = ((heads + 2 * kv_heads) * head_dim, self.heads.q_size());
        let rows = self.spans.iter().map(|span| span.length).sum::<usize>();
        let stored = keys.len() / (self.block_size * self.heads.kv_size()).max(1);
        let fits = |span: &PagedSpan<'_>| {
            let listed = span.seen() <= span.blocks.len() * self.block_size;
            listed && span.blocks.iter().all(|block| (*block as usize) < stored)
        };
        if qkv.len() != rows * width || !self.spans.iter().all(fits) {
            bail!("spans of {rows} rows for {} values and {stored} blocks", qkv.len());
        }
        let paged = Paged {
            heads: self.heads,
            block_size: self.block_size,
            keys,
            values,
        };
        let mut output = vec![0f32; rows * q_size];
        let threads = rayon::current_num_threads();
        let work = |span: &PagedSpan<'_>| span.length * span.seen() * q_size;
        if threads > 1 && self.spans.len() > 1 && self.spans.iter().map(work).sum::<usize>() >= SHARED {
            let mut parts = Vec::with_capacity(threads);
            let (mut qkv, mut out) = (qkv, output.as_mut_slice());
            for spans in self.spans.chunks(self.spans.len().div_ceil(threads)) {
                let rows = spans.iter().map(|span| span.length).sum::<usize>();
                let (own, rest) = out.split_at_mut(rows * q_size);
                parts.push((spans, &qkv[..rows * width], own));
                (qkv, out) = (&qkv[rows * width..], rest);
            }
            parts
                .into_par_iter()
                .for_each(|(spans, qkv, out)| (self.form)(&paged, spans, qkv, out));
        } else {
            (self.form)(&paged, self.spans, qkv, &mut output);
        }
        Ok((CpuStorage::F32(output), Shape::from((rows, q_size))))
    }
}

impl Paged<'_> {
    fn width(&self) -> usize {
        (self.heads.heads + 2 * self.heads.kv_heads) * self.heads.head_dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.heads.head_dim as f32).sqrt()
    }

    /// Where the keys (and values) of a key head begin in a block.
    #[inline(always)]
    fn base(&self, block: u32, kv: usize) -> usize {
        block as usize * self.block_size * self.heads.kv_size() + kv * self.heads.head_dim
    }

    fn next(&self, spans: &[PagedSpan<'_>], qkv: &[f32], output: &mut [f32]) {
        let longest = spans.iter().map(PagedSpan::seen).max().unwrap_or(0);
        let mut weights = vec![0f32; longest];
        vectorize(
            #[inline(always)]
            || {
                let rows = qkv.chunks_exact(self.width());
                let outputs = output.chunks_exact_mut(self.heads.q_size());
                for ((span, qkv), output) in spans.iter().zip(rows).zip(outputs) {
                    self.next_row(span, qkv, &mut weights[..span.seen()], output);
                }
            },
        );
    }

    #[inline(always)]
    fn next_row(&self, span: &PagedSpan<'_>, qkv: &[f32], weights: &mut [f32], output: &mut [f32]) {
        let (dim, size) = (self.heads.head_dim, self.heads.kv_size());
        let group = self.heads.heads / self.heads.kv_heads;
        for (head, out) in output.chunks_exact_mut(dim).enumerate() {
            let query = &qkv[head * dim..][..dim];
            for (block, weights) in span.blocks.iter().zip(weights.chunks_mut(self.block_size)) {
                let keys = &self.keys[self.base(*block, head / group)..];
                for (j, weight) in weights.iter_mut().enumerate() {
                    *weight = dot(query, &keys[j * size..][..dim]) * self.scale();
                }
            }
            let largest = max(weights);
            for weight in weights.iter_mut() {
                *weight = exp(*weight - largest);
            }
            let inverse = 1.0 / sum(weights);
            for (block, weights) in span.blocks.iter().zip(weights.chunks(self.block_size)) {
                let values = &self.values[self.base(*block, head / group)..];
                for (j, weight) in weights.iter().enumerate() {
                    add_scaled(out, weight * inverse, &values[j * size..][..dim]);
                }
            }
        }
    }

    fn chunks(&self, spans: &[PagedSpan<'_>], qkv: &[f32], output: &mut [f32]) {
        let longest = spans.iter().map(PagedSpan::seen).max().unwrap_or(0);
        let mut scratch = Scratch::new(longest, self.heads.head_dim);
        vectorize(
            #[inline(always)]
            || {
                let mut start = 0;
                for span in spans {
                    let end = start + span.length;
                    let qkv = &qkv[start * self.width()..end * self.width()];
                    let output = &mut output[start * self.heads.q_size()..end * self.heads.q_size()];
                    for kv in 0..self.heads.kv_heads {
                        self.gather(span, kv, &mut scratch);
                        self.chunk(span, kv, qkv, &mut scratch, output);
                    }
                    start = end;
                }
            },
        );
    }

    /// Lays keys and values of one head of one sequence together.
    #[inline(always)]
    fn gather(&self, span: &PagedSpan<'_>, kv: usize, scratch: &mut Scratch) {
        let (dim, size) = (self.heads.head_dim, self.heads.kv_size());
        let mut start = 0;
        for block in span.blocks {
            let count = self.block_size.min(span.seen() - start);
            if count == 0 {
                break;
            }
            let base = self.base(*block, kv);
            transpose(
                &self.keys[base..],
                size,
                count,
                dim,
                &mut scratch.keys[start..],
                scratch.stride,
            );
            for j in 0..count {
                let value = &self.values[base + j * size..][..dim];
                scratch.values[(start + j) * dim..][..dim].copy_from_slice(value);
            }
            start += count;
        }
    }

    #[inline(always)]
    fn chunk(&self, span: &PagedSpan<'_>, kv: usize, qkv: &[f32], scratch: &mut Scratch, output: &mut [f32]) {
        let dim = self.heads.head_dim;
        let group = self.heads.heads / self.heads.kv_heads;
        for head in kv * group..(kv + 1) * group {
            for i in 0..span.length {
                let query = &qkv[i * self.width() + head * dim..][..dim];
                let seen = span.stored + i + 1;
                let weights = &mut scratch.weights;
                columns_dot(query, &scratch.keys, scratch.stride, seen, self.scale(), weights);
                normalize(&mut weights[..seen]);
                let out = &mut output[i * self.heads.q_size() + head * dim..][..dim];
                mix(&weights[..seen], &scratch.values, dim, out);
            }
        }
    }
}

/// Keys and values of one head of one sequence, and room for one row of weights.
struct Scratch {
    /// Keys transposed: `[head_dim, stride]`, `stride` a multiple of the lanes.
    keys: Vec<f32>,
    stride: usize,
    /// `[tokens, head_dim]`.
    values: Vec<f32>,
    weights: Vec<f32>,
}

impl Scratch {
    fn new(longest: usize, head_dim: usize) -> Self {
        let stride = longest.next_multiple_of(LANES);
        Self {
            keys: vec![0.0; head_dim * stride],
            stride,
            values: vec![0.0; head_dim * longest],
            weights: vec![0.0; stride],
        }
    }
}
