//! One block of the tower, forward and backward.

use flotilla_kernels::{
    Buffer, Float, Gpu, GpuError,
    activation::{bias_gradient, swiglu, swiglu_backward},
    attention::{self, Gradients as AttentionGradients, Rows, Saved, Segments},
    norm::{RmsNormBackward, rms_norm, rms_norm_backward},
    rotary::{self, SplitInto},
};

use super::{
    buffers::{Chunk, thirds},
    gradients::BlockGradients,
};
use crate::{
    learner::{gradients::Sum, products::Products},
    vision::{self, Block, QwenTower},
};

/// What computing any block of a chunk needs.
#[derive(Debug)]
pub(super) struct Pass<'a, T> {
    pub gpu: &'a Gpu,
    pub tower: &'a QwenTower<T>,
    pub chunk: &'a Chunk<T>,
}

impl<T: Float> Pass<'_, T> {
    fn products(&self) -> Products<'_> {
        Products {
            gpu: self.gpu,
            rows: self.chunk.rows,
        }
    }

    /// Windows, or frames where the block sees a whole one.
    fn segments(&self, index: usize) -> Segments<'_> {
        let whole = self.tower.shape.full.contains(&index);
        let offsets = if whole { &self.chunk.far } else { &self.chunk.near };
        Segments {
            queries: offsets,
            keys: offsets,
            query_tokens: self.chunk.rows,
            key_tokens: self.chunk.rows,
        }
    }

    /// Adds the sums of the columns of `dy` to the gradient of a bias.
    fn bias(&self, dy: &Buffer<T>, sum: &Buffer<f32>) -> Result<(), GpuError> {
        bias_gradient(self.gpu, self.chunk.rows, sum.len(), dy, sum, &self.chunk.sums)
    }

    /// Attention and its residual: `split`, `mixed`, `lse` and `middle` from the block's input.
    fn attend(&self, block: &Block<T>, index: usize) -> Result<(), GpuError> {
        let (gpu, chunk, shape) = (self.gpu, self.chunk, &self.tower.shape);
        let (norm, input) = (vision::norm(shape, chunk.rows), &chunk.inputs[index]);
        rms_norm(gpu, norm, input, None, &block.norm1, &chunk.normed, None)?;
        self.products()
            .linear(&chunk.normed, &block.qkv.weight, &chunk.packed)?;
        let [q, k, v] = thirds(&chunk.split)?;
        let into = SplitInto {
            q: &q,
            k: Some(&k),
            v: Some(&v),
            cache: None,
        };
        let heads = vision::heads(shape, chunk.rows);
        let turn = self.tower.turn(&chunk.positions);
        rotary::split(gpu, heads, &chunk.packed, Some(&block.qkv.bias), Some(turn), into)?;
        let [q, k, v] = [&q, &k, &v].map(|buffer| Rows::new(buffer, shape.hidden));
        let (rule, segments) = (vision::attention(shape), self.segments(index));
        attention::forward(gpu, &rule, q, k, v, &segments, &chunk.mixed, Some(&chunk.lse))?;
        let proj = (&block.proj.weight, &block.proj.bias);
        self.products().biased_onto(input, &chunk.mixed, proj, &chunk.middle)
    }

    /// The norm after the attention, to `normed`, and gate and up with their biases.
    fn widen(&self, block: &Block<T>) -> Result<(), GpuError> {
        let (gpu, chunk, shape) = (self.gpu, self.chunk, &self.tower.shape);
        let (norm, inverse_rms) = (vision::norm(shape, chunk.rows), Some(&chunk.inverse_rms[1]));
        rms_norm(gpu, norm, &chunk.middle, None, &block.norm2, &chunk.normed, inverse_rms)?;
        let gate_up = (&block.gate_up.weight, &block.gate_up.bias);
        self.products().biased(&chunk.normed, gate_up, &chunk.gate_up)
    }

    /// From the block's input to that of the next.
    pub fn forward(&self, block: &Block<T>, index: usize) -> Result<(), GpuError> {
        let (gpu, chunk, shape) = (self.gpu, self.chunk, &self.tower.shape);
        self.attend(block, index)?;
        self.widen(block)?;
        swiglu(gpu, chunk.rows, shape.padded(), &chunk.gate_up, &chunk.gated)?;
        let down = (&block.down.weight, &block.down.bias);
        self.products()
            .biased_onto(&chunk.middle, &chunk.gated, down, &chunk.inputs[index + 1])
    }

    /// Turns `dx`, the gradient of the block's output, into that of its input, and adds to the sums of its weights' gradients.
    /// Everything but the input is computed again.
    pub fn backward<G: Float>(
        &self,
        block: &Block<T>,
        index: usize,
        sums: &BlockGradients<G>,
        adds: bool,
    ) -> Result<(), GpuError> {
        self.attend(block, index)?;
        self.widen(block)?;
        self.mlp_backward(block, sums, adds)?;
        self.attention_backward(block, index, sums, adds)
    }

    fn mlp_backward<G: Float>(&self, block: &Block<T>, sums: &BlockGradients<G>, adds: bool) -> Result<(), GpuError> {
        let (gpu, chunk, shape) = (self.gpu, self.chunk, &self.tower.shape);
        let (rows, padded, products) = (chunk.rows, shape.padded(), self.products());
        let (dx, gate_up, gated) = (&chunk.dx, &chunk.gate_up, &chunk.gated);
        self.bias(dx, &sums.down.bias)?;
        products.input_gradient(dx, &block.down.weight, gated)?;
        // In place: gradients take the place of gate and up, and what the down projection was given that of its gradient.
        // The filling of the width is zeros in both, so that its gradients are exactly zero.
        swiglu_backward(gpu, rows, padded, gate_up, gated, gate_up, Some(gated))?;
        products.weight_gradient(dx, gated, &Sum::new(&sums.down.weight, adds))?;
        self.bias(gate_up, &sums.gate_up.bias)?;
        let operands = (&chunk.normed, &block.gate_up.weight);
        let sum = Sum::new(&sums.gate_up.weight, adds);
        products.linear_backward(gate_up, operands, &chunk.d_normed, &sum)?;
        rms_norm_backward(
            gpu,
            vision::norm(shape, rows),
            RmsNormBackward {
                dy: &chunk.d_normed,
                x: &chunk.middle,
                weight: &block.norm2,
                inverse_rms: &chunk.inverse_rms[1],
                dx,
                accumulate: true,
                dweight: Some((&sums.norm2, &chunk.sums)),
            },
        )
    }

    fn attention_backward<G: Float>(
        &self,
        block: &Block<T>,
        index: usize,
        sums: &BlockGradients<G>,
        adds: bool,
    ) -> Result<(), GpuError> {
        let (gpu, chunk, shape) = (self.gpu, self.chunk, &self.tower.shape);
        let (rows, products, input) = (chunk.rows, self.products(), &chunk.inputs[index]);
        self.bias(&chunk.dx, &sums.proj.bias)?;
        let operands = (&chunk.mixed, &block.proj.weight);
        products.linear_backward(&chunk.dx, operands, &chunk.d_mixed, &Sum::new(&sums.proj.weight, adds))?;
        let (split, [dq, dk, dv]) = (thirds(&chunk.split)?, thirds(&chunk.d_split)?);
        let of = |buffer| Rows::new(buffer, shape.hidden);
        let [q, k, v] = split.each_ref().map(of);
        let saved = Saved {
            out: &chunk.mixed,
            lse: &chunk.lse,
            dout: &chunk.d_mixed,
        };
        let gradients = AttentionGradients {
            dq: Rows::new(&dq, shape.hidden),
            dk: Rows::new(&dk, shape.hidden),
            dv: Rows::new(&dv, shape.hidden),
        };
        let (rule, segments) = (vision::attention(shape), self.segments(index));
        attention::backward(gpu, &rule, q, k, v, &segments, &saved, &gradients, &chunk.delta)?;
        let turn = self.tower.turn(&chunk.positions);
        let heads = vision::heads(shape, rows);
        rotary::backward(gpu, heads, Some(turn), (&dq, &dk, &dv), &chunk.packed)?;
        self.bias(&chunk.packed, &sums.qkv.bias)?;
        let (norm, inverse_rms) = (vision::norm(shape, rows), &chunk.inverse_rms[0]);
        rms_norm(gpu, norm, input, None, &block.norm1, &chunk.normed, Some(inverse_rms))?;
        let operands = (&chunk.normed, &block.qkv.weight);
        let sum = Sum::new(&sums.qkv.weight, adds);
        products.linear_backward(&chunk.packed, operands, &chunk.d_normed, &sum)?;
        rms_norm_backward(
            gpu,
            norm,
            RmsNormBackward {
                dy: &chunk.d_normed,
                x: input,
                weight: &block.norm1,
                inverse_rms,
                dx: &chunk.dx,
                accumulate: true,
                dweight: Some((&sums.norm1, &chunk.sums)),
            },
        )
    }
}
