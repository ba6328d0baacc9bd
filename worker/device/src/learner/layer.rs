//! One layer, forward and backward.

use flotilla_kernels::{
    Buffer, Float, Gpu, GpuError,
    activation::{bias_gradient, swiglu, swiglu_backward},
    attention::{self, Gradients as AttentionGradients, Rows, Saved, Segments},
    norm::{Norm, RmsNormBackward, rms_norm, rms_norm_backward},
    rotary::{self, Heads, SplitInto},
};

use super::{
    buffers::{self, Mixed, OfLayer, OnCard, Rotation, Shared},
    gradients::{LayerGradients, Sum},
    products::Products,
};
use crate::{shape::TextShape, weights::Layer};

/// What computing any layer of a batch needs.
#[derive(Debug)]
pub(super) struct Pass<'a, T> {
    pub gpu: &'a Gpu,
    pub shape: &'a TextShape,
    pub batch: &'a OnCard,
    pub rotation: &'a Rotation,
    pub shared: Shared<T>,
    /// Partial sums of gradients of norms and biases.
    pub sums: &'a Buffer<f32>,
}

impl<T: Float> Pass<'_, T> {
    fn norm(&self) -> Norm {
        Norm {
            rows: self.batch.rows,
            width: self.shape.hidden,
            eps: self.shape.eps,
        }
    }

    fn heads(&self) -> Heads {
        Heads {
            tokens: self.batch.rows,
            heads: self.shape.heads,
            kv_heads: self.shape.kv_heads,
            head_dim: self.shape.head_dim,
        }
    }

    fn segments(&self) -> Segments<'_> {
        Segments {
            queries: &self.batch.offsets,
            keys: &self.batch.offsets,
            query_tokens: self.batch.rows,
            key_tokens: self.batch.rows,
        }
    }

    /// Queries, keys and values as rows of heads.
    fn rows<'a>(&self, [q, k, v]: &'a [Buffer<T>; 3]) -> [Rows<'a, T>; 3] {
        let (queries, keys) = (self.shape.query_width(), self.shape.key_width());
        [Rows::new(q, queries), Rows::new(k, keys), Rows::new(v, keys)]
    }

    fn products(&self) -> Products<'_> {
        Products {
            gpu: self.gpu,
            rows: self.batch.rows,
        }
    }

    /// Attention and its residual: everything of `mixed` from the layer's input.
    fn attend(&self, weights: &Layer<T>, input: &Buffer<T>, mixed: &Mixed<T>) -> Result<(), GpuError> {
        let (gpu, shared) = (self.gpu, &self.shared);
        rms_norm(gpu, self.norm(), input, None, &weights.input_norm, &shared.normed, None)?;
        self.products().linear(&shared.normed, &weights.qkv, &shared.packed)?;
        let parts = buffers::parts(self.shape, self.batch.rows, &mixed.split)?;
        let into = SplitInto {
            q: &parts[0],
            k: Some(&parts[1]),
            v: Some(&parts[2]),
            cache: None,
        };
        let turn = self.rotation.turn(&self.batch.positions);
        rotary::split(
            gpu,
            self.heads(),
            &shared.packed,
            Some(&weights.qkv_bias),
            Some(turn),
            into,
        )?;
        let [q, k, v] = self.rows(&parts);
        let rule = buffers::attention(self.shape);
        attention::forward(gpu, &rule, q, k, v, &self.segments(), &mixed.out, Some(&mixed.lse))?;
        self.products()
            .linear_onto(input, &mixed.out, &weights.output, &mixed.middle)
    }

    /// The norm after the attention, to `normed`.
    fn post_norm(&self, weights: &Layer<T>, mixed: &Mixed<T>) -> Result<(), GpuError> {
        let shared = &self.shared;
        let inverse_rms = Some(&shared.inverse_rms[1]);
        let (norm, weight) = (self.norm(), &weights.post_norm);
        rms_norm(self.gpu, norm, &mixed.middle, None, weight, &shared.normed, inverse_rms)
    }

    /// From the layer's input to its output.
    pub fn forward(&self, weights: &Layer<T>, layer: &OfLayer<T>) -> Result<(), GpuError> {
        let shared = &self.shared;
        self.attend(weights, &layer.input, &layer.mixed)?;
        self.post_norm(weights, &layer.mixed)?;
        self.products()
            .linear(&shared.normed, &weights.gate_up, &layer.gate_up)?;
        let (rows, width) = (self.batch.rows, self.shape.intermediate);
        swiglu(self.gpu, rows, width, &layer.gate_up, &shared.gated)?;
        self.products()
            .linear_onto(&layer.mixed.middle, &shared.gated, &weights.down, &layer.output)
    }

    /// Turns `dx`, the gradient of the layer's output, into that of its input, and adds to the sums of its weights' gradients.
    /// What the forward pass has not kept is computed again.
    pub fn backward<G: Float>(
        &self,
        weights: &Layer<T>,
        layer: &OfLayer<T>,
        sums: &LayerGradients<G>,
        adds: bool,
    ) -> Result<(), GpuError> {
        if !layer.mixed_is_kept {
            self.attend(weights, &layer.input, &layer.mixed)?;
        }
        self.mlp_backward(weights, layer, sums, adds)?;
        self.attention_backward(weights, layer, sums, adds)
    }

    fn mlp_backward<G: Float>(
        &self,
        weights: &Layer<T>,
        layer: &OfLayer<T>,
        sums: &LayerGradients<G>,
        adds: bool,
    ) -> Result<(), GpuError> {
        let (gpu, shared) = (self.gpu, &self.shared);
        let (rows, width) = (self.batch.rows, self.shape.intermediate);
        let gate_up = &layer.gate_up;
        self.post_norm(weights, &layer.mixed)?;
        if !layer.gate_up_is_kept {
            self.products().linear(&shared.normed, &weights.gate_up, gate_up)?;
        }
        let gated = &shared.gated;
        self.products().input_gradient(&shared.dx, &weights.down, gated)?;
        // In place: gradients take the place of gate and up, and what the down projection was given that of its gradient.
        swiglu_backward(gpu, rows, width, gate_up, gated, gate_up, Some(gated))?;
        self.products()
            .weight_gradient(&shared.dx, gated, &Sum::new(&sums.down, adds))?;
        let operands = (&shared.normed, &weights.gate_up);
        self.products()
            .linear_backward(gate_up, operands, &shared.d_normed, &Sum::new(&sums.gate_up, adds))?;
        rms_norm_backward(
            gpu,
            self.norm(),
            RmsNormBackward {
                dy: &shared.d_normed,
                x: &layer.mixed.middle,
                weight: &weights.post_norm,
                inverse_rms: &shared.inverse_rms[1],
                dx: &shared.dx,
                accumulate: true,
                dweight: Some((&sums.post_norm, self.sums)),
            },
        )
    }

    fn attention_backward<G: Float>(
        &self,
        weights: &Layer<T>,
        layer: &OfLayer<T>,
        sums: &LayerGradients<G>,
        adds: bool,
    ) -> Result<(), GpuError> {
        let (gpu, shared, rows) = (self.gpu, &self.shared, self.batch.rows);
        let mixed = &layer.mixed;
        let operands = (&mixed.out, &weights.output);
        self.products()
            .linear_backward(&shared.dx, operands, &shared.d_out, &Sum::new(&sums.output, adds))?;
        let parts = buffers::parts(self.shape, rows, &mixed.split)?;
        let d_parts = buffers::parts(self.shape, rows, &shared.d_split)?;
        let ([q, k, v], [dq, dk, dv]) = (self.rows(&parts), self.rows(&d_parts));
        let saved = Saved {
            out: &mixed.out,
            lse: &mixed.lse,
            dout: &shared.d_out,
        };
        let gradients = AttentionGradients { dq, dk, dv };
        let rule = buffers::attention(self.shape);
        attention::backward(gpu, &rule, q, k, v, &self.segments(), &saved, &gradients, &shared.delta)?;
        let turn = self.rotation.turn(&self.batch.positions);
        let [dq, dk, dv] = &d_parts;
        rotary::backward(gpu, self.heads(), Some(turn), (dq, dk, dv), &shared.packed)?;
        let width = self.shape.packed_width();
        bias_gradient(gpu, rows, width, &shared.packed, &sums.qkv_bias, self.sums)?;
        let inverse_rms = &shared.inverse_rms[0];
        let (norm, weight) = (self.norm(), &weights.input_norm);
        rms_norm(gpu, norm, &layer.input, None, weight, &shared.normed, Some(inverse_rms))?;
        let operands = (&shared.normed, &weights.qkv);
        self.products()
            .linear_backward(&shared.packed, operands, &shared.d_normed, &Sum::new(&sums.qkv, adds))?;
        rms_norm_backward(
            gpu,
            norm,
            RmsNormBackward {
                dy: &shared.d_normed,
                x: &layer.input,
                weight,
                inverse_rms,
                dx: &shared.dx,
                accumulate: true,
                dweight: Some((&sums.input_norm, self.sums)),
            },
        )
    }
}
