//! The language model, computed: one step over decoded sequences and chunks of prompts together.

use std::collections::{HashMap, HashSet};

use flotilla_kernels::{
    Buffer, Float, Gemm, Gpu, GpuError, Graph, Outbox, ShapeError,
    activation::swiglu,
    attention::{self, Attention, Pool},
    norm::{Norm, rms_norm, rms_norm_of_parts},
    paged::{self, Decode},
    rotary::{self, Cache, Heads, SplitInto, Turn},
    rows, sampling,
    skinny::{self, Added, Epilogue, MOST_ROWS, Skinny},
    streamed,
};
use flotilla_model::rope::frequencies;

use crate::{
    arena::{Arena, Capacity, Views, Words},
    peers::Peers,
    pool::DevicePool,
    shape::TextShape,
    step::{Mail, Size},
    weights::TextWeights,
};
#[cfg(feature = "nccl")]
use crate::{
    parallel::{
        CollectiveError, Nccl, Shard,
        orders::{self, Order},
    },
    peers::Group,
};

/// A language model on the card, or the part of one that a rank of a group holds.
#[derive(Debug)]
pub struct TextModel<T> {
    gpu: Gpu,
    weights: TextWeights<T>,
    frequencies: Buffer<f32>,
    axis_of: Buffer<u8>,
    capacity: Capacity,
    arena: Arena<T>,
    /// Before the peers, whose operations they hold.
    graphs: HashMap<Size, Graph>,
    /// The number of the pool that they hold.
    recorded: Option<u64>,
    peers: Peers,
    /// Sizes that have run once: their kernels are compiled and their products planned.
    warm: HashSet<Size>,
}

impl<T: Float> TextModel<T> {
    /// Takes the weights as they are: a learner that has the same buffers changes this model.
    pub fn new(gpu: &Gpu, weights: TextWeights<T>, capacity: Capacity) -> Result<Self, GpuError> {
        Self::with_peers(gpu, weights, capacity.rounded(), Peers::None)
    }

    /// One rank's part of a model: `weights` are those of `shard`. Every rank must be given the same steps; each then has
    /// all logits and draws the same tokens.
    #[cfg(feature = "nccl")]
    pub fn in_group(
        gpu: &Gpu,
        weights: TextWeights<T>,
        capacity: Capacity,
        shard: Shard,
        nccl: Nccl,
    ) -> Result<Self, GpuError> {
        let capacity = capacity.rounded();
        let group = Group::new(gpu, nccl, shard, capacity.sequences)?;
        Self::with_peers(gpu, weights, capacity, Peers::Group(Box::new(group)))
    }

    fn with_peers(gpu: &Gpu, weights: TextWeights<T>, capacity: Capacity, peers: Peers) -> Result<Self, GpuError> {
        let shape = &weights.shape;
        let arena = Arena::new(gpu, shape, peers.vocabulary(shape), capacity)?;
        let axes = shape
            .axes()
            .into_iter()
            .map(|axis| u8::try_from(axis).unwrap_or_default());
        Ok(Self {
            frequencies: gpu.upload(&frequencies(shape.theta, shape.head_dim))?,
            axis_of: gpu.upload(&axes.collect::<Vec<_>>())?,
            gpu: gpu.clone(),
            arena,
            weights,
            capacity,
            graphs: HashMap::new(),
            recorded: None,
            peers,
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

    /// Tokens that logits are of: all, also where this is one rank's part.
    pub fn vocabulary(&self) -> usize {
        self.peers.vocabulary(self.shape())
    }

    /// Waits for everything that was computed. In a group, do it before results are read: a peer that is gone is an error
    /// here, and would be waited for elsewhere.
    #[cfg(feature = "nccl")]
    pub fn wait(&mut self) -> Result<(), CollectiveError> {
        match &mut self.peers {
            Peers::None => Ok(self.gpu.synchronize()?),
            Peers::Group(group) => group.wait(),
        }
    }

    /// In a group, waits for what was computed, so that a peer that is gone is an error and not waited for. Without one,
    /// whatever is read waits.
    pub fn settle(&mut self) -> Result<(), GpuError> {
        self.peers.settle()
    }

    /// Makes this rank, which is 0, the one whose steps the others repeat; they must be in [`Self::follow`].
    #[cfg(feature = "nccl")]
    pub fn lead(&mut self) {
        if let Peers::Group(group) = &mut self.peers {
            group.lead();
        }
    }

    /// Repeats the steps of rank 0 until it ends, or fails with the name of the rank that did. The pool is made as the
    /// leader's is; it lives as long as steps come that use it.
    #[cfg(feature = "nccl")]
    pub fn follow(&mut self) -> Result<(), CollectiveError> {
        let gpu = self.gpu.clone();
        let hidden = self.shape().hidden;
        let mut pool: Option<DevicePool<T>> = None;
        while let Peers::Group(group) = &mut self.peers {
            let order = orders::take::<T>(group.nccl(), &gpu, hidden)?;
            let (Order::Step { pool: wanted, .. } | Order::Copy { pool: wanted, .. }) = &order else {
                self.forget_graphs();
                return Ok(());
            };
            let used = match pool.take() {
                Some(pool) if (pool.blocks, pool.block_size) == *wanted => pool,
                old => {
                    self.forget_graphs();
                    drop(old);
                    DevicePool::new(&gpu, self.shape(), wanted.0, wanted.1)?
                }
            };
            match order {
                Order::Step {
                    size, words, features, ..
                } => {
                    self.fits(size).map_err(GpuError::from)?;
                    self.step(&used, size, &words, &features)?;
                    // The leader waits before it reads; this is where a failure shows here.
                    self.wait()?;
                }
                Order::Copy { pairs, .. } => used.copy(&gpu, &pairs)?,
                Order::End => {}
            }
            pool = Some(used);
        }
        Ok(())
    }

    /// The group that this is a part of.
    #[cfg(feature = "nccl")]
    pub fn group(&mut self) -> Option<&mut Nccl> {
        match &mut self.peers {
            Peers::None => None,
            Peers::Group(group) => Some(group.nccl()),
        }
    }

    /// Ends the model and gives its place in a group back.
    #[cfg(feature = "nccl")]
    pub fn into_group(self) -> Option<Nccl> {
        let Self { graphs, peers, .. } = self;
        drop(graphs);
        match peers {
            Peers::None => None,
            Peers::Group(group) => Some(group.into_nccl()),
        }
    }

    /// The largest step.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// Refuses a step that the arena has no room for.
    pub fn fits(&self, size: Size) -> Result<(), ShapeError> {
        let Capacity {
            tokens,
            sequences,
            blocks,
            ..
        } = self.capacity;
        let fits = size.tokens() <= tokens && size.sequences() <= sequences && size.blocks <= blocks;
        ShapeError::unless("step", fits, || {
            format!("{size:?} does not fit into {:?}", self.capacity)
        })
    }

    /// Computes a step of this size from its words: keys and values are stored, logits after the last token of every sequence
    /// are in [`Self::logits`], and a token is drawn for each. `features` `[rows, hidden]` stand in the place
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
        self.peers
            .tell_step((pool.blocks, pool.block_size), size, words, features)?;
        let mut words = words.to_vec();
        self.peers.localize(&mut words[Mail::new(size).ids]);
        self.gpu.write(&self.arena.mail, &words)?;
        self.run(pool, size, features)
    }

    /// As [`Self::step`], with the words in page-locked memory.
    pub fn post(
        &mut self,
        pool: &DevicePool<T>,
        size: Size,
        words: &mut Outbox<u32>,
        features: &[(Vec<i32>, Buffer<T>)],
    ) -> Result<(), GpuError> {
        let filled = words.filled()?;
        self.peers
            .tell_step((pool.blocks, pool.block_size), size, filled, features)?;
        self.peers.localize(&mut filled[Mail::new(size).ids]);
        words.send(&self.arena.mail)?;
        self.run(pool, size, features)
    }

    /// Whether no other rank has a part of the model.
    pub fn is_whole(&self) -> bool {
        self.peers.is_none()
    }

    /// As [`Self::post`], of a step of a [whole](Self::is_whole) model, while the one before is computed. Its ids are tokens that the step before draws, as the words [`Mail::from`] say.
    pub fn post_after(&mut self, pool: &DevicePool<T>, size: Size, words: &mut Outbox<u32>) -> Result<(), GpuError> {
        words.send(&self.arena.mail)?;
        let (mail, drawn) = (&self.arena.mail, &self.arena.drawn);
        let Mail { ids, from, .. } = Mail::new(size);
        // Moved as they are, 4 bytes each.
        let (ids, from, drawn) = (mail.slice(ids)?.cast()?, mail.slice(from)?.cast()?, drawn.cast()?);
        rows::gather_rows::<f32>(&self.gpu, 1, &drawn, &from, &ids)?;
        self.run(pool, size, &[])
    }

    /// Launches a step whose words are there.
    fn run(&mut self, pool: &DevicePool<T>, size: Size, features: &[(Vec<i32>, Buffer<T>)]) -> Result<(), GpuError> {
        if self.recorded != Some(pool.number) {
            self.forget_graphs();
            self.recorded = Some(pool.number);
        }
        let recordable = size.prefill == 0 && features.is_empty();
        if !recordable || !self.warm.contains(&size) {
            self.compute(pool, size, features)?;
            if recordable {
                self.warm.insert(size);
            }
            return Ok(());
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

    /// Copies whole blocks of a pool, at all ranks of a group.
    pub fn copy(&mut self, pool: &DevicePool<T>, pairs: &[(u32, u32)]) -> Result<(), GpuError> {
        if pairs.is_empty() {
            return Ok(());
        }
        self.peers.tell_copy((pool.blocks, pool.block_size), pairs)?;
        pool.copy(&self.gpu, pairs)
    }

    /// Forgets recorded steps: they hold the pool that they were recorded with.
    pub fn forget_graphs(&mut self) {
        self.graphs.clear();
    }

    /// Logits after the last tokens of the step's sequences, `[sequences, vocabulary]`.
    pub fn logits(&self) -> &Buffer<f32> {
        &self.arena.logits
    }

    /// Drawn tokens `[sequences]`, then the bits of their log-probabilities, then of those at temperature 1.
    pub fn drawn(&self) -> &Buffer<u32> {
        &self.arena.drawn
    }

    fn compute(&self, pool: &DevicePool<T>, size: Size, features: &[(Vec<i32>, Buffer<T>)]) -> Result<(), GpuError> {
        let (gpu, shape) = (&self.gpu, self.shape());
        let tokens = size.tokens();
        let views = Views::new(&self.arena, shape, self.vocabulary(), size)?;
        let words = Words::new(size, &self.arena.mail)?;
        let (stream, normed, branch) = (&views.stream, &views.normed, &views.branch);
        rows::embed(gpu, shape.hidden, &self.weights.embedding, &words.ids, stream)?;
        self.peers.sum(stream)?;
        for (at, features) in features {
            rows::place(gpu, shape.hidden, features, &gpu.upload(at)?, stream)?;
        }
        let decode = self.decode(pool, size);
        if size.decodes > 0 {
            let groups = (size.groups > 0).then_some(&words.groups);
            let lengths = words.lengths.slice(0..size.decodes)?;
            paged::plan(gpu, &decode, &lengths, groups, &self.arena.paged)?;
        }
        let norm = Norm {
            rows: tokens,
            width: shape.hidden,
            eps: shape.eps,
        };
        // A norm first adds to the stream what the branch before it gives back, which may be in parts.
        let add_and_norm = |parts: Option<usize>, weight: &Buffer<T>| match parts {
            None => rms_norm(gpu, norm, branch, Some(stream), weight, normed, None),
            Some(count) => rms_norm_of_parts(gpu, norm, (&views.sums, count), stream, weight, normed),
        };
        let mut parts = None;
        for (index, layer) in self.weights.layers.iter().enumerate() {
            match index {
                0 => rms_norm(gpu, norm, stream, None, &layer.input_norm, normed, None)?,
                _ => add_and_norm(parts, &layer.input_norm)?,
            }
            self.attend(pool, index, size, &decode, &words, &views)?;
            parts = self.give_back(tokens, &views.mixed, &layer.output, &views)?;
            add_and_norm(parts, &layer.post_norm)?;
            self.gate(tokens, &layer.gate_up, &views)?;
            parts = self.give_back(tokens, &views.gated, &layer.down, &views)?;
        }
        add_and_norm(parts, &self.weights.norm)?;
        self.answer(size, &words, &views)
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
    /// in `mixed`.
    fn attend(
        &self,
        pool: &DevicePool<T>,
        index: usize,
        size: Size,
        decode: &Decode,
        words: &Words,
        views: &Views<T>,
    ) -> Result<(), GpuError> {
        let (gpu, shape, layer) = (&self.gpu, self.shape(), &self.weights.layers[index]);
        let (tokens, width) = (size.tokens(), shape.query_width());
        let product = Skinny::plain(tokens, shape.packed_width(), shape.hidden);
        let parts = self.parts(product, views);
        match parts {
            Some(_) => streamed::parts(gpu, product, &views.normed, &layer.qkv, &views.sums)?,
            None => self.linear(tokens, &views.normed, &layer.qkv, &views.qkv)?,
        }
        let (keys, values) = &pool.layers[index];
        let heads = Heads {
            tokens,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
        };
        let turn = Turn {
            axes: 3,
            positions: &words.positions,
            frequencies: &self.frequencies,
            axis_of: &self.axis_of,
        };
        let into = SplitInto {
            q: &views.queries,
            k: None,
            v: None,
            cache: Some(Cache {
                keys,
                values,
                slots: &words.slots,
                block_size: pool.block_size,
            }),
        };
        let (bias, turn) = (Some(&layer.qkv_bias), Some(turn));
        match parts {
            Some(count) => rotary::split_parts(gpu, heads, (&views.sums, count), bias, turn, into)?,
            None => rotary::split(gpu, heads, &views.qkv, bias, turn, into)?,
        }
        let (decoded, entries) = (size.decodes * width, size.decodes * size.blocks);
        if size.decodes > 0 {
            let operands = paged::Operands {
                q: &views.queries.slice(0..decoded)?,
                keys,
                values,
                tables: &words.tables.slice(0..entries)?,
                out: &views.mixed.slice(0..decoded)?,
                lse: None,
            };
            paged::attend(gpu, decode, &operands, &self.arena.paged)?;
        }
        if size.prefill > 0 {
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
                tables: &words.tables.slice(entries..words.tables.len())?,
                block_size: pool.block_size,
                kv_lengths: &words.lengths.slice(size.decodes..words.lengths.len())?,
            };
            let queries = views.queries.slice(decoded..tokens * width)?;
            let mixed = views.mixed.slice(decoded..tokens * width)?;
            let queries = attention::Rows::new(&queries, width);
            attention::prefill(gpu, &rule, queries, size.prefill, &words.offsets, &stored, &mixed)?;
        }
        Ok(())
    }

    /// In how many parts this product is computed, for the next kernel to add up; none where it is computed whole.
    fn parts(&self, layer: Skinny, views: &Views<T>) -> Option<usize> {
        let count = streamed::count(&self.gpu, T::DTYPE, layer)?;
        let fits = count * layer.rows * layer.outputs <= views.sums.len();
        (fits && streamed::pays(layer, count)).then_some(count)
    }

    /// The last product of a branch, into `branch` or, where it is computed in parts, so many of them into `sums`.
    fn give_back(
        &self,
        rows: usize,
        x: &Buffer<T>,
        weight: &Buffer<T>,
        views: &Views<T>,
    ) -> Result<Option<usize>, GpuError> {
        let layer = Skinny::plain(rows, self.shape().hidden, x.len() / rows.max(1));
        let count = match self.peers {
            Peers::None => self.parts(layer, views),
            // What is summed over cards is whole.
            #[cfg(feature = "nccl")]
            Peers::Group(_) => None,
        };
        if count.is_some() {
            streamed::parts(&self.gpu, layer, x, weight, &views.sums)?;
        } else {
            self.linear(rows, x, weight, &views.branch)?;
            self.peers.sum(&views.branch)?;
        }
        Ok(count)
    }

    /// Logits after the last tokens, and the draws.
    fn answer(&self, size: Size, words: &Words, views: &Views<T>) -> Result<(), GpuError> {
        let (gpu, shape) = (&self.gpu, self.shape());
        rows::gather_rows(gpu, shape.hidden, &views.normed, &words.last, &views.last)?;
        let own = self.peers.own_logits(&views.logits)?;
        let head = Gemm::linear(size.sequences(), shape.vocabulary, shape.hidden);
        gpu.gemm(head, &views.last, &self.weights.head, &own)?;
        self.peers.gather(&views.logits)?;
        let sequences = size.sequences();
        let part = |index: usize| self.arena.drawn.slice(index * sequences..(index + 1) * sequences);
        sampling::draw(
            gpu,
            &sampling::Draws {
                rows: sequences,
                vocabulary: self.vocabulary(),
            },
            &views.logits,
            &sampling::Parameters {
                temperature: &words.temperature,
                top_k: &words.top_k,
                top_p: &words.top_p,
                min_p: &words.min_p,
                uniform: &words.uniform,
            },
            &sampling::Drawn {
                token: &part(0)?,
                log_prob: &part(1)?.cast()?,
                model_log_prob: &part(2)?.cast()?,
            },
        )
    }

    /// The gated half of the MLP: `normed` to `gated`.
    fn gate(&self, rows: usize, weight: &Buffer<T>, views: &Views<T>) -> Result<(), GpuError> {
        let (gpu, shape) = (&self.gpu, self.shape());
        let layer = Skinny {
            rows,
            outputs: shape.intermediate,
            inputs: shape.hidden,
            epilogue: Epilogue::Swiglu,
        };
        if is_skinny(rows, shape.hidden) {
            return skinny::linear(gpu, layer, &views.normed, weight, Added::NOTHING, &views.gated);
        }
        if streamed::serves(gpu, T::DTYPE, layer) {
            return streamed::linear(gpu, layer, &views.normed, weight, &views.gated);
        }
        self.linear(rows, &views.normed, weight, &views.gate_up)?;
        swiglu(gpu, rows, shape.intermediate, &views.gate_up, &views.gated)
    }

    /// `out[rows, outputs] = x[rows, inputs] · weight[outputs, inputs]ᵀ`.
    fn linear(&self, rows: usize, x: &Buffer<T>, weight: &Buffer<T>, out: &Buffer<T>) -> Result<(), GpuError> {
        if rows == 0 {
            return Ok(());
        }
        let (outputs, inputs) = (out.len() / rows, x.len() / rows);
        let layer = Skinny::plain(rows, outputs, inputs);
        if is_skinny(rows, inputs) {
            return skinny::linear(&self.gpu, layer, x, weight, Added::NOTHING, out);
        }
        self.gpu.gemm(Gemm::linear(rows, outputs, inputs), x, weight, out)
    }
}

#[cfg(feature = "nccl")]
impl<T> TextModel<T> {
    /// Lets the others leave [`Self::follow`].
    pub fn end(&mut self) -> Result<(), CollectiveError> {
        match &mut self.peers {
            Peers::None => Ok(()),
            Peers::Group(group) => group.end(),
        }
    }
}

/// Whether a product is bound by reading its weight, so that our own kernel is the faster one.
fn is_skinny(rows: usize, inputs: usize) -> bool {
    (1..=MOST_ROWS).contains(&rows) && inputs.is_multiple_of(8)
}
