//! Memory of the learner, allocated once for the largest micro-batch.

use flotilla_kernels::{
    Buffer, Float, Gpu, GpuError, activation,
    attention::{self, Attention},
    norm::{self, Norm},
    rotary::Turn,
    rows::{DeviceGroups, Groups},
    vocabulary::Vocabulary,
};

use flotilla_model::rope::frequencies;

use super::{batch::Batch, plan::Settings};
use crate::{error::DeviceError, shape::TextShape};

/// An id that no table has: its row is zeros.
const NOWHERE: u32 = u32::MAX;

/// What turns queries and keys, and does not change.
#[derive(Debug)]
pub(super) struct Rotation {
    frequencies: Buffer<f32>,
    axis_of: Buffer<u8>,
}

impl Rotation {
    pub fn new(gpu: &Gpu, shape: &TextShape) -> Result<Self, GpuError> {
        let axes = shape.axes().into_iter().map(|axis| u8::try_from(axis).unwrap_or(0));
        Ok(Self {
            frequencies: gpu.upload(&frequencies(shape.theta, shape.head_dim))?,
            axis_of: gpu.upload(&axes.collect::<Vec<_>>())?,
        })
    }

    pub fn turn<'a>(&'a self, positions: &'a Buffer<i32>) -> Turn<'a> {
        Turn {
            axes: 3,
            positions,
            frequencies: &self.frequencies,
            axis_of: &self.axis_of,
        }
    }
}

/// Room for what a batch says.
#[derive(Debug)]
pub(super) struct Inputs {
    ids: Buffer<u32>,
    positions: Buffer<i32>,
    offsets: Buffer<u32>,
    scored: Buffer<i32>,
    targets: Buffer<i32>,
    placeholders: Buffer<i32>,
    group_ids: Buffer<u32>,
    group_starts: Buffer<u32>,
    group_order: Buffer<u32>,
}

/// A batch on the card: slices of [`Inputs`].
#[derive(Clone, Debug)]
pub(super) struct OnCard {
    /// Rows of activations, the filling included.
    pub rows: usize,
    /// Scored rows, the filling included.
    pub scored_rows: usize,
    /// Scored rows without the filling.
    pub scored_tokens: usize,
    pub ids: Buffer<u32>,
    pub positions: Buffer<i32>,
    pub offsets: Buffer<u32>,
    pub scored: Buffer<i32>,
    pub targets: Buffer<i32>,
    pub placeholders: Buffer<i32>,
    pub groups: DeviceGroups,
}

impl Inputs {
    pub fn new(gpu: &Gpu, settings: &Settings) -> Result<Self, GpuError> {
        let (rows, scored) = (settings.rows(), settings.scored_rows());
        Ok(Self {
            ids: gpu.alloc(rows)?,
            positions: gpu.alloc(3 * rows)?,
            offsets: gpu.alloc(settings.sequences + 2)?,
            scored: gpu.alloc(scored)?,
            targets: gpu.alloc(scored)?,
            placeholders: gpu.alloc(rows)?,
            group_ids: gpu.alloc(rows)?,
            group_starts: gpu.alloc(rows + 1)?,
            group_order: gpu.alloc(rows)?,
        })
    }

    /// Copies a batch to the card.
    pub fn write(&self, gpu: &Gpu, batch: &Batch, vocabulary: usize) -> Result<OnCard, DeviceError> {
        let (tokens, rows, scored_rows) = (batch.tokens(), batch.rows(), batch.scored_rows());
        let fits = rows <= self.ids.len()
            && scored_rows <= self.scored.len()
            && batch.offsets.len() < self.offsets.len()
            && batch.scored.len() == batch.targets.len();
        if !fits || tokens == 0 || batch.scored.is_empty() {
            return Err(DeviceError::Input(format!(
                "{tokens} tokens of {} sequences, {} scored, for a learner of {}, {} and {}",
                batch.offsets.len().saturating_sub(1),
                batch.scored.len(),
                self.ids.len(),
                self.offsets.len() - 2,
                self.scored.len()
            )));
        }
        let mut ids = batch.ids.clone();
        for row in &batch.placeholders {
            ids[*row as usize] = NOWHERE;
        }
        ids.resize(rows, NOWHERE);
        let groups = Groups::of(&ids, |id| (id as usize) < vocabulary);
        let positions = (0..3).flat_map(|axis| {
            let own = batch.positions.iter().map(move |position| position[axis].cast_signed());
            own.chain(std::iter::repeat_n(0, rows - tokens))
        });
        let mut offsets = batch.offsets.clone();
        if rows > tokens {
            offsets.push(u32::try_from(rows).unwrap_or(u32::MAX));
        }
        let signed = |values: &[u32], length: usize| {
            let own = values.iter().map(|value| value.cast_signed());
            own.chain(std::iter::repeat(-1)).take(length).collect::<Vec<_>>()
        };
        Ok(OnCard {
            rows,
            scored_rows,
            scored_tokens: batch.scored.len(),
            ids: put(gpu, &self.ids, &ids)?,
            positions: put(gpu, &self.positions, &positions.collect::<Vec<_>>())?,
            offsets: put(gpu, &self.offsets, &offsets)?,
            scored: put(gpu, &self.scored, &signed(&batch.scored, scored_rows))?,
            targets: put(gpu, &self.targets, &signed(&batch.targets, scored_rows))?,
            placeholders: put(
                gpu,
                &self.placeholders,
                &signed(&batch.placeholders, batch.placeholders.len()),
            )?,
            groups: DeviceGroups::write(gpu, [&self.group_ids, &self.group_starts, &self.group_order], &groups)?,
        })
    }
}

/// Writes values to the beginning of a buffer and returns that part.
fn put<E: flotilla_kernels::Element>(gpu: &Gpu, buffer: &Buffer<E>, values: &[E]) -> Result<Buffer<E>, GpuError> {
    gpu.write(buffer, values)?;
    buffer.slice(0..values.len())
}

/// What attention leaves behind.
#[derive(Clone, Debug)]
pub(super) struct Mixed<T> {
    /// Turned queries `[rows, heads, head_dim]`, turned keys `[rows, kv_heads, head_dim]`, values: behind one another.
    pub split: Buffer<T>,
    /// Attention output, `[rows, heads * head_dim]`.
    pub out: Buffer<T>,
    /// `[heads, rows]`.
    pub lse: Buffer<f32>,
    /// The residual stream after it, `[rows, hidden]`.
    pub middle: Buffer<T>,
}

impl<T: Float> Mixed<T> {
    fn new(gpu: &Gpu, shape: &TextShape, rows: usize) -> Result<Self, GpuError> {
        Ok(Self {
            split: gpu.alloc(rows * shape.packed_width())?,
            out: gpu.alloc(rows * shape.query_width())?,
            lse: gpu.alloc(rows * shape.heads)?,
            middle: gpu.alloc(rows * shape.hidden)?,
        })
    }

    fn part(&self, shape: &TextShape, rows: usize) -> Result<Self, GpuError> {
        Ok(Self {
            split: self.split.slice(0..rows * shape.packed_width())?,
            out: self.out.slice(0..rows * shape.query_width())?,
            lse: self.lse.slice(0..rows * shape.heads)?,
            middle: self.middle.slice(0..rows * shape.hidden)?,
        })
    }
}

/// Queries, keys and values of a buffer that holds them behind one another.
pub(super) fn parts<T: Float>(shape: &TextShape, rows: usize, split: &Buffer<T>) -> Result<[Buffer<T>; 3], GpuError> {
    let (queries, keys) = (rows * shape.query_width(), rows * shape.key_width());
    Ok([
        split.slice(0..queries)?,
        split.slice(queries..queries + keys)?,
        split.slice(queries + keys..queries + 2 * keys)?,
    ])
}

/// Activations: what is kept of each layer, and what one layer needs while it is computed.
#[derive(Debug)]
pub(super) struct Activations<T> {
    /// The residual stream before each layer and after the last, `[rows, hidden]`.
    inputs: Vec<Buffer<T>>,
    /// Of the first layers each its own, then one that the others share.
    mixed: Vec<Mixed<T>>,
    /// As `mixed`: `[rows, 2 * intermediate]`.
    gate_up: Vec<Buffer<T>>,
    keep: super::plan::Keep,
    normed: Buffer<T>,
    packed: Buffer<T>,
    gated: Buffer<T>,
    dx: Buffer<T>,
    d_normed: Buffer<T>,
    d_out: Buffer<T>,
    d_split: Buffer<T>,
    delta: Buffer<f32>,
    inverse_rms: [Buffer<f32>; 2],
    /// Partial sums of gradients of norms and biases.
    pub sums: Buffer<f32>,
    pub head: Head<T>,
}

/// What the output head needs.
#[derive(Debug)]
pub(super) struct Head<T> {
    pub d_hidden: Buffer<T>,
    pub log_prob: Buffer<f32>,
    pub entropy: Buffer<f32>,
    pub lse: Buffer<f32>,
    pub d_log_prob: Buffer<f32>,
    pub scratch: Buffer<u8>,
}

/// Buffers of one layer for a batch: slices of [`Activations`].
#[derive(Debug)]
pub(super) struct OfLayer<T> {
    pub input: Buffer<T>,
    pub output: Buffer<T>,
    pub mixed: Mixed<T>,
    /// Whether `mixed` still holds what the forward pass wrote when the backward pass comes.
    pub mixed_is_kept: bool,
    pub gate_up: Buffer<T>,
    pub gate_up_is_kept: bool,
}

/// Buffers that all layers share, for a batch.
#[derive(Debug)]
pub(super) struct Shared<T> {
    pub normed: Buffer<T>,
    pub packed: Buffer<T>,
    pub gated: Buffer<T>,
    pub dx: Buffer<T>,
    pub d_normed: Buffer<T>,
    pub d_out: Buffer<T>,
    pub d_split: Buffer<T>,
    pub delta: Buffer<f32>,
    /// Of the norm before the attention, and of that after it.
    pub inverse_rms: [Buffer<f32>; 2],
}

/// The head's shape for so many scored rows.
pub(super) fn vocabulary(shape: &TextShape, settings: &Settings, rows: usize, temperature: f32) -> Vocabulary {
    let mut vocabulary = Vocabulary::new(rows, shape.hidden, shape.vocabulary, temperature);
    vocabulary.row_chunk = settings.chunk_rows();
    vocabulary
}

pub(super) fn attention(shape: &TextShape) -> Attention {
    Attention {
        heads: shape.heads,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        scale: (shape.head_dim as f32).sqrt().recip(),
        causal: true,
    }
}

impl<T: Float> Activations<T> {
    pub fn new(gpu: &Gpu, shape: &TextShape, settings: &Settings) -> Result<Self, GpuError> {
        let (rows, scored) = (settings.rows(), settings.scored_rows());
        let (hidden, layers) = (shape.hidden, shape.layers);
        // One more than is kept, for all that is not.
        let sets = |kept: usize| (kept + 1).min(layers);
        let heads = vocabulary(shape, settings, scored, 1.0);
        let scratch = heads.backward_bytes::<T>().max(heads.forward_bytes());
        let norm = Norm {
            rows,
            width: hidden,
            eps: shape.eps,
        };
        let sums = norm::rms_norm_backward_scratch(gpu, norm)
            .max(activation::bias_gradient_scratch(rows, shape.packed_width()));
        Ok(Self {
            inputs: (0..=layers)
                .map(|_| gpu.alloc(rows * hidden))
                .collect::<Result<_, _>>()?,
            mixed: (0..sets(settings.keep.attention))
                .map(|_| Mixed::new(gpu, shape, rows))
                .collect::<Result<_, _>>()?,
            gate_up: (0..sets(settings.keep.mlp))
                .map(|_| gpu.alloc(rows * 2 * shape.intermediate))
                .collect::<Result<_, _>>()?,
            keep: settings.keep,
            normed: gpu.alloc(rows * hidden)?,
            packed: gpu.alloc(rows * shape.packed_width())?,
            gated: gpu.alloc(rows * shape.intermediate)?,
            dx: gpu.alloc(rows * hidden)?,
            d_normed: gpu.alloc(rows * hidden)?,
            d_out: gpu.alloc(rows * shape.query_width())?,
            d_split: gpu.alloc(rows * shape.packed_width())?,
            delta: gpu.alloc(attention::backward_scratch(&attention(shape), rows))?,
            inverse_rms: [gpu.alloc(rows)?, gpu.alloc(rows)?],
            sums: gpu.alloc(sums)?,
            head: Head {
                d_hidden: gpu.alloc(scored * hidden)?,
                log_prob: gpu.alloc(scored)?,
                entropy: gpu.alloc(scored)?,
                lse: gpu.alloc(scored)?,
                d_log_prob: gpu.alloc(scored)?,
                scratch: gpu.alloc(scratch)?,
            },
        })
    }

    /// The residual stream before layer `index`; after the last for the number of layers.
    pub fn stream(&self, shape: &TextShape, rows: usize, index: usize) -> Result<Buffer<T>, GpuError> {
        self.inputs[index].slice(0..rows * shape.hidden)
    }

    pub fn layer(&self, shape: &TextShape, rows: usize, index: usize) -> Result<OfLayer<T>, GpuError> {
        let mixed = &self.mixed[index.min(self.mixed.len() - 1)];
        let gate_up = &self.gate_up[index.min(self.gate_up.len() - 1)];
        Ok(OfLayer {
            input: self.stream(shape, rows, index)?,
            output: self.stream(shape, rows, index + 1)?,
            mixed: mixed.part(shape, rows)?,
            mixed_is_kept: index < self.keep.attention,
            gate_up: gate_up.slice(0..rows * 2 * shape.intermediate)?,
            gate_up_is_kept: index < self.keep.mlp,
        })
    }

    pub fn shared(&self, shape: &TextShape, rows: usize) -> Result<Shared<T>, GpuError> {
        let hidden = 0..rows * shape.hidden;
        let packed = 0..rows * shape.packed_width();
        Ok(Shared {
            normed: self.normed.slice(hidden.clone())?,
            packed: self.packed.slice(packed.clone())?,
            gated: self.gated.slice(0..rows * shape.intermediate)?,
            dx: self.dx.slice(hidden.clone())?,
            d_normed: self.d_normed.slice(hidden)?,
            d_out: self.d_out.slice(0..rows * shape.query_width())?,
            d_split: self.d_split.slice(packed)?,
            delta: self
                .delta
                .slice(0..attention::backward_scratch(&attention(shape), rows))?,
            inverse_rms: [self.inverse_rms[0].slice(0..rows)?, self.inverse_rms[1].slice(0..rows)?],
        })
    }
}
