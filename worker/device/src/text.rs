//! The language model, computed: one step over decoded sequences and chunks of prompts together.

use std::collections::{HashMap, HashSet};

use flotilla_kernels::{
    Buffer, Float, Gemm, Gpu, GpuError, Graph,
    activation::swiglu,
    attention::{self, Attention, Pool},
    norm::{Norm, rms_norm},
    paged::{self, Decode},
    rotary::{self, Cache, Heads, SplitInto, Turn},
    rows, sampling,
};
use flotilla_model::rope::frequencies;

use crate::{
    pool::DevicePool,
    shape::TextShape,
    step::{Mail, Size},
    weights::{Layer, TextWeights},
};

/// Activations of the largest step, allocated once.
#[derive(Debug)]
struct Arena<T> {
    /// `[tokens, hidden]`: the residual stream.
    stream: Buffer<T>,
    /// `[tokens, hidden]`: what a norm gives.
    normed: Buffer<T>,
    /// `[tokens, hidden]`: what attention and MLP give back.
    branch: Buffer<T>,
    /// `[tokens, packed]`.
    qkv: Buffer<T>,
    /// `[tokens, query_width]`.
    queries: Buffer<T>,
    /// `[tokens, query_width]`.
    mixed: Buffer<T>,
    /// `[tokens, 2 * intermediate]`.
    gate_up: Buffer<T>,
    /// `[tokens, intermediate]`.
    gated: Buffer<T>,
    /// `[sequences, hidden]`: states after which tokens are wanted.
    last: Buffer<T>,
    /// `[sequences, vocabulary]`.
    logits: Buffer<f32>,
    /// `[3, decodes]`: drawn tokens, their log-probabilities, those at temperature 1.
    drawn: Buffer<u32>,
    /// Words of the step.
    mail: Buffer<u32>,
    paged: paged::Scratch,
    sampling: sampling::Scratch,
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

/// A language model on the card.
#[derive(Debug)]
pub struct TextModel<T> {
    gpu: Gpu,
    weights: TextWeights<T>,
    frequencies: Buffer<f32>,
    axis_of: Buffer<u8>,
    capacity: Capacity,
    arena: Arena<T>,
    graphs: HashMap<Size, Graph>,
    /// Sizes that have run once: their kernels are compiled and their products planned.
    warm: HashSet<Size>,
}

impl<T: Float> TextModel<T> {
    /// Takes the weights as they are: a learner that has the same buffers changes this model.
    pub fn new(gpu: &Gpu, weights: TextWeights<T>, capacity: Capacity) -> Result<Self, GpuError> {
        let shape = &weights.shape;
        let capacity = Capacity {
            tokens: capacity.tokens.next_multiple_of(256) + 256,
            sequences: capacity.sequences.next_multiple_of(32) * 2,
            blocks: capacity.blocks.next_power_of_two().max(64),
            ..capacity
        };
        let arena = Arena::new(gpu, shape, capacity)?;
        let axes = shape.axes().into_iter().map(|axis| u8::try_from(axis).unwrap_or_default());
        Ok(Self {
            frequencies: gpu.upload(&frequencies(shape.theta, shape.head_dim))?,
            axis_of: gpu.upload(&axes.collect::<Vec<_>>())?,
            gpu: gpu.clone(),
            arena,
            weights,
            capacity,
            graphs: HashMap::new(),
            warm: HashSet::new(),
        })
    }

    /// The card.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The weights.
    pub fn weights(&self) -> &TextWeights<T> {
        &self.weights
    }

    /// Sizes.
    pub fn shape(&self) -> &TextShape {
        &self.weights.shape
    }

    /// The largest step.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// Computes a step of this size from its words: keys and values are stored, logits after the last token of every sequence
    /// are in [`Self::logits`], and a token is drawn for each decoded sequence. `features` `[rows, hidden]` stand in the place
    /// of the embeddings of these rows of activations.
    ///
    /// A step without prompts is recorded when its size comes a second time, and replayed from then on.
    pub fn step(
        &mut self,
        pool: &DevicePool<T>,
        size: Size,
        words: &[u32],
        features: &[(Vec<i32>, Buffer<T>)],
    ) -> Result<(), GpuError> {
        self.gpu.write(&self.arena.mail, words)?;
        let recordable = size.prefill == 0 && features.is_empty();
        if !recordable || self.warm.insert(size) {
            return self.compute(pool, size, features);
        }
        let graph = match self.graphs.get_mut(&size) {
            Some(graph) => graph,
            None => {
                let graph = self.gpu.record(|| self.compute(pool, size, &[]))?;
                self.graphs.entry(size).or_insert(graph)
            }
        };
        self.gpu.replay(graph)
    }

    /// Forgets recorded steps: they hold the pool that they were recorded with.
    pub fn forget_graphs(&mut self) {
        self.graphs.clear();
    }

    /// Logits after the last tokens of the step's sequences, `[sequences, vocabulary]`.
    pub fn logits(&self) -> &Buffer<f32> {
        &self.arena.logits
    }

    /// Drawn tokens `[decodes]`, then the bits of their log-probabilities, then of those at temperature 1.
    pub fn drawn(&self) -> &Buffer<u32> {
        &self.arena.drawn
    }

    fn compute(&self, pool: &DevicePool<T>, size: Size, features: &[(Vec<i32>, Buffer<T>)]) -> Result<(), GpuError> {
        let (gpu, shape, arena) = (&self.gpu, self.shape(), &self.arena);
        let tokens = size.tokens();
        let mail = Words::new(size, &arena.mail)?;
        let stream = arena.stream.slice(0..tokens * shape.hidden)?;
        rows::embed(gpu, shape.hidden, &self.weights.embedding, &mail.ids, &stream)?;
        for (at, features) in features {
            rows::place(gpu, shape.hidden, features, &gpu.upload(at)?, &stream)?;
        }
        let decode = self.decode(pool, size);
        if size.decodes > 0 {
            let groups = (size.groups > 0).then_some(&mail.groups);
            let lengths = mail.lengths.slice(0..size.decodes)?;
            paged::plan(gpu, &decode, &lengths, groups, &arena.paged)?;
        }
        let norm = self.norm(tokens);
        for (index, layer) in self.weights.layers.iter().enumerate() {
            // The sum of the layer before is added to the stream by the norm that follows it.
            match index {
                0 => rms_norm(gpu, norm, &stream, None, &layer.input_norm, &arena.normed, None)?,
                _ => rms_norm(
                    gpu,
                    norm,
                    &arena.branch,
                    Some(&stream),
                    &layer.input_norm,
                    &arena.normed,
                    None,
                )?,
            }
            self.attend(pool, index, layer, size, &decode, &mail)?;
            rms_norm(
                gpu,
                norm,
                &arena.branch,
                Some(&stream),
                &layer.post_norm,
                &arena.normed,
                None,
            )?;
            self.linear(tokens, (2 * shape.intermediate, shape.hidden), &arena.normed, &layer.gate_up, &arena.gate_up)?;
            swiglu(gpu, tokens, shape.intermediate, &arena.gate_up, &arena.gated)?;
            self.linear(tokens, (shape.hidden, shape.intermediate), &arena.gated, &layer.down, &arena.branch)?;
        }
        rms_norm(
            gpu,
            norm,
            &arena.branch,
            Some(&stream),
            &self.weights.norm,
            &arena.normed,
            None,
        )?;
        self.answer(size, &mail)
    }

    fn norm(&self, rows: usize) -> Norm {
        Norm {
            rows,
            width: self.shape().hidden,
            eps: self.shape().eps,
        }
    }

    fn decode(&self, pool: &DevicePool<T>, size: Size) -> Decode {
        let shape = self.shape();
        Decode {
            rows: size.decodes,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            block_size: pool.block_size,
            max_blocks: size.blocks,
            groups: size.groups,
            scale: (shape.head_dim as f32).sqrt().recip(),
        }
    }

    /// Queries, keys and values from the normed stream, keys and values into the pool, and attention over it; the result is
    /// in `branch`.
    fn attend(
        &self,
        pool: &DevicePool<T>,
        index: usize,
        layer: &Layer<T>,
        size: Size,
        decode: &Decode,
        mail: &Words,
    ) -> Result<(), GpuError> {
        let (gpu, shape, arena) = (&self.gpu, self.shape(), &self.arena);
        let (tokens, width) = (size.tokens(), shape.query_width());
        self.linear(tokens, (shape.packed_width(), shape.hidden), &arena.normed, &layer.qkv, &arena.qkv)?;
        let (keys, values) = &pool.layers[index];
        let heads = Heads {
            tokens,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
        };
        let turn = Turn {
            axes: 3,
            positions: &mail.positions,
            frequencies: &self.frequencies,
            axis_of: &self.axis_of,
        };
        let into = SplitInto {
            q: &arena.queries,
            k: None,
            v: None,
            cache: Some(Cache {
                keys,
                values,
                slots: &mail.slots,
                block_size: pool.block_size,
            }),
        };
        rotary::split(gpu, heads, &arena.qkv, Some(&layer.qkv_bias), Some(turn), into)?;
        if size.decodes > 0 {
            let operands = paged::Operands {
                q: &arena.queries,
                keys,
                values,
                tables: &mail.tables,
                out: &arena.mixed,
                lse: None,
            };
            paged::attend(gpu, decode, &operands, &arena.paged)?;
        }
        if size.prefill > 0 {
            let after = |buffer: &Buffer<T>| buffer.slice(size.decodes * width..tokens * width);
            let rule = Attention {
                heads: shape.heads,
                kv_heads: shape.kv_heads,
                head_dim: shape.head_dim,
                scale: decode.scale,
                causal: true,
            };
            let stored = Pool {
                keys,
                values,
                tables: &mail.tables.slice(size.decodes * size.blocks..mail.tables.len())?,
                block_size: pool.block_size,
                kv_lengths: &mail.lengths.slice(size.decodes..mail.lengths.len())?,
            };
            let queries = after(&arena.queries)?;
            attention::prefill(
                gpu,
                &rule,
                attention::Rows::new(&queries, width),
                size.prefill,
                &mail.offsets,
                &stored,
                &after(&arena.mixed)?,
            )?;
        }
        self.linear(tokens, (shape.hidden, width), &arena.mixed, &layer.output, &arena.branch)
    }

    /// Logits after the last tokens, and the draws.
    fn answer(&self, size: Size, mail: &Words) -> Result<(), GpuError> {
        let (gpu, shape, arena) = (&self.gpu, self.shape(), &self.arena);
        let (sequences, decodes) = (size.sequences(), size.decodes);
        let normed = arena.normed.slice(0..size.tokens() * shape.hidden)?;
        let last = arena.last.slice(0..sequences * shape.hidden)?;
        rows::gather_rows(gpu, shape.hidden, &normed, &mail.last, &last)?;
        self.linear(sequences, (shape.vocabulary, shape.hidden), &last, &self.weights.head, &arena.logits)?;
        if decodes == 0 {
            return Ok(());
        }
        let part = |index: usize| arena.drawn.slice(index * decodes..(index + 1) * decodes);
        sampling::draw(
            gpu,
            &sampling::Draws {
                rows: decodes,
                vocabulary: shape.vocabulary,
            },
            &arena.logits,
            &mail.parameters,
            &sampling::Drawn {
                tokens: &part(0)?,
                log_probs: &part(1)?.cast()?,
                model_log_probs: &part(2)?.cast()?,
            },
            &arena.sampling,
        )
    }

    /// `out[rows, outputs] = x[rows, inputs] · weight[outputs, inputs]ᵀ`.
    fn linear<O: Float>(
        &self,
        rows: usize,
        (outputs, inputs): (usize, usize),
        x: &Buffer<T>,
        weight: &Buffer<T>,
        out: &Buffer<O>,
    ) -> Result<(), GpuError> {
        self.gpu.gemm(Gemm::linear(rows, outputs, inputs), x, weight, out)
    }
}

impl<T: Float> Arena<T> {
    fn new(gpu: &Gpu, shape: &TextShape, capacity: Capacity) -> Result<Self, GpuError> {
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
        let draws = sampling::Draws {
            rows: sequences,
            vocabulary: shape.vocabulary,
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
            logits: gpu.alloc(sequences * shape.vocabulary)?,
            drawn: gpu.alloc(3 * sequences)?,
            mail: gpu.alloc(Mail::new(largest).words)?,
            paged: paged::Scratch::new(gpu, &decode)?,
            sampling: sampling::Scratch::new(gpu, &draws)?,
        })
    }
}

/// The parts of a step's words on the card.
struct Words {
    ids: Buffer<u32>,
    positions: Buffer<i32>,
    slots: Buffer<i32>,
    tables: Buffer<u32>,
    lengths: Buffer<i32>,
    offsets: Buffer<u32>,
    groups: Buffer<i32>,
    last: Buffer<i32>,
    parameters: sampling::Parameters,
}

impl Words {
    fn new(size: Size, words: &Buffer<u32>) -> Result<Self, GpuError> {
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
            parameters: sampling::Parameters {
                temperature: part(&mail.temperature)?.cast()?,
                top_k: part(&mail.top_k)?.cast()?,
                top_p: part(&mail.top_p)?.cast()?,
                min_p: part(&mail.min_p)?.cast()?,
                uniform: part(&mail.uniform)?.cast()?,
            },
        })
    }
}
