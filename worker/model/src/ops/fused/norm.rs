//! Root mean square normalization.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::{lanes::dot, operand, tensor_like, values, vectorize};

/// See [`crate::ops::Kernels::rms_norm`].
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    x.contiguous()?
        .apply_op2(&weight.contiguous()?, RmsNorm { eps: eps as f32 })
}

struct RmsNorm {
    eps: f32,
}

impl RmsNorm {
    #[inline(always)]
    fn inverse(&self, row: &[f32]) -> f32 {
        1.0 / (dot(row, row) / row.len() as f32 + self.eps).sqrt()
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "fused-rms-norm"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (operand(s1, l1)?, operand(s2, l2)?);
        let mut output = vec![0f32; x.len()];
        vectorize(
            #[inline(always)]
            || {
                for (row, out) in x.chunks_exact(weight.len()).zip(output.chunks_exact_mut(weight.len())) {
                    let inverse = self.inverse(row);
                    for ((out, x), w) in out.iter_mut().zip(row).zip(weight) {
                        *out = x * inverse * w;
                    }
                }
            },
        );
        Ok((CpuStorage::F32(output), l1.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let ((xs, xl), (ws, wl), (gs, gl)) = (
            x.storage_and_layout(),
            weight.storage_and_layout(),
            grad.storage_and_layout(),
        );
        let (xv, wv, gv) = (values(&xs, xl)?, values(&ws, wl)?, values(&gs, gl)?);
        let width = wv.len();
        let mut dx = vec![0f32; xv.len()];
        let mut dw = vec![0f32; width];
        vectorize(
            #[inline(always)]
            || {
                let mut scaled = vec![0f32; width];
                for ((row, g), dx) in xv
                    .chunks_exact(width)
                    .zip(gv.chunks_exact(width))
                    .zip(dx.chunks_exact_mut(width))
                {
                    let inverse = self.inverse(row);
                    for (((s, g), w), (dw, x)) in scaled.iter_mut().zip(g).zip(wv).zip(dw.iter_mut().zip(row)) {
                        *s = g * w;
                        *dw += g * x * inverse;
                    }
                    let along = dot(&scaled, row) / width as f32 * inverse * inverse;
                    for ((dx, s), x) in dx.iter_mut().zip(&scaled).zip(row) {
                        *dx = inverse * (s - x * along);
                    }
                }
            },
        );
        let dw = if weight.track_op() {
            Some(tensor_like(dw, weight)?)
        } else {
            None
        };
        Ok((Some(tensor_like(dx, x)?), dw))
    }
}
