//! The gate of the MLP.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::{lanes::sigmoid, operand, tensor_like, values, vectorize};

/// See [`crate::ops::Kernels::swiglu`].
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.contiguous()?.apply_op2(&up.contiguous()?, Swiglu)
}

struct Swiglu;

impl CustomOp2 for Swiglu {
    fn name(&self) -> &'static str {
        "fused-swiglu"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (operand(s1, l1)?, operand(s2, l2)?);
        let mut output = vec![0f32; gate.len()];
        vectorize(
            #[inline(always)]
            || {
                for ((out, g), u) in output.iter_mut().zip(gate).zip(up) {
                    *out = g * sigmoid(*g) * u;
                }
            },
        );
        Ok((CpuStorage::F32(output), l1.shape().clone()))
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let ((gs, gl), (us, ul), (ds, dl)) = (
            gate.storage_and_layout(),
            up.storage_and_layout(),
            grad.storage_and_layout(),
        );
        let (gv, uv, dv) = (values(&gs, gl)?, values(&us, ul)?, values(&ds, dl)?);
        let mut d_gate = vec![0f32; gv.len()];
        let mut d_up = vec![0f32; gv.len()];
        vectorize(
            #[inline(always)]
            || {
                for ((d_gate, d_up), ((g, u), d)) in d_gate.iter_mut().zip(&mut d_up).zip(gv.iter().zip(uv).zip(dv)) {
                    let s = sigmoid(*g);
                    *d_gate = d * u * s * (1.0 + g * (1.0 - s));
                    *d_up = d * g * s;
                }
            },
        );
        Ok((Some(tensor_like(d_gate, gate)?), Some(tensor_like(d_up, up)?)))
    }
}
