//! The language model: grouped-query attention, multimodal rotary embedding, gated MLP.

use candle_core::{DType, Device, Tensor};

use super::TextConfig;
use crate::{
    ModelError, Result,
    batch::TextBatch,
    layers::{Linear, Source},
    ops::{Heads, Kernels, Segments},
    pool::{KvPool, PackedSpans},
    rope::{Position, Rotary, frequencies, mrope_angles},
};

/// The language model over one view of the weights (tracked or not).
#[derive(Clone, Debug)]
pub(crate) struct TextTower {
    embed: Tensor,
    head: Tensor,
    norm: Tensor,
    layers: Vec<Layer>,
    heads: Heads,
    eps: f64,
    frequencies: Vec<f32>,
    section: [usize; 3],
}

#[derive(Clone, Debug)]
struct Layer {
    input_norm: Tensor,
    qkv: [Linear; 3],
    out: Linear,
    post_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl TextTower {
    pub(crate) fn new(config: &TextConfig, source: Source<'_>) -> Result<Self> {
        let model = config.names.model;
        let embed = source.get(&format!("{model}embed_tokens.weight"))?;
        let head = if config.tie_word_embeddings {
            embed.clone()
        } else {
            source.get(config.names.head)?
        };
        let layers = (0..config.num_hidden_layers)
            .map(|i| Layer::new(&format!("{model}layers.{i}"), source))
            .collect::<Result<_>>()?;
        Ok(Self {
            embed,
            head,
            norm: source.get(&format!("{model}norm.weight"))?,
            layers,
            heads: Heads {
                heads: config.num_attention_heads,
                kv_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
            },
            eps: config.rms_norm_eps,
            frequencies: frequencies(config.rope_theta, config.head_dim),
            section: config.mrope_section,
        })
    }

    /// Final normalized hidden states, `[rows, width, hidden]`; `seen` gets the residual stream before each layer and
    /// after the last, `[rows * width, hidden]`.
    pub(crate) fn forward(&self, batch: &TextBatch, kernels: Kernels, mut seen: impl FnMut(&Tensor)) -> Result<Tensor> {
        let mut x = self.embed(&batch.ids, &batch.features, &batch.feature_slots)?;
        let rotary = self.rotary(&batch.positions, x.dtype(), x.device())?;
        let segments = Segments::padded(&batch.lengths, batch.width);
        for layer in &self.layers {
            seen(&x);
            let qkv = layer.qkv(&x, self, kernels)?;
            let qkv = kernels.rotate(&qkv, self.heads, &rotary)?;
            let mixed = kernels.attention(&qkv, self.heads, &segments)?;
            x = layer.finish(&x, &mixed, self, kernels)?;
        }
        seen(&x);
        let x = kernels.rms_norm(&x, &self.norm, self.eps)?;
        Ok(x.reshape((batch.rows, batch.width, ()))?)
    }

    /// Puts keys and values of the spans into the pool; the normalized hidden state of each wanted row, `[wanted, hidden]`.
    pub(crate) fn extend(&self, pool: &mut KvPool, packed: &PackedSpans<'_>, kernels: Kernels) -> Result<Tensor> {
        let device = self.embed.device();
        let wanted = Tensor::from_slice(&packed.wanted, packed.wanted.len(), device)?;
        let mut x = self.embed(&packed.ids, &packed.features, &packed.feature_slots)?;
        let rotary = self.rotary(&packed.positions, x.dtype(), device)?;
        let last = self.layers.len().saturating_sub(1);
        for (index, (layer, (keys, values))) in self.layers.iter().zip(&pool.layers).enumerate() {
            let qkv = layer.qkv(&x, self, kernels)?;
            let qkv = kernels.rotate(&qkv, self.heads, &rotary)?;
            kernels.store(&qkv, keys, values, &packed.slots, self.heads)?;
            if packed.wanted.is_empty() && index == last {
                break;
            }
            let mut mixed = kernels.paged_attention(&qkv, keys, values, &packed.spans, self.heads)?;
            if index == last && packed.wanted.len() < packed.ids.len() {
                // Nothing reads the other rows any more.
                mixed = mixed.index_select(&wanted, 0)?;
                x = x.index_select(&wanted, 0)?;
            }
            x = layer.finish(&x, &mixed, self, kernels)?;
        }
        if packed.wanted.is_empty() {
            return Ok(Tensor::zeros((0, x.dim(1)?), x.dtype(), device)?);
        }
        kernels.rms_norm(&x, &self.norm, self.eps)
    }

    /// Logits over the vocabulary of normalized hidden states `[rows, hidden]`.
    pub(crate) fn logits(&self, hidden: &Tensor, kernels: Kernels) -> Result<Tensor> {
        kernels.linear(hidden, &self.head, None)
    }

    /// Embeddings `[rows, hidden]` with image features in the place of placeholders: row after row of `features` at `slots`.
    fn embed(&self, ids: &[u32], features: &[Tensor], slots: &[u32]) -> Result<Tensor> {
        let device = self.embed.device();
        let x = self
            .embed
            .index_select(&Tensor::from_slice(ids, ids.len(), device)?, 0)?;
        if features.is_empty() {
            return Ok(x);
        }
        let features = Tensor::cat(features, 0)?.to_dtype(x.dtype())?;
        if features.dim(1)? != x.dim(1)? {
            let widths = (features.dim(1)?, x.dim(1)?);
            return Err(ModelError::Input(format!(
                "image features are {} wide, text is {}",
                widths.0, widths.1
            )));
        }
        // Text rows come first, features after them: one selection puts each where it belongs and sends its gradient back.
        let mut order = (0..ids.len() as u32).collect::<Vec<_>>();
        for (k, slot) in slots.iter().enumerate() {
            order[*slot as usize] = (ids.len() + k) as u32;
        }
        let order = Tensor::from_vec(order, ids.len(), device)?;
        Ok(Tensor::cat(&[&x, &features], 0)?.index_select(&order, 0)?)
    }

    fn rotary(&self, positions: &[Position], dtype: DType, device: &Device) -> Result<Rotary> {
        let angles = mrope_angles(positions, &self.frequencies, self.section);
        Rotary::from_angles(&angles, self.frequencies.len(), dtype, device)
    }
}

impl Layer {
    fn new(at: &str, source: Source<'_>) -> Result<Self> {
        let attention = |name: &str, bias: bool| source.linear(&format!("{at}.self_attn.{name}"), bias);
        let mlp = |name: &str| source.linear(&format!("{at}.mlp.{name}"), false);
        Ok(Self {
            input_norm: source.get(&format!("{at}.input_layernorm.weight"))?,
            qkv: [
                attention("q_proj", true)?,
                attention("k_proj", true)?,
                attention("v_proj", true)?,
            ],
            out: attention("o_proj", false)?,
            post_norm: source.get(&format!("{at}.post_attention_layernorm.weight"))?,
            gate: mlp("gate_proj")?,
            up: mlp("up_proj")?,
            down: mlp("down_proj")?,
        })
    }

    /// Queries, keys and values side by side, not yet rotated.
    fn qkv(&self, x: &Tensor, tower: &TextTower, kernels: Kernels) -> Result<Tensor> {
        let x = kernels.rms_norm(x, &self.input_norm, tower.eps)?;
        Linear::forward_side_by_side(&self.qkv, &x, kernels)
    }

    /// Output projection, residuals and MLP after the attention has mixed the rows.
    fn finish(&self, x: &Tensor, mixed: &Tensor, tower: &TextTower, kernels: Kernels) -> Result<Tensor> {
        let x = (x + self.out.forward(mixed, kernels)?)?;
        let y = kernels.rms_norm(&x, &self.post_norm, tower.eps)?;
        let gate = self.gate.forward(&y, kernels)?;
        let up = self.up.forward(&y, kernels)?;
        let y = self.down.forward(&kernels.swiglu(&gate, &up)?, kernels)?;
        Ok((x + y)?)
    }
}
