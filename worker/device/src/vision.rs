//! The vision tower of Qwen2.5-VL, computed: windows of patches, every eighth block over whole frames, and the merger.

use flotilla_kernels::{
    Buffer, Float, Gemm, Gpu,
    activation::{Gelu, add_bias, gelu, swiglu},
    attention::{self, Attention, Rows, Segments},
    norm::{Norm, rms_norm},
    rotary::{self, Heads, SplitInto, Turn},
    rows,
};
use flotilla_model::{
    Config, Layout, Vision, Visual,
    qwen2_5_vl::window::{Windows, patch_coordinates},
    rope::frequencies,
    weights::Weights,
};

use crate::{error::DeviceError, shape::QwenVision, weights::values};

/// Epsilon of every normalization of the tower, and base of its frequencies: fixed in the reference.
const EPS: f32 = 1e-6;
const THETA: f64 = 10_000.0;
/// Patches that go through the tower together: more pictures wait for their turn.
const MOST_PATCHES: usize = 1 << 15;
/// The width of the gated MLP is filled up with zeros to a multiple of this: 3,420 is none of 16 bytes.
const ALIGNED: usize = 64;

/// A linear layer with its bias.
#[derive(Clone, Debug)]
struct Linear<T> {
    weight: Buffer<T>,
    bias: Buffer<T>,
}

#[derive(Clone, Debug)]
struct Block<T> {
    norm1: Buffer<T>,
    qkv: Linear<T>,
    proj: Linear<T>,
    norm2: Buffer<T>,
    /// `[2 * padded, hidden]`.
    gate_up: Linear<T>,
    /// `[hidden, padded]`.
    down: Linear<T>,
}

/// The tower on the card.
#[derive(Clone, Debug)]
pub struct QwenTower<T> {
    gpu: Gpu,
    shape: QwenVision,
    /// Width of the gated MLP with its zeros.
    padded: usize,
    patch_embed: Buffer<T>,
    blocks: Vec<Block<T>>,
    merger_norm: Buffer<T>,
    merger: [Linear<T>; 2],
    /// Those of the rows, then those of the columns.
    frequencies: Buffer<f32>,
    axis_of: Buffer<u8>,
}

/// Where the values of a tower come from.
enum Origin<'a> {
    Host(&'a Weights),
    Random(u64),
}

impl Origin<'_> {
    fn values<T: Float>(
        &mut self,
        gpu: &Gpu,
        name: &str,
        (outputs, inputs): (usize, usize),
    ) -> Result<Buffer<T>, DeviceError> {
        match self {
            Self::Host(weights) => Ok(gpu.upload(&values::<T>(weights, name)?)?),
            Self::Random(seed) => {
                *seed += 1;
                let buffer = gpu.alloc(outputs * inputs)?;
                rows::fill_normal(gpu, &buffer, (inputs as f32).sqrt().recip(), *seed)?;
                Ok(buffer)
            }
        }
    }

    fn linear<T: Float>(
        &mut self,
        gpu: &Gpu,
        name: &str,
        (outputs, inputs): (usize, usize),
    ) -> Result<Linear<T>, DeviceError> {
        Ok(Linear {
            weight: self.values(gpu, &format!("{name}.weight"), (outputs, inputs))?,
            bias: match self {
                Self::Host(_) => self.values(gpu, &format!("{name}.bias"), (outputs, 1))?,
                Self::Random(_) => gpu.zeros(outputs)?,
            },
        })
    }

    fn norm<T: Float>(&mut self, gpu: &Gpu, name: &str, width: usize) -> Result<Buffer<T>, DeviceError> {
        match self {
            Self::Host(_) => self.values(gpu, name, (width, 1)),
            Self::Random(_) => Ok(gpu.upload(&vec![T::from_f32(1.0); width])?),
        }
    }
}

impl<T: Float> QwenTower<T> {
    /// That of a model of the host; None if the model has another one.
    pub fn load(gpu: &Gpu, config: &Config, weights: &Weights) -> Result<Option<Self>, DeviceError> {
        match &config.vision {
            Vision::Qwen25Vl(vision) => Self::build(gpu, QwenVision::from(vision), Origin::Host(weights)).map(Some),
            Vision::LlavaOneVision(_) => Ok(None),
        }
    }

    /// Random weights, for measuring.
    pub fn random(gpu: &Gpu, shape: QwenVision, seed: u64) -> Result<Self, DeviceError> {
        Self::build(gpu, shape, Origin::Random(seed))
    }

    fn build(gpu: &Gpu, shape: QwenVision, mut origin: Origin<'_>) -> Result<Self, DeviceError> {
        let (hidden, merged) = (shape.hidden, shape.merged());
        let padded = shape.intermediate.next_multiple_of(ALIGNED);
        let half = frequencies(THETA, shape.head_dim() / 2);
        let patches = (hidden, shape.patch_values());
        let axes = [vec![0u8; half.len()], vec![1u8; half.len()]].concat();
        Ok(Self {
            patch_embed: origin.values(gpu, "visual.patch_embed.proj.weight", patches)?,
            blocks: (0..shape.depth)
                .map(|index| Block::build(gpu, &shape, padded, index, &mut origin))
                .collect::<Result<_, _>>()?,
            merger_norm: origin.norm(gpu, "visual.merger.ln_q.weight", hidden)?,
            merger: [
                origin.linear(gpu, "visual.merger.mlp.0", (merged, merged))?,
                origin.linear(gpu, "visual.merger.mlp.2", (shape.output, merged))?,
            ],
            frequencies: gpu.upload(&[half.clone(), half].concat())?,
            axis_of: gpu.upload(&axes)?,
            gpu: gpu.clone(),
            shape,
            padded,
        })
    }

    /// Sizes.
    pub fn shape(&self) -> &QwenVision {
        &self.shape
    }

    /// Features `[tokens, output]` of each visual.
    pub fn encode(&self, visuals: &[&Visual]) -> Result<Vec<Buffer<T>>, DeviceError> {
        let width = self.shape.patch_values();
        let mut features = Vec::with_capacity(visuals.len());
        let mut start = 0;
        while start < visuals.len() {
            let mut patches = 0;
            let mut end = start;
            while end < visuals.len() && (end == start || patches + visuals[end].values.len() / width <= MOST_PATCHES) {
                patches += visuals[end].values.len() / width;
                end += 1;
            }
            features.extend(self.encode_together(&visuals[start..end])?);
            start = end;
        }
        Ok(features)
    }

    fn encode_together(&self, visuals: &[&Visual]) -> Result<Vec<Buffer<T>>, DeviceError> {
        let grids = visuals.iter().map(|visual| match visual.layout {
            Layout::Patches { grid, .. } => Ok(grid),
            _ => Err(DeviceError::Input(
                "squares of another family cannot be read as patches".to_owned(),
            )),
        });
        let grids = grids.collect::<Result<Vec<_>, _>>()?;
        let values = visuals
            .iter()
            .flat_map(|visual| visual.values.iter().copied())
            .collect::<Vec<_>>();
        let features = self.forward(&values, &grids)?;
        let unit = self.shape.merge * self.shape.merge;
        let mut start = 0;
        let parts = grids.iter().map(|grid| {
            let length = grid.iter().product::<usize>() / unit * self.shape.output;
            start += length;
            features.slice(start - length..start)
        });
        Ok(parts.collect::<Result<_, _>>()?)
    }

    /// Features of all tokens of all visuals, `[tokens, output]`, from patches `[patches, values]` in the order of the grids.
    pub fn forward(&self, patches: &[f32], grids: &[[usize; 3]]) -> Result<Buffer<T>, DeviceError> {
        let (gpu, shape) = (&self.gpu, &self.shape);
        let (hidden, unit) = (shape.hidden, shape.merge * shape.merge);
        let windows = Windows::new(grids, shape.merge, shape.window);
        let (tokens, rows) = (windows.order.len(), windows.order.len() * unit);
        let width = shape.patch_values();
        if patches.len() != rows * width {
            let given = patches.len() / width;
            return Err(DeviceError::Input(format!("{given} patches for grids of {rows}")));
        }
        let values = gpu.upload(patches)?;
        let rounded = gpu.alloc::<T>(values.len())?;
        rows::cast(gpu, &values, &rounded)?;
        let ordered = gpu.alloc::<T>(values.len())?;
        rows::gather_rows(gpu, unit * width, &rounded, &self.indices(&windows.order)?, &ordered)?;
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
            positions: self.positions(grids, &windows.order)?,
            near: self.offsets(&windows.window_lengths)?,
            far: self.offsets(&windows.frame_lengths)?,
        };
        let scratch = Scratch::new(gpu, shape, self.padded, rows)?;
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
        let norm = self.norm(rows);
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
        rows::gather_rows(gpu, shape.output, &features, &self.indices(&windows.places())?, &sorted)?;
        Ok(sorted)
    }

    fn norm(&self, rows: usize) -> Norm {
        Norm {
            rows,
            width: self.shape.hidden,
            eps: EPS,
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
        let (normed, branch) = (&scratch.normed, &scratch.branch);
        let norm = self.norm(rows);
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
        let heads = Heads {
            tokens: rows,
            heads: shape.heads,
            kv_heads: shape.heads,
            head_dim: shape.head_dim(),
        };
        let turn = Turn {
            axes: 2,
            positions: &places.positions,
            frequencies: &self.frequencies,
            axis_of: &self.axis_of,
        };
        let into = SplitInto {
            q: &scratch.q,
            k: Some(&scratch.k),
            v: Some(&scratch.v),
            cache: None,
        };
        rotary::split(gpu, heads, &scratch.qkv, Some(&block.qkv.bias), Some(turn), into)?;
        let rule = Attention {
            heads: shape.heads,
            kv_heads: shape.heads,
            head_dim: shape.head_dim(),
            scale: (shape.head_dim() as f32).sqrt().recip(),
            causal: false,
        };
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
        self.linear(
            rows,
            (2 * self.padded, hidden),
            normed,
            &block.gate_up,
            &scratch.gate_up,
        )?;
        swiglu(gpu, rows, self.padded, &scratch.gate_up, &scratch.gated)?;
        self.linear(rows, (hidden, self.padded), &scratch.gated, &block.down, branch)
    }

    fn linear(
        &self,
        rows: usize,
        (outputs, inputs): (usize, usize),
        x: &Buffer<T>,
        layer: &Linear<T>,
        out: &Buffer<T>,
    ) -> Result<(), DeviceError> {
        self.gpu
            .gemm(Gemm::linear(rows, outputs, inputs).once(), x, &layer.weight, out)?;
        Ok(add_bias(&self.gpu, rows, outputs, &layer.bias, out)?)
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

    fn indices(&self, order: &[usize]) -> Result<Buffer<i32>, DeviceError> {
        let indices = order.iter().map(|index| i32::try_from(*index).unwrap_or(-1));
        Ok(self.gpu.upload(&indices.collect::<Vec<_>>())?)
    }

    /// Where each segment begins, and where the last ends.
    fn offsets(&self, lengths: &[usize]) -> Result<Buffer<u32>, DeviceError> {
        let mut offsets = vec![0u32];
        let mut end = 0;
        for length in lengths {
            end += *length;
            offsets.push(u32::try_from(end).unwrap_or(u32::MAX));
        }
        Ok(self.gpu.upload(&offsets)?)
    }

    /// `[2, patches]`: row and column of each patch in window order.
    fn positions(&self, grids: &[[usize; 3]], order: &[usize]) -> Result<Buffer<i32>, DeviceError> {
        let unit = self.shape.merge * self.shape.merge;
        let mut coordinates = Vec::new();
        for [frames, height, width] in grids {
            let frame = patch_coordinates(*height, *width, self.shape.merge);
            (0..*frames).for_each(|_| coordinates.extend_from_slice(&frame));
        }
        let ordered = order
            .iter()
            .flat_map(|token| &coordinates[token * unit..(token + 1) * unit]);
        let (rows, columns): (Vec<_>, Vec<_>) = ordered.map(|(row, column)| (*row, *column)).unzip();
        self.indices(&[rows, columns].concat())
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
    fn new(gpu: &Gpu, shape: &QwenVision, padded: usize, rows: usize) -> Result<Self, DeviceError> {
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

impl<T: Float> Block<T> {
    fn build(
        gpu: &Gpu,
        shape: &QwenVision,
        padded: usize,
        index: usize,
        origin: &mut Origin<'_>,
    ) -> Result<Self, DeviceError> {
        let at = format!("visual.blocks.{index}");
        let (hidden, inner) = (shape.hidden, shape.intermediate);
        let mut linear = |name: &str, outputs: usize, inputs: usize| {
            origin.linear::<T>(gpu, &format!("{at}.{name}"), (outputs, inputs))
        };
        let qkv = linear("attn.qkv", 3 * hidden, hidden)?;
        let proj = linear("attn.proj", hidden, hidden)?;
        let (gate, up) = (
            linear("mlp.gate_proj", inner, hidden)?,
            linear("mlp.up_proj", inner, hidden)?,
        );
        let down = linear("mlp.down_proj", hidden, inner)?;
        let gate_up = Linear {
            weight: gpu.zeros(2 * padded * hidden)?,
            bias: gpu.zeros(2 * padded)?,
        };
        for (half, part) in [gate, up].iter().enumerate() {
            let first = half * padded;
            let rows = gate_up.weight.slice(first * hidden..(first + inner) * hidden)?;
            gpu.copy(&part.weight, &rows)?;
            gpu.copy(&part.bias, &gate_up.bias.slice(first..first + inner)?)?;
        }
        Ok(Self {
            norm1: origin.norm(gpu, &format!("{at}.norm1.weight"), hidden)?,
            norm2: origin.norm(gpu, &format!("{at}.norm2.weight"), hidden)?,
            down: Linear {
                weight: widen(gpu, &down.weight, (hidden, inner), padded)?,
                bias: down.bias,
            },
            qkv,
            proj,
            gate_up,
        })
    }
}

/// A matrix `[rows, columns]` with zeros behind every row.
fn widen<T: Float>(
    gpu: &Gpu,
    matrix: &Buffer<T>,
    (rows, columns): (usize, usize),
    padded: usize,
) -> Result<Buffer<T>, DeviceError> {
    let wide = gpu.zeros(rows * padded)?;
    for row in 0..rows {
        let from = matrix.slice(row * columns..(row + 1) * columns)?;
        gpu.copy(&from, &wide.slice(row * padded..row * padded + columns)?)?;
    }
    Ok(wide)
}
