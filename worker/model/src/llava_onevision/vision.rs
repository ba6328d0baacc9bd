//! SigLIP and the projector: squares to tokens of the language model's width, in the order of the sequence.

use candle_core::{DType, Tensor};

use super::{
    VisionConfig,
    arrangement::{Arrangement, Cell},
};
use crate::{
    ModelError, Result,
    layers::{LayerNorm, Linear, Source},
    ops::{Heads, Kernels, Segments},
    visual::Visual,
};

/// The vision tower and projector over one view of the weights (tracked or not).
#[derive(Clone, Debug)]
pub(crate) struct VisionTower {
    patch_embed: Linear,
    positions: Tensor,
    layers: Vec<Layer>,
    projector: [Linear; 2],
    newline: Tensor,
    config: VisionConfig,
    heads: Heads,
}

#[derive(Clone, Debug)]
struct Layer {
    norm1: LayerNorm,
    qkv: [Linear; 3],
    out: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl VisionTower {
    pub(crate) fn new(config: &VisionConfig, source: Source<'_>) -> Result<Self> {
        let tower = &config.tower;
        let at = "vision_tower.vision_model";
        let layer = |i| Layer::new(&format!("{at}.encoder.layers.{i}"), tower.layer_norm_eps, source);
        let projector = |name: &str| source.linear(&format!("multi_modal_projector.{name}"), config.projector_bias);
        Ok(Self {
            patch_embed: source.linear(&format!("{at}.embeddings.patch_embedding"), true)?,
            positions: source.get(&format!("{at}.embeddings.position_embedding.weight"))?,
            layers: (0..config.used_layers).map(layer).collect::<Result<_>>()?,
            projector: [projector("linear_1")?, projector("linear_2")?],
            newline: source.get("image_newline")?,
            config: config.clone(),
            heads: Heads {
                heads: tower.num_attention_heads,
                kv_heads: tower.num_attention_heads,
                head_dim: tower.hidden_size / tower.num_attention_heads,
            },
        })
    }

    /// Features of each visual, `[tokens, text hidden]`; all squares go through the tower together. `seen` gets the stream
    /// after each layer, `[squares * tokens, hidden]`.
    pub(crate) fn forward(
        &self,
        visuals: &[&Visual],
        dtype: DType,
        kernels: Kernels,
        seen: impl FnMut(&Tensor),
    ) -> Result<Vec<Tensor>> {
        let arrangements = visuals
            .iter()
            .map(|visual| self.arrangement(visual))
            .collect::<Result<Vec<_>>>()?;
        let squares = arrangements.iter().map(|arrangement| arrangement.squares).sum();
        let patches = self.patches(visuals, squares, dtype)?;
        let features = self.project(&self.tower(&patches, squares, kernels, seen)?, kernels)?;
        let tokens = self.config.tower.tokens();
        let mut start = 0;
        let mut parts = Vec::with_capacity(visuals.len());
        for arrangement in &arrangements {
            let own = features.narrow(0, start, arrangement.squares * tokens)?;
            parts.push(self.arrange(&own, &arrangement.cells)?);
            start += arrangement.squares * tokens;
        }
        Ok(parts)
    }

    fn arrangement(&self, visual: &Visual) -> Result<Arrangement> {
        let arrangement = Arrangement::new(&visual.layout, &self.config)?;
        let side = self.config.tower.image_size;
        let expected = arrangement.squares * self.config.tower.num_channels * side * side;
        if visual.values.len() != expected {
            let given = visual.values.len();
            return Err(ModelError::Input(format!(
                "{given} values for {} squares of {side} pixels, which take {expected}",
                arrangement.squares
            )));
        }
        Ok(arrangement)
    }

    /// Rows of patches, `[squares * tokens, channels * side * side]`; pixels that fill no patch are left out.
    fn patches(&self, visuals: &[&Visual], squares: usize, dtype: DType) -> Result<Tensor> {
        let tower = &self.config.tower;
        let (image, patch, side, channels) = (tower.image_size, tower.patch_size, tower.side(), tower.num_channels);
        let mut rows = Vec::with_capacity(squares * tower.tokens() * channels * patch * patch);
        let pixels = channels * image * image;
        for square in visuals.iter().flat_map(|visual| visual.values.chunks_exact(pixels)) {
            for (row, column) in (0..side).flat_map(|row| (0..side).map(move |column| (row, column))) {
                for channel in 0..channels {
                    for y in row * patch..(row + 1) * patch {
                        let start = (channel * image + y) * image + column * patch;
                        rows.extend_from_slice(&square[start..start + patch]);
                    }
                }
            }
        }
        let width = channels * patch * patch;
        let rows = Tensor::from_vec(rows, (squares * tower.tokens(), width), self.newline.device())?;
        Ok(rows.to_dtype(dtype)?)
    }

    /// Hidden states of the last layer used, before any further normalization.
    fn tower(
        &self,
        patches: &Tensor,
        squares: usize,
        kernels: Kernels,
        mut seen: impl FnMut(&Tensor),
    ) -> Result<Tensor> {
        let tokens = self.config.tower.tokens();
        let x = self.patch_embed.flattened()?.forward(patches, kernels)?;
        let (rows, hidden) = x.dims2()?;
        let x = x.reshape((squares, tokens, hidden))?.broadcast_add(&self.positions)?;
        let mut x = x.reshape((rows, hidden))?;
        let segments = Segments::consecutive(&vec![tokens; squares]);
        for layer in &self.layers {
            x = layer.forward(&x, self.heads, &segments, kernels)?;
            seen(&x);
        }
        Ok(x)
    }

    fn project(&self, x: &Tensor, kernels: Kernels) -> Result<Tensor> {
        let x = self.projector[0].forward(x, kernels)?.gelu_erf()?;
        self.projector[1].forward(&x, kernels)
    }

    /// Tokens in the order of the sequence. Line ends stand behind the tower's tokens, so that selections by index send
    /// every gradient back where it belongs.
    fn arrange(&self, features: &Tensor, cells: &[Cell]) -> Result<Tensor> {
        let device = features.device();
        let newline = features.dim(0)? as u32;
        let source = Tensor::cat(&[features, &self.newline.unsqueeze(0)?], 0)?;
        let select = |indices: Vec<u32>| -> Result<Tensor> {
            let count = indices.len();
            Ok(source.index_select(&Tensor::from_vec(indices, count, device)?, 0)?)
        };
        if cells.iter().all(|cell| !matches!(cell, Cell::Mean(_))) {
            let index = |cell: &Cell| if let Cell::Token(index) = cell { *index } else { newline };
            return select(cells.iter().map(index).collect());
        }
        let tap = |cell: &Cell, tap: usize| match cell {
            Cell::Mean(taps) => taps[tap],
            Cell::Token(index) => (*index, if tap == 0 { 1.0 } else { 0.0 }),
            Cell::Newline => (newline, if tap == 0 { 1.0 } else { 0.0 }),
        };
        let part = |number: usize| -> Result<Tensor> {
            let weights = cells.iter().map(|cell| tap(cell, number).1).collect::<Vec<_>>();
            let weights = Tensor::from_vec(weights, (cells.len(), 1), device)?.to_dtype(source.dtype())?;
            let rows = select(cells.iter().map(|cell| tap(cell, number).0).collect())?;
            Ok(rows.broadcast_mul(&weights)?)
        };
        Ok((((part(0)? + part(1)?)? + part(2)?)? + part(3)?)?)
    }
}

impl Layer {
    fn new(at: &str, eps: f64, source: Source<'_>) -> Result<Self> {
        let linear = |name: &str| source.linear(&format!("{at}.{name}"), true);
        Ok(Self {
            norm1: source.layer_norm(&format!("{at}.layer_norm1"), eps)?,
            qkv: [
                linear("self_attn.q_proj")?,
                linear("self_attn.k_proj")?,
                linear("self_attn.v_proj")?,
            ],
            out: linear("self_attn.out_proj")?,
            norm2: source.layer_norm(&format!("{at}.layer_norm2"), eps)?,
            fc1: linear("mlp.fc1")?,
            fc2: linear("mlp.fc2")?,
        })
    }

    fn forward(&self, x: &Tensor, heads: Heads, segments: &Segments, kernels: Kernels) -> Result<Tensor> {
        let qkv = Linear::forward_side_by_side(&self.qkv, &self.norm1.forward(x, kernels)?, kernels)?;
        let mixed = kernels.attention(&qkv, heads, segments)?;
        let x = (x + self.out.forward(&mixed, kernels)?)?;
        let y = self.fc1.forward(&self.norm2.forward(&x, kernels)?, kernels)?.gelu()?;
        Ok((&x + self.fc2.forward(&y, kernels)?)?)
    }
}
