//! Softmax attention within segments, for segments short enough that one head's keys stay in the processor's cache.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::{
    lanes::{LANES, add_scaled, dot, exp, max, sum},
    operand, tensor_like, values, vectorize,
};
use crate::ops::{Heads, Segments};

/// Longest segment: beyond it matrix products over whole heads are faster.
pub const LONGEST: usize = 512;

/// See [`crate::ops::Kernels::attention`].
pub fn attention(qkv: &Tensor, heads: Heads, segments: &Segments) -> Result<Tensor> {
    let segments = segments.clone();
    qkv.contiguous()?.apply_op1(Attention { heads, segments })
}

struct Attention {
    heads: Heads,
    segments: Segments,
}

/// Keys and values of one head of one segment, and room for one row of weights.
struct Scratch {
    /// Keys transposed: `[head_dim, stride]`, `stride` a multiple of the lanes.
    keys: Vec<f32>,
    /// Values transposed likewise.
    values: Vec<f32>,
    stride: usize,
    weights: Vec<f32>,
    slopes: Vec<f32>,
}

impl Scratch {
    fn new(longest: usize, head_dim: usize) -> Self {
        let stride = longest.next_multiple_of(LANES);
        Self {
            keys: vec![0.0; head_dim * stride],
            values: vec![0.0; head_dim * stride],
            stride,
            weights: vec![0.0; stride],
            slopes: vec![0.0; stride],
        }
    }
}

/// Copies `length` vectors of `head_dim` values, `width` apart, into columns.
#[inline(always)]
pub(super) fn transpose(
    source: &[f32],
    width: usize,
    length: usize,
    head_dim: usize,
    target: &mut [f32],
    stride: usize,
) {
    for j in 0..length {
        for (d, value) in source[j * width..j * width + head_dim].iter().enumerate() {
            target[d * stride + j] = *value;
        }
    }
}

/// `out[j] = scale * query . column j` for `j` below `count` (rounded up to whole lanes).
#[inline(always)]
pub(super) fn columns_dot(query: &[f32], columns: &[f32], stride: usize, count: usize, scale: f32, out: &mut [f32]) {
    for start in (0..count).step_by(LANES) {
        let mut sums = [0f32; LANES];
        for (d, q) in query.iter().enumerate() {
            let column = &columns[d * stride + start..d * stride + start + LANES];
            for lane in 0..LANES {
                sums[lane] = q.mul_add(column[lane], sums[lane]);
            }
        }
        for (out, sum) in out[start..start + LANES].iter_mut().zip(sums) {
            *out = sum * scale;
        }
    }
}

/// Softmax in place.
#[inline(always)]
pub(super) fn normalize(weights: &mut [f32]) {
    let largest = max(weights);
    for weight in weights.iter_mut() {
        *weight = exp(*weight - largest);
    }
    let inverse = 1.0 / sum(weights);
    for weight in weights.iter_mut() {
        *weight *= inverse;
    }
}

impl Attention {
    fn width(&self) -> usize {
        (self.heads.heads + 2 * self.heads.kv_heads) * self.heads.head_dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.heads.head_dim as f32).sqrt()
    }

    /// Number of rows that row `i` of a run of `length` sees.
    fn seen(&self, i: usize, length: usize) -> usize {
        if self.segments.causal { i + 1 } else { length }
    }

    #[inline(always)]
    fn forward(&self, qkv: &[f32], output: &mut [f32]) {
        let (width, dim) = (self.width(), self.heads.head_dim);
        let (q_size, kv_size) = (self.heads.q_size(), self.heads.kv_size());
        let group = self.heads.heads / self.heads.kv_heads;
        let mut scratch = Scratch::new(self.segments.longest(), dim);
        for (start, length) in self.segments.runs.iter().copied() {
            for kv in 0..self.heads.kv_heads {
                let keys = &qkv[start * width + q_size + kv * dim..];
                transpose(keys, width, length, dim, &mut scratch.keys, scratch.stride);
                let values = &qkv[start * width + q_size + kv_size + kv * dim..];
                for head in kv * group..(kv + 1) * group {
                    for i in 0..length {
                        let at = (start + i) * width + head * dim;
                        let seen = self.seen(i, length);
                        let query = &qkv[at..at + dim];
                        columns_dot(
                            query,
                            &scratch.keys,
                            scratch.stride,
                            seen,
                            self.scale(),
                            &mut scratch.weights,
                        );
                        normalize(&mut scratch.weights[..seen]);
                        let out = (start + i) * q_size + head * dim;
                        mix(&scratch.weights[..seen], values, width, &mut output[out..out + dim]);
                    }
                }
            }
        }
    }

    /// Gradient of `qkv`. The weights are computed again: keeping them would cost more memory traffic than it saves.
    #[inline(always)]
    fn backward(&self, qkv: &[f32], grad: &[f32], d_qkv: &mut [f32]) {
        let (width, dim) = (self.width(), self.heads.head_dim);
        let (q_size, kv_size) = (self.heads.q_size(), self.heads.kv_size());
        let group = self.heads.heads / self.heads.kv_heads;
        let longest = self.segments.longest();
        let mut scratch = Scratch::new(longest, dim);
        let mut d_keys = vec![0f32; longest * dim];
        let mut d_values = vec![0f32; longest * dim];
        for (start, length) in self.segments.runs.iter().copied() {
            for kv in 0..self.heads.kv_heads {
                let key_at = start * width + q_size + kv * dim;
                let value_at = key_at + kv_size;
                transpose(&qkv[key_at..], width, length, dim, &mut scratch.keys, scratch.stride);
                transpose(
                    &qkv[value_at..],
                    width,
                    length,
                    dim,
                    &mut scratch.values,
                    scratch.stride,
                );
                d_keys[..length * dim].fill(0.0);
                d_values[..length * dim].fill(0.0);
                for head in kv * group..(kv + 1) * group {
                    for i in 0..length {
                        let query_at = (start + i) * width + head * dim;
                        let query = &qkv[query_at..query_at + dim];
                        let out_at = (start + i) * q_size + head * dim;
                        let seen = self.seen(i, length);
                        let g = &grad[out_at..out_at + dim];
                        self.slopes(query, g, seen, &mut scratch);
                        mix(
                            &scratch.slopes[..seen],
                            &qkv[key_at..],
                            width,
                            &mut d_qkv[query_at..query_at + dim],
                        );
                        for j in 0..seen {
                            add_scaled(&mut d_keys[j * dim..(j + 1) * dim], scratch.slopes[j], query);
                            add_scaled(&mut d_values[j * dim..(j + 1) * dim], scratch.weights[j], g);
                        }
                    }
                }
                for j in 0..length {
                    let (key, value) = (key_at + j * width, value_at + j * width);
                    d_qkv[key..key + dim].copy_from_slice(&d_keys[j * dim..(j + 1) * dim]);
                    d_qkv[value..value + dim].copy_from_slice(&d_values[j * dim..(j + 1) * dim]);
                }
            }
        }
    }

    /// The weights of one query, and the gradient of its scores (times the scale).
    #[inline(always)]
    fn slopes(&self, query: &[f32], grad: &[f32], seen: usize, scratch: &mut Scratch) {
        let scale = self.scale();
        columns_dot(query, &scratch.keys, scratch.stride, seen, scale, &mut scratch.weights);
        normalize(&mut scratch.weights[..seen]);
        columns_dot(grad, &scratch.values, scratch.stride, seen, 1.0, &mut scratch.slopes);
        let mean = dot(&scratch.weights[..seen], &scratch.slopes[..seen]);
        for (slope, weight) in scratch.slopes[..seen].iter_mut().zip(&scratch.weights) {
            *slope = weight * (*slope - mean) * scale;
        }
    }
}

/// `out = sum of weights[j] * vector j`, vectors `width` apart.
#[inline(always)]
pub(super) fn mix(weights: &[f32], vectors: &[f32], width: usize, out: &mut [f32]) {
    let mut start = 0;
    while start < out.len() {
        let end = (start + LANES).min(out.len());
        if end - start == LANES {
            let mut sums = [0f32; LANES];
            for (j, weight) in weights.iter().enumerate() {
                let vector = &vectors[j * width + start..j * width + end];
                for lane in 0..LANES {
                    sums[lane] = weight.mul_add(vector[lane], sums[lane]);
                }
            }
            out[start..end].copy_from_slice(&sums);
        } else {
            out[start..end].fill(0.0);
            for (j, weight) in weights.iter().enumerate() {
                add_scaled(
                    &mut out[start..end],
                    *weight,
                    &vectors[j * width + start..j * width + end],
                );
            }
        }
        start = end;
    }
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "fused-attention"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let qkv = operand(storage, layout)?;
        let rows = layout.shape().dims2()?.0;
        let mut output = vec![0f32; rows * self.heads.q_size()];
        vectorize(
            #[inline(always)]
            || self.forward(qkv, &mut output),
        );
        Ok((CpuStorage::F32(output), Shape::from((rows, self.heads.q_size()))))
    }

    fn bwd(&self, qkv: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let ((qs, ql), (gs, gl)) = (qkv.storage_and_layout(), grad.storage_and_layout());
        let (qv, gv) = (values(&qs, ql)?, values(&gs, gl)?);
        let mut d_qkv = vec![0f32; qv.len()];
        vectorize(
            #[inline(always)]
            || self.backward(qv, gv, &mut d_qkv),
        );
        Ok(Some(tensor_like(d_qkv, qkv)?))
    }
}
