//! The vision tower: patches to tokens of the language model's width.

use candle_core::{DType, Device, Tensor};

use super::{
    config::{VISION_NORM_EPS, VISION_ROPE_THETA, VisionConfig},
    window::{Windows, patch_coordinates},
};
use crate::{
    ModelError, Result,
    layers::{Linear, Source},
    ops::{Heads, Kernels, Segments},
    rope::{Rotary, frequencies},
    visual::Grid,
};

/// The vision tower over one view of the weights (tracked or not).
#[derive(Clone, Debug)]
pub(crate) struct VisionTower {
    patch_embed: Tensor,
    blocks: Vec<Block>,
    merger: Merger,
    config: VisionConfig,
    heads: Heads,
}

#[derive(Clone, Debug)]
struct Block {
    norm1: Tensor,
    qkv: Linear,
    proj: Linear,
    norm2: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

#[derive(Clone, Debug)]
struct Merger {
    norm: Tensor,
    first: Linear,
    second: Linear,
}

impl VisionTower {
    pub(crate) fn new(config: &VisionConfig, source: Source<'_>) -> Result<Self> {
        Ok(Self {
            patch_embed: source.get("visual.patch_embed.proj.weight")?,
            blocks: (0..config.depth)
                .map(|i| Block::new(i, source))
                .collect::<Result<_>>()?,
            merger: Merger {
                norm: source.get("visual.merger.ln_q.weight")?,
                first: source.linear("visual.merger.mlp.0", true)?,
                second: source.linear("visual.merger.mlp.2", true)?,
            },
            config: config.clone(),
            heads: Heads {
                heads: config.num_heads,
                kv_heads: config.num_heads,
                head_dim: config.hidden_size / config.num_heads,
            },
        })
    }

    pub(crate) fn config(&self) -> &VisionConfig {
        &self.config
    }

    /// Features of all tokens of all images, `[tokens, out_hidden]`, from patch rows
    /// `[patches, channels * frames * side * side]` in the order of the grids; `seen` gets the stream after each block in
    /// window order, `[patches, hidden]`.
    pub(crate) fn forward(
        &self,
        patches: &Tensor,
        grids: &[Grid],
        kernels: Kernels,
        mut seen: impl FnMut(&Tensor),
    ) -> Result<Tensor> {
        let merge = self.config.spatial_merge_size;
        let unit = self.config.merge_unit();
        let windows = Windows::new(grids, merge, self.config.window_tokens());
        let rows = windows.order.len() * unit;
        if patches.dim(0)? != rows {
            let given = patches.dim(0)?;
            return Err(ModelError::Input(format!("{given} patches for grids of {rows}")));
        }
        let device = patches.device();
        let embed = self.patch_embed.flatten_from(1)?;
        let mut x = kernels.linear(&reorder(patches, &windows.order, unit)?, &embed, None)?;
        let rotary = self.rotary(grids, &windows.order, x.dtype(), device)?;
        let near = Segments::consecutive(&windows.window_lengths);
        let far = Segments::consecutive(&windows.frame_lengths);
        for (index, block) in self.blocks.iter().enumerate() {
            let full = self.config.fullatt_block_indexes.contains(&index);
            x = block.forward(&x, self.heads, &rotary, if full { &far } else { &near }, kernels)?;
            seen(&x);
        }
        let merged = self.merger.forward(&x, unit, kernels)?;
        reorder(&merged, &windows.places(), 1)
    }

    /// Rotary table of each patch in window order: half of the frequencies turn with the row, half with the column.
    fn rotary(&self, grids: &[Grid], order: &[usize], dtype: DType, device: &Device) -> Result<Rotary> {
        let half = self.heads.head_dim / 2;
        let frequencies = frequencies(VISION_ROPE_THETA, half);
        let merge = self.config.spatial_merge_size;
        let unit = self.config.merge_unit();
        let mut coordinates = Vec::new();
        for [frames, height, width] in grids {
            let frame = patch_coordinates(*height, *width, merge);
            (0..*frames).for_each(|_| coordinates.extend_from_slice(&frame));
        }
        let mut angles = Vec::with_capacity(coordinates.len() * half);
        for (row, column) in order
            .iter()
            .flat_map(|token| &coordinates[token * unit..(token + 1) * unit])
        {
            for at in [*row, *column] {
                angles.extend(frequencies.iter().map(|f| at as f32 * f));
            }
        }
        Rotary::from_angles(&angles, half, dtype, device)
    }
}

/// Rows in groups of `unit`, the groups in the given order.
fn reorder(x: &Tensor, order: &[usize], unit: usize) -> Result<Tensor> {
    if order.iter().enumerate().all(|(at, index)| at == *index) {
        return Ok(x.clone());
    }
    let rows = order
        .iter()
        .flat_map(|group| (group * unit) as u32..((group + 1) * unit) as u32)
        .collect::<Vec<_>>();
    let count = rows.len();
    Ok(x.index_select(&Tensor::from_vec(rows, count, x.device())?, 0)?)
}

impl Block {
    fn new(index: usize, source: Source<'_>) -> Result<Self> {
        let at = format!("visual.blocks.{index}");
        let linear = |name: &str| source.linear(&format!("{at}.{name}"), true);
        Ok(Self {
            norm1: source.get(&format!("{at}.norm1.weight"))?,
            qkv: linear("attn.qkv")?,
            proj: linear("attn.proj")?,
            norm2: source.get(&format!("{at}.norm2.weight"))?,
            gate: linear("mlp.gate_proj")?,
            up: linear("mlp.up_proj")?,
            down: linear("mlp.down_proj")?,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        heads: Heads,
        rotary: &Rotary,
        segments: &Segments,
        kernels: Kernels,
    ) -> Result<Tensor> {
        let qkv = self
            .qkv
            .forward(&kernels.rms_norm(x, &self.norm1, VISION_NORM_EPS)?, kernels)?;
        let qkv = kernels.rotate(&qkv, heads, rotary)?;
        let mixed = kernels.attention(&qkv, heads, segments)?;
        let x = (x + self.proj.forward(&mixed, kernels)?)?;
        let y = kernels.rms_norm(&x, &self.norm2, VISION_NORM_EPS)?;
        let (gate, up) = (self.gate.forward(&y, kernels)?, self.up.forward(&y, kernels)?);
        let y = self.down.forward(&kernels.swiglu(&gate, &up)?, kernels)?;
        Ok((x + y)?)
    }
}

impl Merger {
    fn forward(&self, x: &Tensor, unit: usize, kernels: Kernels) -> Result<Tensor> {
        let x = kernels.rms_norm(x, &self.norm, VISION_NORM_EPS)?;
        let (patches, hidden) = x.dims2()?;
        let x = x.reshape((patches / unit, hidden * unit))?;
        let x = self.first.forward(&x, kernels)?.gelu_erf()?;
        self.second.forward(&x, kernels)
    }
}
