//! Log-probabilities of given tokens.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::{
    lanes::{exp, max, sum},
    operand, tensor_like, values, vectorize,
};

/// See [`crate::ops::Kernels::log_probs`].
pub fn log_probs(logits: &Tensor, targets: &[u32], temperature: f64) -> Result<Tensor> {
    logits.contiguous()?.apply_op1(LogProbs {
        targets: targets.to_vec(),
        inverse: 1.0 / temperature as f32,
    })
}

struct LogProbs {
    targets: Vec<u32>,
    inverse: f32,
}

impl LogProbs {
    /// Writes `e^((logit - largest) / T)` and returns the largest logit and the sum.
    #[inline(always)]
    fn exponentials(&self, row: &[f32], out: &mut [f32]) -> (f32, f32) {
        let largest = max(row);
        for (out, logit) in out.iter_mut().zip(row) {
            *out = exp((logit - largest) * self.inverse);
        }
        (largest, sum(out))
    }
}

impl CustomOp1 for LogProbs {
    fn name(&self) -> &'static str {
        "fused-log-probs"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let logits = operand(storage, layout)?;
        let (rows, vocab) = layout.shape().dims2()?;
        let mut output = vec![0f32; rows];
        vectorize(
            #[inline(always)]
            || {
                let mut scratch = vec![0f32; vocab];
                for ((out, row), target) in output.iter_mut().zip(logits.chunks_exact(vocab)).zip(&self.targets) {
                    let (largest, total) = self.exponentials(row, &mut scratch);
                    *out = (row[*target as usize] - largest) * self.inverse - total.ln();
                }
            },
        );
        Ok((CpuStorage::F32(output), Shape::from(rows)))
    }

    fn bwd(&self, logits: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let ((ls, ll), (gs, gl)) = (logits.storage_and_layout(), grad.storage_and_layout());
        let (lv, gv) = (values(&ls, ll)?, values(&gs, gl)?);
        let vocab = logits.dim(1)?;
        let mut output = vec![0f32; lv.len()];
        vectorize(
            #[inline(always)]
            || {
                let rows = output.chunks_exact_mut(vocab).zip(lv.chunks_exact(vocab));
                for ((out, row), (target, g)) in rows.zip(self.targets.iter().zip(gv)) {
                    let (_, total) = self.exponentials(row, out);
                    let factor = -g * self.inverse / total;
                    for p in out.iter_mut() {
                        *p *= factor;
                    }
                    out[*target as usize] += g * self.inverse;
                }
            },
        );
        Ok(Some(tensor_like(output, logits)?))
    }
}
