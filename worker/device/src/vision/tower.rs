//! The vision tower of Qwen2.5-VL, computed: windows of patches, every eighth block over whole frames, and the merger.

use flotilla_kernels::{
    Buffer, Finish, Float, Gemm, Gpu,
    activation::{Gelu, gelu, swiglu},
    attention::{self, Attention, Rows, Segments},
    norm::{Norm, rms_norm},
    rotary::{self, Heads, SplitInto, Turn},
    rows,
};
use flotilla_model::{Visual, visual::Grid};

use super::{Block, Layout, LayoutError, Linear, MOST_PATCHES, chunks, tokens};
use crate::{error::DeviceError, shape::QwenVision};

/// Epsilon of every normalization of the tower: fixed in the reference.
const EPS: f32 = 1e-6;

/// The tower on the card.
#[derive(Clone, Debug)]
pub struct QwenTower<T> {
    pub(crate) gpu: Gpu,
    pub(crate) shape: QwenVision,
    pub(crate) patch_embed: Buffer<T>,
    pub(crate) blocks: Vec<Block<T>>,
    pub(crate) merger_norm: Buffer<T>,
    pub(crate) merger: [Linear<T>; 2],
    /// Those of the rows, then those of the columns.
    pub(crate) frequencies: Buffer<f32>,
    pub(crate) axis_of: Buffer<u8>,
}

impl<T: Float> QwenTower<T> {
    /// Sizes.
    pub fn shape(&self) -> &QwenVision {
        &self.shape
    }

    /// Features `[tokens, output]` of each visual.
    pub fn encode(&self, visuals: &[&Visual]) -> Result<Vec<Buffer<T>>, DeviceError> {
        let (gpu, shape) = (&self.gpu, &self.shape);
        let grids = visuals.iter().map(|visual| grid_of(visual));
        let grids = grids.collect::<Result<Vec<_>, _>>()?;
        let features = grids.iter().map(|grid| gpu.alloc(tokens(shape, grid) * shape.output));
        let features = features.collect::<Result<Vec<_>, _>>()?;
        let largest = grids.iter().map(|[_, height, width]| height * width).max();
        for chunk in chunks(shape, &grids, largest.unwrap_or(0).max(MOST_PATCHES))? {
            let own = chunk.iter().map(|frames| frames.grid(&grids)).collect::<Vec<_>>();
            let parts = chunk.iter().map(|frames| {
                let values = &visuals[frames.visual].values;
                let part = frames.part(&grids, values.len());
                values.get(part).unwrap_or_default()
            });
            let together = self.compute(parts, &own)?;
            let mut used = 0;
            for frames in &chunk {
                let whole = &features[frames.visual];
                let part = whole.slice(frames.part(&grids, whole.len()))?;
                gpu.copy(&together.slice(used..used + part.len())?, &part)?;
                used += part.len();
            }
        }
        Ok(features)
    }

    /// Features of all tokens of all visuals, `[tokens, output]`, from patches `[patches, values]` in the order of the grids.
    pub fn forward(&self, patches: &[f32], grids: &[Grid]) -> Result<Buffer<T>, DeviceError> {
        self.compute(std::iter::once(patches), grids)
    }

    /// As [`Self::forward`], from patches in parts.
    fn compute<'a>(&self, patches: impl Iterator<Item = &'a [f32]>, grids: &[Grid]) -> Result<Buffer<T>, DeviceError> {
        let (gpu, shape) = (&self.gpu, &self.shape);
        let (hidden, unit) = (shape.hidden, shape.merge * shape.merge);
        let layout = Layout::new(shape, grids, 0);
        let (tokens, rows) = (layout.tokens, layout.rows);
        let width = shape.patch_values();
        let values = gpu.alloc::<f32>(rows * width)?;
        let mut given = 0;
        for part in patches {
            let end = (given + part.len()).min(values.len());
            gpu.write(&values.slice(given.min(end)..end)?, part)?;
            given = end;
        }
        if given != values.len() {
            let given = given / width;
            return Err(DeviceError::Input(format!("{given} patches for grids of {rows}")));
        }
        let rounded = gpu.alloc::<T>(values.len())?;
        rows::cast(gpu, &values, &rounded)?;
        let ordered = gpu.alloc::<T>(values.len())?;
        rows::gather_rows(gpu, unit * width, &rounded, &gpu.upload(&layout.order)?, &ordered)?;
        drop((values, rounded));
        let stream = gpu.alloc(rows * hidden)?;
        gpu.gemm(
            Gemm::linear(rows, hidden, width).once(),
            &ordered,
            &self.patch_embed,
            &stream,
        )?;
        let places = Places {
            rows,
            positions: gpu.upload(&layout.positions)?,
            near: gpu.upload(&layout.near)?,
            far: gpu.upload(&layout.far)?,
        };
        let scratch = Scratch::new(gpu, shape, rows)?;
        for (index, block) in self.blocks.iter().enumerate() {
            let far = shape.full.contains(&index);
            self.block(
                block,
                index == 0,
                if far { &places.far } else { &places.near },
                &places,
                &stream,
                &scratch,
            )?;
        }
        let norm = norm(shape, rows);
        rms_norm(
            gpu,
            norm,
            &scratch.branch,
            Some(&stream),
            &self.merger_norm,
            &scratch.normed,
            None,
        )?;
        let features = self.merge(tokens, &scratch.normed)?;
        let sorted = gpu.alloc(tokens * shape.output)?;
        rows::gather_rows(gpu, shape.output, &features, &gpu.upload(&layout.places)?, &sorted)?;
        Ok(sorted)
    }

    /// How queries and keys of patches at these positions `[2, rows]` are turned.
    pub(crate) fn turn<'a>(&'a self, positions: &'a Buffer<i32>) -> Turn<'a> {
        Turn {
            axes: 2,
            positions,
            frequencies: &self.frequencies,
            axis_of: &self.axis_of,
        }
    }

    /// One block. What the block before has added is in `branch`, and what this one adds is left there.
    fn block(
        &self,
        block: &Block<T>,
        first: bool,
        segments: &Buffer<u32>,
        places: &Places,
        stream: &Buffer<T>,
        scratch: &Scratch<T>,
    ) -> Result<(), DeviceError> {
        let (gpu, shape, rows) = (&self.gpu, &self.shape, places.rows);
        let padded = shape.padded();
        let (normed, branch) = (&scratch.normed, &scratch.branch);
        let norm = norm(shape, rows);
        if first {
            rms_norm(gpu, norm, stream, None, &block.norm1, normed, None)?;
        } else {
            rms_norm(gpu, norm, branch, Some(stream), &block.norm1, normed, None)?;
        }
        let (hidden, width) = (shape.hidden, 3 * shape.hidden);
        gpu.gemm(
            Gemm::linear(rows, width, hidden).once(),
            normed,
            &block.qkv.weight,
            &scratch.qkv,
        )?;
        let turn = self.turn(&places.positions);
        let into = SplitInto {
            q: &scratch.q,
            k: Some(&scratch.k),
            v: Some(&scratch.v),
            cache: None,
        };
        rotary::split(
            gpu,
            heads(shape, rows),
            &scratch.qkv,
            Some(&block.qkv.bias),
            Some(turn),
            into,
        )?;
        let rule = attention(shape);
        let segments = Segments {
            queries: segments,
            keys: segments,
            query_tokens: rows,
            key_tokens: rows,
        };
        let part = |buffer| Rows::new(buffer, hidden);
        let (q, k, v) = (part(&scratch.q), part(&scratch.k), part(&scratch.v));
        attention::forward(gpu, &rule, q, k, v, &segments, &scratch.mixed, None)?;
        self.linear(rows, (hidden, hidden), &scratch.mixed, &block.proj, branch)?;
        rms_norm(gpu, norm, branch, Some(stream), &block.norm2, normed, None)?;
        self.linear(rows, (2 * padded, hidden), normed, &block.gate_up, &scratch.gate_up)?;
        swiglu(gpu, rows, padded, &scratch.gate_up, &scratch.gated)?;
        self.linear(rows, (hidden, padded), &scratch.gated, &block.down, branch)
    }

    fn linear(
        &self,
        rows: usize,
        (outputs, inputs): (usize, usize),
        x: &Buffer<T>,
        layer: &Linear<T>,
        out: &Buffer<T>,
    ) -> Result<(), DeviceError> {
        let product = Gemm::linear(rows, outputs, inputs).once();
        Ok(self
            .gpu
            .gemm_finished(product, x, &layer.weight, out, Finish::Bias(&layer.bias))?)
    }

    /// Groups of normed patches to tokens of the language model's width.
    fn merge(&self, tokens: usize, normed: &Buffer<T>) -> Result<Buffer<T>, DeviceError> {
        let (gpu, shape, merged) = (&self.gpu, &self.shape, self.shape.merged());
        let first = gpu.alloc(tokens * merged)?;
        let [one, two] = &self.merger;
        gpu.gemm(Gemm::linear(tokens, merged, merged).once(), normed, &one.weight, &first)?;
        gelu(gpu, Gelu::Erf, (tokens, merged), &first, Some(&one.bias), &first)?;
        let features = gpu.alloc(tokens * shape.output)?;
        self.linear(tokens, (shape.output, merged), &first, two, &features)?;
        Ok(features)
    }
}

/// The norm of rows of the residual stream.
pub(crate) fn norm(shape: &QwenVision, rows: usize) -> Norm {
    Norm {
        rows,
        width: shape.hidden,
        eps: EPS,
    }
}

/// Packed queries, keys and values of rows.
pub(crate) fn heads(shape: &QwenVision, rows: usize) -> Heads {
    Heads {
        tokens: rows,
        heads: shape.heads,
        kv_heads: shape.heads,
        head_dim: shape.head_dim(),
    }
}

/// Attention of every block.
pub(crate) fn attention(shape: &QwenVision) -> Attention {
    Attention {
        heads: shape.heads,
        kv_heads: shape.heads,
        head_dim: shape.head_dim(),
        scale: (shape.head_dim() as f32).sqrt().recip(),
        causal: false,
    }
}

/// The patches of a picture or video of this family.
pub(crate) fn grid_of(visual: &Visual) -> Result<Grid, DeviceError> {
    match visual.layout {
        flotilla_model::Layout::Patches { grid, .. } => Ok(grid),
        _ => Err(DeviceError::Input(
            "squares of another family cannot be read as patches".to_owned(),
        )),
    }
}

impl From<LayoutError> for DeviceError {
    fn from(error: LayoutError) -> Self {
        Self::Input(error.to_string())
    }
}

/// What blocks know of the patches.
struct Places {
    rows: usize,
    positions: Buffer<i32>,
    /// Where windows begin.
    near: Buffer<u32>,
    /// Where frames begin.
    far: Buffer<u32>,
}

/// Activations of one pass.
struct Scratch<T> {
    normed: Buffer<T>,
    branch: Buffer<T>,
    qkv: Buffer<T>,
    q: Buffer<T>,
    k: Buffer<T>,
    v: Buffer<T>,
    mixed: Buffer<T>,
    gate_up: Buffer<T>,
    gated: Buffer<T>,
}

impl<T: Float> Scratch<T> {
    fn new(gpu: &Gpu, shape: &QwenVision, rows: usize) -> Result<Self, DeviceError> {
        let padded = shape.padded();
        let wide = |width: usize| gpu.alloc(rows * width);
        Ok(Self {
            normed: wide(shape.hidden)?,
            branch: wide(shape.hidden)?,
            qkv: wide(3 * shape.hidden)?,
            q: wide(shape.hidden)?,
            k: wide(shape.hidden)?,
            v: wide(shape.hidden)?,
            mixed: wide(shape.hidden)?,
            gate_up: wide(2 * padded)?,
            gated: wide(padded)?,
        })
    }
}
