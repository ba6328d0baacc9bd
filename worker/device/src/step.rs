//! What one step computes, laid out for the card: one block of words, copied at once.

use std::ops::Range;

use flotilla_engine::runner::Draw;
use flotilla_model::rope::Position;

use crate::shared::{self, Group};

/// The next tokens of one sequence.
#[derive(Clone, Debug)]
pub struct Piece<'a> {
    /// Ids of the tokens.
    pub ids: &'a [u32],
    /// Position of each.
    pub positions: &'a [Position],
    /// Tokens of the sequence before these, whose keys and values are stored.
    pub stored: usize,
    /// Blocks of the sequence, with room for these tokens.
    pub blocks: &'a [u32],
    /// Whether logits after the last token are wanted.
    pub wanted: bool,
    /// How the card draws the next token; None leaves the logits to the host.
    pub draw: Option<Draw>,
    /// The row of the step before that draws the one token of this piece, where it is not known yet.
    pub from: Option<usize>,
}

/// Sizes of a step as the card sees it. Steps of one size replay one graph, so sizes are rounded up to few.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Size {
    /// Sequences that are given one token each.
    pub decodes: usize,
    /// Other tokens: chunks of prompts.
    pub prefill: usize,
    /// Sequences of those chunks.
    pub chunks: usize,
    /// Entries of a row of the block table.
    pub blocks: usize,
    /// Groups of decoded sequences that share a prefix.
    pub groups: usize,
}

impl Size {
    /// Rows of activations.
    pub fn tokens(self) -> usize {
        self.decodes + self.prefill
    }

    /// Rows of the block table.
    pub fn sequences(self) -> usize {
        self.decodes + self.chunks
    }

    /// Rounded up: unused rows are computed and thrown away.
    pub fn bucket(self) -> Self {
        let round = |count: usize, to: usize| count.next_multiple_of(to);
        Self {
            decodes: match self.decodes {
                0..=2 => self.decodes,
                3..=4 => 4,
                5..=8 => 8,
                9..=64 => round(self.decodes, 16),
                _ => round(self.decodes, 32),
            },
            prefill: match self.prefill {
                0 => 0,
                1..=512 => round(self.prefill, 64),
                _ => round(self.prefill, 256),
            },
            chunks: self.chunks.next_power_of_two() * usize::from(self.chunks > 0),
            blocks: self.blocks.next_power_of_two().max(64),
            groups: if self.groups == 0 {
                0
            } else {
                self.groups.next_power_of_two().max(8)
            },
        }
    }
}

/// Where each part of a step lies in its block of words.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Mail {
    /// `[tokens]`, ids.
    pub ids: Range<usize>,
    /// `[3, tokens]`, i32.
    pub positions: Range<usize>,
    /// `[tokens]`, i32: where keys and values go; -1 for unused rows.
    pub slots: Range<usize>,
    /// `[sequences, blocks]`.
    pub tables: Range<usize>,
    /// `[sequences]`, i32: tokens stored after the step; 0 for unused rows.
    pub lengths: Range<usize>,
    /// `[chunks + 1]`: where each chunk begins among the prefill tokens.
    pub offsets: Range<usize>,
    /// `[groups, 3]`, i32: first row, rows, shared tokens.
    pub groups: Range<usize>,
    /// `[sequences]`, i32: the row of activations after which a token is wanted; that of an unused one is -1.
    pub last: Range<usize>,
    /// `[sequences]`, f32.
    pub temperature: Range<usize>,
    /// `[sequences]`, i32.
    pub top_k: Range<usize>,
    /// `[sequences]`, f32.
    pub top_p: Range<usize>,
    /// `[sequences]`, f32.
    pub min_p: Range<usize>,
    /// `[sequences]`, f32 in [0, 1).
    pub uniform: Range<usize>,
    /// `[decodes]`, i32: the row of the step before whose token is this row's id; -1 where the id is given.
    pub from: Range<usize>,
    /// Words in all.
    pub words: usize,
}

impl Mail {
    /// Of a step of this size. Every part begins at a multiple of 16 bytes.
    pub fn new(size: Size) -> Self {
        let mut next = 0usize;
        let mut part = |length: usize| {
            let start = next;
            next = (start + length).next_multiple_of(4);
            start..start + length
        };
        let (tokens, sequences, decodes) = (size.tokens(), size.sequences(), size.decodes);
        let mut mail = Self {
            ids: part(tokens),
            positions: part(3 * tokens),
            slots: part(tokens),
            tables: part(sequences * size.blocks),
            lengths: part(sequences),
            offsets: part(size.chunks + 1),
            groups: part(3 * size.groups),
            last: part(sequences),
            temperature: part(sequences),
            top_k: part(sequences),
            top_p: part(sequences),
            min_p: part(sequences),
            uniform: part(sequences),
            from: part(decodes),
            words: 0,
        };
        mail.words = next;
        mail
    }
}

/// Pieces in the order of the card: sequences with one token first, then the chunks of prompts.
#[derive(Clone, Debug)]
pub struct Step {
    /// Rounded up.
    pub size: Size,
    /// Index of the piece of each decoded sequence.
    pub decodes: Vec<usize>,
    /// Index of the piece of each chunk.
    pub chunks: Vec<usize>,
    /// First row of activations of each piece.
    pub rows: Vec<usize>,
    /// Decoded sequences that share a prefix.
    pub groups: Vec<Group>,
}

/// Blocks that sequences must share for their common prefix to be read apart: fewer cost more than they save.
const LEAST_SHARED: usize = 8;

impl Step {
    /// Orders the pieces, those with a common prefix together. Common prefixes are read once where that [pays](shared::pays) with a cache of so many blocks; None
    /// never looks for them.
    pub fn new(pieces: &[Piece<'_>], cached: Option<usize>) -> Self {
        let (mut decodes, chunks): (Vec<_>, Vec<_>) =
            (0..pieces.len()).partition(|index| pieces[*index].ids.len() == 1 && pieces[*index].stored > 0);
        if cached.is_some() {
            // Samples of one prompt need not begin together, but must stand together. Sequences that have one block in common
            // have all before it in common, so that a few of them tell.
            let some = |index: &usize| pieces[*index].blocks.iter().step_by(LEAST_SHARED);
            decodes.sort_by(|a, b| some(a).cmp(some(b)));
        }
        let tables = decodes.iter().map(|index| pieces[*index].blocks);
        let groups = match cached {
            Some(cached) => {
                let groups = shared::groups(&tables.collect::<Vec<_>>(), LEAST_SHARED);
                if shared::pays(&groups, cached) {
                    groups
                } else {
                    Vec::new()
                }
            }
            None => Vec::new(),
        };
        Self::ordered(pieces, decodes, chunks, groups)
    }

    /// The step after this one if its pieces are those of this one, each with one more token: in the order of this one, whose
    /// groups still share what they share.
    pub fn again(&self, pieces: &[Piece<'_>]) -> Self {
        Self::ordered(pieces, self.decodes.clone(), Vec::new(), self.groups.clone())
    }

    fn ordered(pieces: &[Piece<'_>], decodes: Vec<usize>, chunks: Vec<usize>, groups: Vec<Group>) -> Self {
        let size = Size {
            decodes: decodes.len(),
            prefill: chunks.iter().map(|index| pieces[*index].ids.len()).sum(),
            chunks: chunks.len(),
            blocks: pieces.iter().map(|piece| piece.blocks.len()).max().unwrap_or(0),
            groups: groups.len(),
        };
        let size = size.bucket();
        let mut rows = vec![0; pieces.len()];
        for (row, index) in decodes.iter().enumerate() {
            rows[*index] = row;
        }
        let mut next = size.decodes;
        for index in &chunks {
            rows[*index] = next;
            next += pieces[*index].ids.len();
        }
        Self {
            size,
            decodes,
            chunks,
            rows,
            groups,
        }
    }

    /// The row of the block table, of logits and of draws that each piece has.
    pub fn places(&self) -> Vec<usize> {
        let mut places = vec![0; self.rows.len()];
        for (place, index) in self.sequences() {
            places[index] = place;
        }
        places
    }

    /// Rows of the block table that are used, with the index of the piece of each.
    fn sequences(&self) -> impl Iterator<Item = (usize, usize)> {
        let decodes = self.decodes.iter().copied().enumerate();
        let chunks = self.chunks.iter().copied().enumerate();
        decodes.chain(chunks.map(|(at, index)| (self.size.decodes + at, index)))
    }

    /// The words that the card reads, `mail.words` of them.
    pub fn words(&self, pieces: &[Piece<'_>], block_size: usize, mail: &Mail) -> Vec<u32> {
        let mut words = vec![0u32; mail.words];
        self.write(pieces, block_size, mail, &mut words);
        words
    }

    /// As [`Self::words`], into memory that is there, whatever it holds.
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss,
        reason = "tokens, blocks and slots of a card are far below 2^31"
    )]
    pub fn write(&self, pieces: &[Piece<'_>], block_size: usize, mail: &Mail, words: &mut [u32]) {
        let unused = u32::MAX;
        words.fill(0);
        for part in [&mail.slots, &mail.last, &mail.from] {
            words[part.clone()].fill(unused);
        }
        let tokens = self.size.tokens();
        for (piece, row) in pieces.iter().zip(&self.rows) {
            for (index, (id, position)) in piece.ids.iter().zip(piece.positions).enumerate() {
                let (at, token) = (row + index, piece.stored + index);
                words[mail.ids.start + at] = *id;
                words[mail.slots.start + at] =
                    piece.blocks[token / block_size] * block_size as u32 + (token % block_size) as u32;
                for (axis, position) in position.iter().enumerate() {
                    words[mail.positions.start + axis * tokens + at] = *position;
                }
            }
        }
        for (sequence, index) in self.sequences() {
            let piece = &pieces[index];
            let table = mail.tables.start + sequence * self.size.blocks;
            words[table..table + piece.blocks.len()].copy_from_slice(piece.blocks);
            words[mail.lengths.start + sequence] = (piece.stored + piece.ids.len()) as u32;
            if piece.wanted {
                words[mail.last.start + sequence] = (self.rows[index] + piece.ids.len() - 1) as u32;
            }
            // Rows that the host draws are drawn as well, greedily, and not looked at.
            let draw = piece.draw.unwrap_or(GREEDY);
            words[mail.temperature.start + sequence] = draw.temperature.to_bits();
            words[mail.top_k.start + sequence] = draw.top_k.min(i32::MAX as usize) as u32;
            words[mail.top_p.start + sequence] = draw.top_p.to_bits();
            words[mail.min_p.start + sequence] = draw.min_p.to_bits();
            // The largest f32 below 1: rounding may not reach it.
            words[mail.uniform.start + sequence] = (draw.uniform as f32).min(1.0 - f32::EPSILON / 2.0).to_bits();
        }
        let mut end = 0;
        for (at, index) in self.chunks.iter().enumerate() {
            end += pieces[*index].ids.len();
            words[mail.offsets.start + at + 1] = end as u32;
        }
        // Chunks that are not there have no tokens.
        words[mail.offsets.start + 1 + self.chunks.len()..mail.offsets.end].fill(end as u32);
        for (at, group) in self.groups.iter().enumerate() {
            let group = [group.first, group.rows, group.blocks * block_size].map(|word| word as u32);
            words[mail.groups.start + 3 * at..][..3].copy_from_slice(&group);
        }
        for (row, index) in self.decodes.iter().enumerate() {
            if let Some(from) = pieces[*index].from {
                words[mail.from.start + row] = from as u32;
            }
        }
    }
}

const GREEDY: Draw = Draw {
    temperature: 0.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    uniform: 0.0,
};

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn piece<'a>(ids: &'a [u32], positions: &'a [Position], stored: usize, blocks: &'a [u32]) -> Piece<'a> {
        Piece {
            ids,
            positions,
            stored,
            blocks,
            wanted: true,
            draw: None,
            from: None,
        }
    }

    #[test]
    fn decoded_sequences_come_first_and_every_token_has_its_slot() {
        let pieces = [
            piece(&[7, 8, 9], &[[0; 3], [1; 3], [2, 5, 6]], 0, &[3]),
            piece(&[5], &[[9; 3]], 4, &[2, 6]),
        ];
        let step = Step::new(&pieces, Some(0));
        assert_eq!((&step.decodes[..], &step.chunks[..]), (&[1][..], &[0][..]));
        let mail = Mail::new(step.size);
        let words = step.words(&pieces, 4, &mail);
        let ids = &words[mail.ids.clone()];
        assert_eq!((ids[0], &ids[1..4]), (5, &[7, 8, 9][..]));
        let slots = &words[mail.slots.clone()];
        assert_eq!((slots[0], &slots[1..4]), (6 * 4, &[12, 13, 14][..]));
        assert!(slots[4..].iter().all(|slot| *slot == u32::MAX));
        let tokens = step.size.tokens();
        assert_eq!(
            words[mail.positions.start + tokens + 3],
            5,
            "height of the third token of the prompt"
        );
        assert_eq!(words[mail.lengths.clone()][..2], [5, 3]);
        assert_eq!(words[mail.offsets.clone()], [0, 3]);
        assert_eq!(words[mail.last.clone()], [0, 3]);
    }

    #[test]
    fn samples_of_one_prompt_share_its_blocks() {
        let shared: Vec<u32> = (0..10).collect();
        let tables = [100, 101].map(|own| shared.iter().copied().chain([own]).collect::<Vec<_>>());
        let pieces = tables.each_ref().map(|table| piece(&[1], &[[0; 3]], 163, table));
        let step = Step::new(&pieces, Some(0));
        assert_eq!(step.groups.len(), 1);
        let mail = Mail::new(step.size);
        let words = step.words(&pieces, 16, &mail);
        assert_eq!(words[mail.groups.clone()][..6], [0, 2, 160, 0, 0, 0]);
    }

    #[test]
    fn samples_that_begin_apart_stand_together() {
        let prompt = |first: u32| (first..first + 9).collect::<Vec<u32>>();
        let tables = [50, 10, 50, 10, 50].map(prompt);
        let own = tables
            .iter()
            .zip(100..)
            .map(|(table, own)| [&table[..], &[own]].concat())
            .collect::<Vec<_>>();
        let pieces = own
            .iter()
            .map(|table| piece(&[1], &[[0; 3]], 150, table))
            .collect::<Vec<_>>();
        let step = Step::new(&pieces, Some(0));
        assert_eq!(step.decodes, [1, 3, 0, 2, 4]);
        assert_eq!(step.rows, [2, 0, 3, 1, 4]);
        let groups = step.groups.iter().map(|group| (group.first, group.rows, group.blocks));
        assert_eq!(groups.collect::<Vec<_>>(), [(0, 2, 9), (2, 3, 9)]);
        assert_eq!(Step::new(&pieces, None).decodes, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_step_after_another_keeps_its_order_and_takes_the_tokens_of_its_rows() {
        let tables = [3u32, 1, 3, 1, 2].map(|prompt| (0..9).map(|at| prompt * 50 + at).collect::<Vec<_>>());
        let own = tables.iter().zip(100..);
        let own = own
            .map(|(table, own)| [&table[..], &[own]].concat())
            .collect::<Vec<_>>();
        let pieces = |stored: usize, from: &[Option<usize>]| {
            let pieces = own.iter().zip(from);
            let pieces = pieces.map(|(table, from)| Piece {
                from: *from,
                ..piece(&[1], &[[0; 3]], stored, table)
            });
            pieces.collect::<Vec<_>>()
        };
        let first = Step::new(&pieces(150, &[None; 5]), Some(0));
        let from = first.places().into_iter().map(Some).collect::<Vec<_>>();
        let second = pieces(151, &from);
        let (again, anew) = (first.again(&second), Step::new(&second, Some(0)));
        let parts = |step: &Step| (step.size, step.decodes.clone(), step.rows.clone(), step.groups.clone());
        assert_eq!(parts(&again), parts(&anew));
        let mail = Mail::new(again.size);
        let words = again.words(&second, 16, &mail);
        assert_eq!(words[mail.from.clone()][..6], [0, 1, 2, 3, 4, u32::MAX]);
        assert_eq!(words, anew.words(&second, 16, &mail));
    }

    #[test]
    fn words_do_not_depend_on_what_was_there() {
        let pieces = [
            piece(&[5], &[[9; 3]], 4, &[2, 6]),
            piece(&[7, 8], &[[0; 3], [1; 3]], 0, &[3]),
        ];
        let step = Step::new(&pieces, Some(0));
        let mail = Mail::new(step.size);
        let mut words = vec![7; mail.words];
        step.write(&pieces, 4, &mail, &mut words);
        assert_eq!(words, step.words(&pieces, 4, &mail));
    }

    proptest! {
        #[test]
        fn parts_lie_apart_and_aligned(
            decodes in 0usize..300, prefill in 0usize..3000, chunks in 0usize..9, blocks in 0usize..300, groups in 0usize..20,
        ) {
            let size = Size { decodes, prefill, chunks, blocks, groups }.bucket();
            prop_assert!(size.decodes >= decodes && size.prefill >= prefill && size.chunks >= chunks);
            prop_assert!(size.blocks >= blocks && size.groups >= groups);
            prop_assert_eq!(size.bucket(), size, "a bucket is its own");
            let mail = Mail::new(size);
            let parts = [
                mail.ids, mail.positions, mail.slots, mail.tables, mail.lengths, mail.offsets, mail.groups, mail.last,
                mail.temperature, mail.top_k, mail.top_p, mail.min_p, mail.uniform, mail.from,
            ];
            let mut end = 0;
            for part in parts {
                prop_assert!(part.start >= end && part.start.is_multiple_of(4));
                end = part.end;
            }
            prop_assert!(end <= mail.words);
        }
    }
}
