//! The runner of the vision-language models.

use std::{
    borrow::Borrow,
    collections::{BTreeMap, btree_map::Entry},
    ops::Range,
};

use candle_core::{DType, Tensor};
use flotilla_model::{KvPool, Pass, Span, Visual, Vlm, rope::Position};

use crate::{
    blocks::Block,
    features::FeatureCache,
    limits::Limits,
    prompt::{Digest, Prompt},
    runner::{Answers, Cause, Chunk, Logits, NotBegun, Runner, VisualCounts},
};

/// A model, its own (a server) or lent (a trainer between two updates), with the features of the pictures and videos that it
/// has seen.
#[derive(Debug)]
pub struct VlmRunner<M = Vlm> {
    model: M,
    features: FeatureCache<Tensor>,
    counts: VisualCounts,
}

impl<M: Borrow<Vlm>> VlmRunner<M> {
    /// Keeps features within the bytes that the limits allow.
    pub fn new(model: M, limits: &Limits) -> Self {
        Self {
            model,
            features: FeatureCache::new(limits.feature_bytes),
            counts: VisualCounts::default(),
        }
    }

    /// The model.
    pub fn model(&self) -> &Vlm {
        self.model.borrow()
    }

    /// The model, to change what it is made of: the engine's [`load_weights`](crate::Engine::load_weights) calls for it.
    pub fn model_mut(&mut self) -> &mut M {
        &mut self.model
    }

    /// Features of the visuals that the chunks reach, by digest. What is missing is encoded together.
    fn features(&mut self, chunks: &[Chunk<'_, Prompt>]) -> Result<BTreeMap<Digest, Tensor>, Cause> {
        let mut found = BTreeMap::new();
        let mut missing: BTreeMap<Digest, &Visual> = BTreeMap::new();
        for chunk in chunks {
            let reached = chunk.prompt.identity()?.visuals.iter().zip(&chunk.prompt.visuals);
            for ((tokens, digest), (_, visual)) in reached {
                if overlap(tokens, &chunk.range()).is_none() {
                    continue;
                }
                // A chunk in the middle of a picture asks again for what its first chunk has asked for.
                let asks = chunk.range().contains(&tokens.start);
                self.counts.queries += usize::from(asks);
                if let Some(features) = self.features.get(digest) {
                    found.insert(*digest, features);
                    self.counts.hits += usize::from(asks);
                    continue;
                }
                match missing.entry(*digest) {
                    Entry::Vacant(place) => drop(place.insert(visual)),
                    Entry::Occupied(_) => self.counts.hits += usize::from(asks),
                }
            }
        }
        let visuals = missing.values().copied().collect::<Vec<_>>();
        let encoded = self.model.borrow().encode(&visuals, Pass::Infer)?;
        for (digest, features) in missing.into_keys().zip(encoded) {
            // A copy: the features of one visual may be a view of those of all.
            let features = features.copy()?;
            let bytes = features.elem_count() * features.dtype().size_in_bytes();
            self.features.insert(digest, features.clone(), bytes);
            found.insert(digest, features);
        }
        Ok(found)
    }
}

/// What a span borrows from.
struct Piece {
    ids: Vec<u32>,
    positions: Vec<Position>,
    features: Vec<(usize, Tensor)>,
}

impl Piece {
    fn new(chunk: &Chunk<'_, Prompt>, encoded: &BTreeMap<Digest, Tensor>) -> Result<Self, Cause> {
        let (ids, positions) = chunk.prompt.tokens(chunk.drawn, &chunk.range())?;
        let mut features = Vec::new();
        for (start, given) in &chunk.prompt.row.features {
            features.extend(cut(*start, given, &chunk.range())?);
        }
        for (tokens, digest) in &chunk.prompt.identity()?.visuals {
            if let Some(made) = encoded.get(digest)
                && overlap(tokens, &chunk.range()).is_some()
            {
                features.extend(cut(tokens.start, made, &chunk.range())?);
            }
        }
        Ok(Self {
            ids,
            positions,
            features,
        })
    }
}

/// What two ranges have in common.
fn overlap(a: &Range<usize>, b: &Range<usize>) -> Option<Range<usize>> {
    let range = a.start.max(b.start)..a.end.min(b.end);
    (!range.is_empty()).then_some(range)
}

/// The part of the features that begin at token `start` that falls into a chunk, with its first index there.
fn cut(start: usize, features: &Tensor, chunk: &Range<usize>) -> Result<Option<(usize, Tensor)>, Cause> {
    let Some(range) = overlap(&(start..start + features.dim(0)?), chunk) else {
        return Ok(None);
    };
    let part = features.narrow(0, range.start - start, range.len())?;
    Ok(Some((range.start - chunk.start, part)))
}

impl<M: Borrow<Vlm>> Runner for VlmRunner<M> {
    type Prompt = Prompt;
    type Pool = KvPool;

    fn prompt_ids<'a>(&self, prompt: &'a Prompt) -> &'a [u32] {
        &prompt.row.ids
    }

    fn content(&self, prompt: &Prompt, drawn: &[u32], range: Range<usize>, out: &mut Vec<u8>) -> Result<(), Cause> {
        prompt.content(drawn, range, out)
    }

    fn pool(&self, blocks: usize, block_size: usize) -> Result<KvPool, Cause> {
        Ok(self.model().pool(blocks, block_size)?)
    }

    fn copy(&mut self, pool: &mut KvPool, pairs: &[(Block, Block)]) -> Result<(), Cause> {
        Ok(self.model().copy(pool, pairs)?)
    }

    fn step(&mut self, pool: &mut KvPool, chunks: &[Chunk<'_, Prompt>]) -> Result<Answers, Cause> {
        let encoded = self.features(chunks)?;
        let pieces = chunks.iter().map(|chunk| Piece::new(chunk, &encoded));
        let pieces = pieces.collect::<Result<Vec<_>, _>>()?;
        let spans = chunks.iter().zip(pieces.iter()).map(|(chunk, piece)| Span {
            ids: &piece.ids,
            positions: &piece.positions,
            features: piece.features.clone(),
            stored: chunk.stored,
            blocks: chunk.blocks,
            wanted: chunk.wanted,
        });
        let hidden = self.model().extend(pool, &spans.collect::<Vec<_>>())?;
        Ok(logits(self.model(), &hidden)?.into())
    }

    fn begin(&mut self, _: &mut KvPool, _: &[Chunk<'_, Prompt>]) -> Result<bool, Cause> {
        Ok(false)
    }

    fn finish(&mut self) -> Result<Answers, Cause> {
        Err(NotBegun.into())
    }

    fn abandon(&mut self) {}

    fn flush(&mut self) {
        self.features.clear();
    }

    fn lost(&mut self) -> Option<String> {
        let device = self.model().device().synchronize();
        device.err().map(|error| error.to_string())
    }

    fn visual_counts(&self) -> VisualCounts {
        self.counts
    }
}

fn logits(model: &Vlm, hidden: &Tensor) -> Result<Logits, Cause> {
    if hidden.dim(0)? == 0 {
        return Ok(Logits::default());
    }
    let logits = model.logits(hidden, Pass::Infer)?.to_dtype(DType::F32)?;
    let vocabulary = logits.dim(1)?;
    let values = logits.flatten_all()?.to_vec1()?;
    Ok(Logits { values, vocabulary })
}
