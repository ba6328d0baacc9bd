//! Tokens of the engine's chunks, as pieces of a step.

use std::ops::Range;

use flotilla_engine::{
    Prompt,
    runner::{Cause, Chunk},
};
use flotilla_model::rope::Position;

use crate::step::Piece;

/// Tokens of chunks, one after another.
#[derive(Debug, Default)]
pub(crate) struct Tokens {
    ids: Vec<u32>,
    positions: Vec<Position>,
    /// Those of each chunk.
    ranges: Vec<Range<usize>>,
}

impl Tokens {
    /// Reads them from the prompts.
    pub(crate) fn new(chunks: &[Chunk<'_, Prompt>]) -> Result<Self, Cause> {
        let mut all = Self::default();
        for chunk in chunks {
            let begin = all.positions.len();
            let (ids, positions) = (&mut all.ids, &mut all.positions);
            chunk.prompt.push_tokens(chunk.drawn, &chunk.range(), ids, positions)?;
            // In the place of a token that the card puts there.
            all.ids.resize(all.positions.len(), 0);
            all.ranges.push(begin..all.positions.len());
        }
        Ok(all)
    }

    /// `places` are those of the pieces of the step before.
    pub(crate) fn pieces<'a>(&'a self, chunks: &'a [Chunk<'a, Prompt>], places: &[usize]) -> Vec<Piece<'a>> {
        let pieces = chunks.iter().zip(&self.ranges).map(|(chunk, range)| Piece {
            ids: &self.ids[range.clone()],
            positions: &self.positions[range.clone()],
            stored: chunk.stored,
            blocks: chunk.blocks,
            wanted: chunk.wanted,
            draw: chunk.draw,
            from: chunk.after.and_then(|index| places.get(index).copied()),
        });
        pieces.collect()
    }
}
