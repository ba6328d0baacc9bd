//! Matrix product with bias.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, backend::BackendStorage};

use rayon::prelude::*;

use super::{
    lanes::{add_scaled, dot},
    operand, values, vectorize,
};

/// See [`crate::ops::Kernels::linear`].
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    match bias {
        Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, Linear),
        None => x.apply_op2(&weight, Linear),
    }
}

struct Linear;

/// Rows up to which the weight is read once and each of its rows multiplied with all of them: such a product waits for the
/// memory, and a blocked one would copy the weight first.
const FEW_ROWS: usize = 4;
/// Values of a weight that are worth a second thread.
const SHARED: usize = 1 << 18;

fn product(s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
    let (rows, input) = l1.shape().dims2()?;
    let (output, _) = l2.shape().dims2()?;
    if rows <= FEW_ROWS && input > 0 {
        let values = few_rows(operand(s1, l1)?, operand(s2, l2)?, input, output);
        return Ok((CpuStorage::F32(values), Shape::from((rows, output))));
    }
    let product = s1.matmul(s2, (1, rows, output, input), l1, &l2.transpose(0, 1)?)?;
    Ok((product, Shape::from((rows, output))))
}

/// `x weight^T` for few rows of `x`, `[rows, input]` and `[output, input]` to `[rows, output]`.
fn few_rows(x: &[f32], weight: &[f32], input: usize, output: usize) -> Vec<f32> {
    let rows = x.len() / input;
    let mut by_output = vec![0f32; output * rows];
    let share = |(weight, sums): (&[f32], &mut [f32])| {
        vectorize(
            #[inline(always)]
            || {
                for (weight, sums) in weight.chunks_exact(input).zip(sums.chunks_exact_mut(rows)) {
                    for (sum, x) in sums.iter_mut().zip(x.chunks_exact(input)) {
                        *sum = dot(x, weight);
                    }
                }
            },
        );
    };
    let threads = rayon::current_num_threads();
    if threads > 1 && weight.len() >= SHARED {
        let part = output.div_ceil(threads);
        let weights = weight.par_chunks(part * input);
        weights.zip(by_output.par_chunks_mut(part * rows)).for_each(share);
    } else {
        share((weight, &mut by_output));
    }
    if rows == 1 {
        return by_output;
    }
    let mut values = vec![0f32; rows * output];
    for (column, sums) in by_output.chunks_exact(rows).enumerate() {
        for (row, sum) in sums.iter().enumerate() {
            values[row * output + column] = *sum;
        }
    }
    values
}

/// Gradients of input and weight; each only where something before it is recorded. Candle's own product always
/// computes both.
fn gradients(x: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let dx = if x.track_op() {
        Some(grad.matmul(&weight.detach())?)
    } else {
        None
    };
    let dw = if weight.track_op() {
        Some(grad.t()?.matmul(&x.detach())?)
    } else {
        None
    };
    Ok((dx, dw))
}

fn column_sums(grad: &Tensor, like: &Tensor) -> Result<Tensor> {
    let (storage, layout) = grad.storage_and_layout();
    let grad = values(&storage, layout)?;
    let width = like.elem_count();
    let mut sums = vec![0f32; width];
    vectorize(
        #[inline(always)]
        || {
            for row in grad.chunks_exact(width) {
                add_scaled(&mut sums, 1.0, row);
            }
        },
    );
    Tensor::from_vec(sums, width, like.device())
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "fused-linear"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        product(s1, l1, s2, l2)
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        gradients(x, weight, &grad.contiguous()?)
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "fused-linear-bias"
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
        let (mut storage, shape) = product(s1, l1, s2, l2)?;
        let bias = operand(s3, l3)?;
        if let CpuStorage::F32(values) = &mut storage {
            vectorize(
                #[inline(always)]
                || {
                    for row in values.chunks_exact_mut(bias.len()) {
                        add_scaled(row, 1.0, bias);
                    }
                },
            );
        }
        Ok((storage, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (dx, dw) = gradients(x, weight, &grad)?;
        let db = if bias.track_op() {
            Some(column_sums(&grad, bias)?)
        } else {
            None
        };
        Ok((dx, dw, db))
    }
}
