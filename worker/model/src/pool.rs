//! Keys and values of sequences that grow, in blocks that are allocated once.

use candle_core::{DType, Device, Tensor};

use crate::{
    ModelError, Result,
    ops::{Kernels, PagedSpan},
    rope::Position,
    text::TextConfig,
};

/// Keys and values of every layer in blocks of a fixed number of tokens. Which block belongs to which sequence is told with
/// each call of [`crate::Vlm::extend`]; a block may belong to several, as long as none of them writes into it.
#[derive(Debug)]
pub struct KvPool {
    /// Per layer keys and values, each `[blocks, block_size, kv_heads * head_dim]`.
    pub(crate) layers: Vec<(Tensor, Tensor)>,
    blocks: usize,
    block_size: usize,
}

impl KvPool {
    /// Zeroed blocks; on the CPU the system gives their memory when it is first written.
    pub(crate) fn new(
        config: &TextConfig,
        blocks: usize,
        block_size: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let slots = blocks.checked_mul(block_size).filter(|slots| *slots > 0);
        if slots.and_then(|slots| u32::try_from(slots).ok()).is_none() {
            let problem = format!(
                "{blocks} blocks of {block_size} tokens: they must have 1 to {} slots",
                u32::MAX
            );
            return Err(ModelError::Input(problem));
        }
        let shape = (blocks, block_size, config.kv_size());
        let layer = |_| {
            Ok((
                Tensor::zeros(shape, dtype, device)?,
                Tensor::zeros(shape, dtype, device)?,
            ))
        };
        Ok(Self {
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            blocks,
            block_size,
        })
    }

    /// Blocks.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Tokens of a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Bytes of keys and values.
    pub fn bytes(&self) -> usize {
        let size = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        self.layers.iter().map(|(k, v)| size(k) + size(v)).sum()
    }

    /// See [`crate::Vlm::copy`].
    pub(crate) fn copy(&mut self, pairs: &[(u32, u32)], kernels: Kernels) -> Result<()> {
        if let Some(pair) = pairs.iter().find(|(from, to)| *from.max(to) as usize >= self.blocks) {
            let problem = format!("no copy {pair:?} in a pool of {} blocks", self.blocks);
            return Err(ModelError::Input(problem));
        }
        if pairs.is_empty() {
            return Ok(());
        }
        for (keys, values) in &self.layers {
            kernels.copy_blocks(keys, pairs)?;
            kernels.copy_blocks(values, pairs)?;
        }
        Ok(())
    }
}

/// The next tokens of one sequence: a part of its prompt, or one token that was drawn.
#[derive(Clone, Debug)]
pub struct Span<'a> {
    /// Token ids.
    pub ids: &'a [u32],
    /// Position of each token.
    pub positions: &'a [Position],
    /// Image features `[tokens, hidden]` and the index (in `ids`) of the first placeholder token they replace.
    pub features: Vec<(usize, Tensor)>,
    /// Tokens of the sequence before these, whose keys and values are in its blocks.
    pub stored: usize,
    /// Blocks of the sequence in its order, with room for these tokens.
    pub blocks: &'a [u32],
    /// Whether the hidden state of the last token is wanted.
    pub wanted: bool,
}

impl Span<'_> {
    /// Refuses a span that the pool has no place for.
    fn check(&self, index: usize, pool: &KvPool) -> Result<()> {
        let length = self.ids.len();
        if length == 0 || self.positions.len() != length {
            let positions = self.positions.len();
            return Err(ModelError::Input(format!(
                "span {index} has {length} ids and {positions} positions"
            )));
        }
        if self.stored + length > self.blocks.len() * pool.block_size {
            let (stored, blocks) = (self.stored, self.blocks.len());
            return Err(ModelError::Input(format!(
                "span {index}: {blocks} blocks of {} tokens have no room for {length} tokens after {stored}",
                pool.block_size
            )));
        }
        match self.blocks.iter().find(|block| **block as usize >= pool.blocks) {
            Some(block) => Err(ModelError::Input(format!(
                "span {index}: no block {block} in a pool of {}",
                pool.blocks
            ))),
            None => Ok(()),
        }
    }
}

/// Spans of different sequences as packed rows.
#[derive(Debug)]
pub(crate) struct PackedSpans<'a> {
    pub(crate) ids: Vec<u32>,
    pub(crate) positions: Vec<Position>,
    pub(crate) features: Vec<Tensor>,
    pub(crate) feature_slots: Vec<u32>,
    pub(crate) spans: Vec<PagedSpan<'a>>,
    /// Where each row's keys and values go.
    pub(crate) slots: Vec<u32>,
    /// Rows whose hidden state is wanted.
    pub(crate) wanted: Vec<u32>,
}

impl<'a> PackedSpans<'a> {
    pub(crate) fn new(spans: &[Span<'a>], pool: &KvPool) -> Result<Self> {
        let rows = spans.iter().map(|span| span.ids.len()).sum();
        let mut packed = Self {
            ids: Vec::with_capacity(rows),
            positions: Vec::with_capacity(rows),
            features: Vec::new(),
            feature_slots: Vec::new(),
            spans: Vec::with_capacity(spans.len()),
            slots: Vec::with_capacity(rows),
            wanted: Vec::new(),
        };
        for (index, span) in spans.iter().enumerate() {
            span.check(index, pool)?;
            let start = packed.ids.len();
            for (offset, features) in &span.features {
                let tokens = features.dim(0)?;
                if offset + tokens > span.ids.len() {
                    let length = span.ids.len();
                    let problem = format!("span {index}: {tokens} image tokens at {offset} leave its {length} tokens");
                    return Err(ModelError::Input(problem));
                }
                let first = (start + offset) as u32;
                packed.feature_slots.extend(first..first + tokens as u32);
                packed.features.push(features.clone());
            }
            packed.ids.extend_from_slice(span.ids);
            packed.positions.extend_from_slice(span.positions);
            let paged = PagedSpan {
                length: span.ids.len(),
                stored: span.stored,
                blocks: span.blocks,
            };
            packed.slots.extend(paged.slots(pool.block_size));
            packed.spans.push(paged);
            if span.wanted {
                packed.wanted.push((packed.ids.len() - 1) as u32);
            }
        }
        Ok(packed)
    }
}
