//! Rotary embedding of the queries and keys of packed rows.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::{operand, tensor_like, values, vectorize};
use crate::{ops::Heads, rope::Rotary};

/// See [`crate::ops::Kernels::rotate`].
pub fn rotate(qkv: &Tensor, heads: Heads, rotary: &Rotary) -> Result<Tensor> {
    let turn = Rotate {
        heads,
        cos: rotary.cos.contiguous()?,
        sin: rotary.sin.contiguous()?,
    };
    qkv.contiguous()?.apply_op1(turn)
}

struct Rotate {
    heads: Heads,
    cos: Tensor,
    sin: Tensor,
}

impl Rotate {
    /// Turns by the angle times `direction`, which is 1 or -1.
    fn turn(&self, x: &[f32], direction: f32) -> Result<Vec<f32>> {
        let ((cs, cl), (ss, sl)) = (self.cos.storage_and_layout(), self.sin.storage_and_layout());
        let (cos, sin) = (values(&cs, cl)?, values(&ss, sl)?);
        let Heads {
            heads,
            kv_heads,
            head_dim,
        } = self.heads;
        let half = head_dim / 2;
        let width = (heads + 2 * kv_heads) * head_dim;
        let turned = (heads + kv_heads) * head_dim;
        let mut output = x.to_vec();
        vectorize(
            #[inline(always)]
            || {
                let tables = cos.chunks_exact(half).zip(sin.chunks_exact(half));
                for (row, (cos, sin)) in output.chunks_exact_mut(width).zip(tables) {
                    for head in row[..turned].chunks_exact_mut(head_dim) {
                        let (first, second) = head.split_at_mut(half);
                        for ((a, b), (c, s)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
                            let s = s * direction;
                            (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                        }
                    }
                }
            },
        );
        Ok(output)
    }
}

impl CustomOp1 for Rotate {
    fn name(&self) -> &'static str {
        "fused-rotate"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let output = self.turn(operand(storage, layout)?, 1.0)?;
        Ok((CpuStorage::F32(output), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let (storage, layout) = grad.storage_and_layout();
        Ok(Some(tensor_like(self.turn(values(&storage, layout)?, -1.0)?, x)?))
    }
}
