//! Memory of the language model's steps: activations, allocated once, and the parts of them that a step uses.

use flotilla_kernels::{
    Buffer, Float, Gpu, GpuError,
    paged::{self, Decode},
};

use crate::{
    shape::TextShape,
    step::{Mail, Size},
};

/// Activations of the largest step, allocated once.
#[derive(Debug)]
pub(crate) struct Arena<T> {
    /// `[tokens, hidden]`: the residual stream.
    pub(crate) stream: Buffer<T>,
    /// `[tokens, hidden]`: what a norm gives.
    pub(crate) normed: Buffer<T>,
    /// `[tokens, hidden]`: what attention and MLP give back.
    pub(crate) branch: Buffer<T>,
    /// `[tokens, packed]`.
    pub(crate) qkv: Buffer<T>,
    /// `[tokens, query_width]`.
    pub(crate) queries: Buffer<T>,
    /// `[tokens, query_width]`.
    pub(crate) mixed: Buffer<T>,
    /// `[tokens, 2 * intermediate]`.
    pub(crate) gate_up: Buffer<T>,
    /// `[tokens, intermediate]`.
    pub(crate) gated: Buffer<T>,
    /// `[sequences, hidden]`: states after which tokens are wanted.
    pub(crate) last: Buffer<T>,
    /// `[sequences, vocabulary]`.
    pub(crate) logits: Buffer<f32>,
    /// `[3, sequences]`, of the step's size: drawn tokens, their log-probabilities, those at temperature 1.
    pub(crate) drawn: Buffer<u32>,
    /// Words of the step.
    pub(crate) mail: Buffer<u32>,
    pub(crate) paged: paged::Scratch,
}

/// The largest step.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Capacity {
    /// Rows of activations.
    pub tokens: usize,
    /// Sequences of a step.
    pub sequences: usize,
    /// Blocks of one sequence.
    pub blocks: usize,
    /// Tokens of a block.
    pub block_size: usize,
}

impl Capacity {
    /// Rounded up, with room for what a step rounds up.
    pub(crate) fn rounded(self) -> Self {
        Self {
            tokens: self.tokens.next_multiple_of(256) + 256,
            sequences: self.sequences.next_multiple_of(32) * 2,
            blocks: self.blocks.next_power_of_two().max(64),
            ..self
        }
    }
}

impl<T: Float> Arena<T> {
    pub(crate) fn new(gpu: &Gpu, shape: &TextShape, vocabulary: usize, capacity: Capacity) -> Result<Self, GpuError> {
        let Capacity { tokens, sequences, .. } = capacity;
        let largest = Size {
            decodes: sequences,
            prefill: tokens,
            chunks: sequences,
            blocks: capacity.blocks,
            groups: sequences,
        };
        let decode = Decode {
            rows: sequences,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            block_size: capacity.block_size,
            max_blocks: capacity.blocks,
            groups: sequences,
            scale: 1.0,
        };
        Ok(Self {
            stream: gpu.alloc(tokens * shape.hidden)?,
            normed: gpu.alloc(tokens * shape.hidden)?,
            branch: gpu.alloc(tokens * shape.hidden)?,
            qkv: gpu.alloc(tokens * shape.packed_width())?,
            queries: gpu.alloc(tokens * shape.query_width())?,
            mixed: gpu.alloc(tokens * shape.query_width())?,
            gate_up: gpu.alloc(tokens * 2 * shape.intermediate)?,
            gated: gpu.alloc(tokens * shape.intermediate)?,
            last: gpu.alloc(sequences * shape.hidden)?,
            logits: gpu.alloc(sequences * vocabulary)?,
            drawn: gpu.alloc(3 * sequences)?,
            mail: gpu.alloc(Mail::new(largest).words)?,
            paged: paged::Scratch::new(gpu, &decode)?,
        })
    }
}

/// The parts of the arena that a step of one size uses.
pub(crate) struct Views<T> {
    pub(crate) stream: Buffer<T>,
    pub(crate) normed: Buffer<T>,
    pub(crate) branch: Buffer<T>,
    pub(crate) qkv: Buffer<T>,
    pub(crate) queries: Buffer<T>,
    pub(crate) mixed: Buffer<T>,
    pub(crate) gate_up: Buffer<T>,
    /// What a product in parts leaves: the memory of `gate_up`, which is not in use then.
    pub(crate) sums: Buffer<f32>,
    pub(crate) gated: Buffer<T>,
    pub(crate) last: Buffer<T>,
    pub(crate) logits: Buffer<f32>,
}

impl<T: Float> Views<T> {
    pub(crate) fn new(arena: &Arena<T>, shape: &TextShape, vocabulary: usize, size: Size) -> Result<Self, GpuError> {
        let (tokens, sequences) = (size.tokens(), size.sequences());
        let rows = |buffer: &Buffer<T>, width: usize| buffer.slice(0..tokens * width);
        Ok(Self {
            stream: rows(&arena.stream, shape.hidden)?,
            normed: rows(&arena.normed, shape.hidden)?,
            branch: rows(&arena.branch, shape.hidden)?,
            qkv: rows(&arena.qkv, shape.packed_width())?,
            queries: rows(&arena.queries, shape.query_width())?,
            mixed: rows(&arena.mixed, shape.query_width())?,
            gate_up: rows(&arena.gate_up, 2 * shape.intermediate)?,
            sums: arena.gate_up.cast()?,
            gated: rows(&arena.gated, shape.intermediate)?,
            last: arena.last.slice(0..sequences * shape.hidden)?,
            logits: arena.logits.slice(0..sequences * vocabulary)?,
        })
    }
}

/// The parts of a step's words on the card.
pub(crate) struct Words {
    pub(crate) ids: Buffer<u32>,
    pub(crate) positions: Buffer<i32>,
    pub(crate) slots: Buffer<i32>,
    pub(crate) tables: Buffer<u32>,
    pub(crate) lengths: Buffer<i32>,
    pub(crate) offsets: Buffer<u32>,
    pub(crate) groups: Buffer<i32>,
    pub(crate) last: Buffer<i32>,
    pub(crate) temperature: Buffer<f32>,
    pub(crate) top_k: Buffer<u32>,
    pub(crate) top_p: Buffer<f32>,
    pub(crate) min_p: Buffer<f32>,
    pub(crate) uniform: Buffer<f32>,
}

impl Words {
    pub(crate) fn new(size: Size, words: &Buffer<u32>) -> Result<Self, GpuError> {
        let mail = Mail::new(size);
        let part = |range: &std::ops::Range<usize>| words.slice(range.clone());
        Ok(Self {
            ids: part(&mail.ids)?,
            positions: part(&mail.positions)?.cast()?,
            slots: part(&mail.slots)?.cast()?,
            tables: part(&mail.tables)?,
            lengths: part(&mail.lengths)?.cast()?,
            offsets: part(&mail.offsets)?,
            groups: part(&mail.groups)?.cast()?,
            last: part(&mail.last)?.cast()?,
            temperature: part(&mail.temperature)?.cast()?,
            top_k: part(&mail.top_k)?,
            top_p: part(&mail.top_p)?.cast()?,
            min_p: part(&mail.min_p)?.cast()?,
            uniform: part(&mail.uniform)?.cast()?,
        })
    }
}
