//! One new token per row over a cache of keys and values.

use candle_core::{CpuStorage, CustomOp3, InplaceOp2, Layout, Result, Shape, Tensor, bail};

use super::{
    lanes::{add_scaled, dot, exp, max, sum},
    operand, vectorize,
};
use crate::ops::Heads;

/// See [`crate::ops::Kernels::decode_attention`].
pub fn decode_attention(
    qkv: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    lengths: &[usize],
    heads: Heads,
) -> Result<Tensor> {
    qkv.contiguous()?
        .apply_op3_no_bwd(keys, values, &DecodeAttention { heads, lengths })
}

struct DecodeAttention<'a> {
    heads: Heads,
    lengths: &'a [usize],
}

impl CustomOp3 for DecodeAttention<'_> {
    fn name(&self) -> &'static str {
        "fused-decode-attention"
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
        let rows = self.lengths.len();
        let Heads {
            heads,
            kv_heads,
            head_dim,
        } = self.heads;
        let width = (heads + 2 * kv_heads) * head_dim;
        let size = self.heads.kv_size();
        let capacity = keys.len() / (rows * size).max(1);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let mut output = vec![0f32; rows * self.heads.q_size()];
        let mut weights = vec![0f32; self.lengths.iter().copied().max().unwrap_or(0)];
        vectorize(
            #[inline(always)]
            || {
                for (row, length) in self.lengths.iter().copied().enumerate() {
                    for head in 0..heads {
                        let query = &qkv[row * width + head * head_dim..][..head_dim];
                        let base = row * capacity * size + head / (heads / kv_heads) * head_dim;
                        for (j, weight) in weights[..length].iter_mut().enumerate() {
                            *weight = dot(query, &keys[base + j * size..][..head_dim]) * scale;
                        }
                        let largest = max(&weights[..length]);
                        for weight in &mut weights[..length] {
                            *weight = exp(*weight - largest);
                        }
                        let inverse = 1.0 / sum(&weights[..length]);
                        let out = &mut output[(row * heads + head) * head_dim..][..head_dim];
                        for (j, weight) in weights[..length].iter().enumerate() {
                            add_scaled(out, weight * inverse, &values[base + j * size..][..head_dim]);
                        }
                    }
                }
            },
        );
        Ok((CpuStorage::F32(output), Shape::from((rows, self.heads.q_size()))))
    }
}

/// See [`crate::ops::Kernels::store`].
pub fn store(qkv: &Tensor, keys: &Tensor, values: &Tensor, slots: &[usize], heads: Heads) -> Result<()> {
    let qkv = qkv.contiguous()?;
    for (cache, offset) in [(keys, heads.q_size()), (values, heads.q_size() + heads.kv_size())] {
        cache.inplace_op2(
            &qkv,
            &Store {
                slots,
                offset,
                size: heads.kv_size(),
            },
        )?;
    }
    Ok(())
}

/// Copies `size` values at `offset` of each row to the row's slot.
struct Store<'a> {
    slots: &'a [usize],
    offset: usize,
    size: usize,
}

impl InplaceOp2 for Store<'_> {
    fn name(&self) -> &'static str {
        "fused-store"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        let source = operand(s2, l2)?;
        let Some((start, end)) = l1.contiguous_offsets() else {
            bail!("a cache must be contiguous");
        };
        let CpuStorage::F32(cache) = s1 else {
            bail!("a fused cache must be f32");
        };
        let cache = &mut cache[start..end];
        let rows = self.slots.len().max(1);
        let (width, capacity) = (source.len() / rows, cache.len() / (rows * self.size));
        for (row, slot) in self.slots.iter().enumerate() {
            let from = row * width + self.offset;
            let to = (row * capacity + slot) * self.size;
            cache[to..to + self.size].copy_from_slice(&source[from..from + self.size]);
        }
        Ok(())
    }
}
