//! The language model: grouped-query attention, multimodal rotary embedding, gated MLP.

use candle_core::{DType, Device, Tensor};

use super::TextConfig;
use crate::{
    ModelError, Result,
    batch::TextBatch,
    cache::{KvCache, fill},
    layers::{Linear, Source},
    ops::{Heads, Kernels, Segments},
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
        let x = self.run(batch, kernels, &mut seen, |_| Ok(()))?;
        seen(&x);
        let x = kernels.rms_norm(&x, &self.norm, self.eps)?;
        Ok(x.reshape((batch.rows, batch.width, ()))?)
    }

    /// Fills a cache in which row `i` of the batch stands `repeat[i]` times; also the normalized hidden state of each
    /// row's last token, `[rows of the cache, hidden]`.
    pub(crate) fn prefill(
        &self,
        batch: &TextBatch,
        repeat: &[usize],
        room: usize,
        kernels: Kernels,
    ) -> Result<(KvCache, Tensor)> {
        if repeat.len() != batch.rows {
            let counts = (repeat.len(), batch.rows);
            return Err(ModelError::Input(format!("{} repeats for {} rows", counts.0, counts.1)));
        }
        let copies = repeat
            .iter()
            .enumerate()
            .flat_map(|(row, n)| std::iter::repeat_n(row, *n))
            .collect::<Vec<_>>();
        let lengths = copies.iter().map(|row| batch.lengths[*row]).collect();
        let next = copies.iter().map(|row| batch.next_positions[*row]).collect();
        let capacity = batch.width + room;
        let mut cache = KvCache::new(lengths, next, capacity);
        let device = self.embed.device();
        let ids = copies.iter().map(|row| *row as u32).collect::<Vec<_>>();
        let ids = Tensor::from_vec(ids, copies.len(), device)?;
        let size = self.heads.kv_size();
        let x = self.run(batch, kernels, &mut |_| {}, |qkv| {
            let spread = |offset: usize| -> Result<Tensor> {
                let rows = qkv.narrow(1, offset, size)?.reshape((batch.rows, batch.width, size))?;
                let rows = rows.index_select(&ids, 0)?;
                fill(&rows, copies.len(), capacity, size, qkv.dtype(), device)
            };
            let offset = self.heads.q_size();
            cache.layers.push((spread(offset)?, spread(offset + size)?));
            Ok(())
        })?;
        let last = batch
            .lengths
            .iter()
            .enumerate()
            .map(|(row, length)| (row * batch.width + length - 1) as u32);
        let last = x.index_select(&Tensor::from_vec(last.collect::<Vec<_>>(), batch.rows, device)?, 0)?;
        let last = kernels.rms_norm(&last, &self.norm, self.eps)?;
        Ok((cache, last.index_select(&ids, 0)?))
    }

    /// Feeds one token per row of the cache and returns its normalized hidden state, `[rows, hidden]`.
    pub(crate) fn decode(&self, cache: &mut KvCache, ids: &[u32], kernels: Kernels) -> Result<Tensor> {
        cache.check_room(ids.len())?;
        let device = self.embed.device();
        let mut x = self
            .embed
            .index_select(&Tensor::from_slice(ids, ids.len(), device)?, 0)?;
        let positions = cache.next_positions.iter().map(|p| [*p; 3]).collect::<Vec<_>>();
        let rotary = self.rotary(&positions, x.dtype(), device)?;
        let lengths = cache.lengths.iter().map(|length| length + 1).collect::<Vec<_>>();
        for (layer, (keys, values)) in self.layers.iter().zip(&cache.layers) {
            let qkv = layer.qkv(&x, self, kernels)?;
            let qkv = kernels.rotate(&qkv, self.heads, &rotary)?;
            kernels.store(&qkv, keys, values, &cache.lengths, self.heads)?;
            let mixed = kernels.decode_attention(&qkv, keys, values, &lengths, self.heads)?;
            x = layer.finish(&x, &mixed, self, kernels)?;
        }
        cache.lengths = lengths;
        cache.next_positions.iter_mut().for_each(|p| *p += 1);
        kernels.rms_norm(&x, &self.norm, self.eps)
    }

    /// Logits over the vocabulary of normalized hidden states `[rows, hidden]`.
    pub(crate) fn logits(&self, hidden: &Tensor, kernels: Kernels) -> Result<Tensor> {
        kernels.linear(hidden, &self.head, None)
    }

    /// All layers; `before` gets the input of each, `rotated` its rotated queries, keys and values.
    fn run(
        &self,
        batch: &TextBatch,
        kernels: Kernels,
        before: &mut impl FnMut(&Tensor),
        mut rotated: impl FnMut(&Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        let mut x = self.embed(batch)?;
        let rotary = self.rotary(&batch.positions, x.dtype(), x.device())?;
        let segments = Segments::padded(&batch.lengths, batch.width);
        for layer in &self.layers {
            before(&x);
            let qkv = layer.qkv(&x, self, kernels)?;
            let qkv = kernels.rotate(&qkv, self.heads, &rotary)?;
            rotated(&qkv)?;
            let mixed = kernels.attention(&qkv, self.heads, &segments)?;
            x = layer.finish(&x, &mixed, self, kernels)?;
        }
        Ok(x)
    }

    /// Embeddings `[rows * width, hidden]` with image features in the place of placeholders.
    fn embed(&self, batch: &TextBatch) -> Result<Tensor> {
        let device = self.embed.device();
        let x = self.embed.index_select(&batch.flat_ids(device)?, 0)?;
        if batch.features.is_empty() {
            return Ok(x);
        }
        let features = Tensor::cat(&batch.features, 0)?.to_dtype(x.dtype())?;
        if features.dim(1)? != x.dim(1)? {
            let widths = (features.dim(1)?, x.dim(1)?);
            return Err(ModelError::Input(format!(
                "image features are {} wide, text is {}",
                widths.0, widths.1
            )));
        }
        // Text rows come first, features after them: one selection puts each where it belongs and sends its gradient back.
        let mut order = (0..batch.ids.len() as u32).collect::<Vec<_>>();
        for (k, slot) in batch.feature_slots.iter().enumerate() {
            order[*slot as usize] = (batch.ids.len() + k) as u32;
        }
        let order = Tensor::from_vec(order, batch.ids.len(), device)?;
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
