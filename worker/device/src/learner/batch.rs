//! Sequences behind one another, without padding between them.

use std::ops::Range;

/// Counts of tokens are rounded up to a multiple of this at least.
const ROUND_TOKENS: usize = 256;
/// The same of scored tokens.
const ROUND_SCORED: usize = 128;

/// Rounds a count up by at most an eighth, so that shapes of matrix products come again: each is planned once.
pub(super) fn round(count: usize, least: usize) -> usize {
    count.next_multiple_of((count.next_power_of_two() / 16).max(least))
}

/// Rows that are computed for so many tokens.
pub(super) fn rows(tokens: usize) -> usize {
    round(tokens, ROUND_TOKENS)
}

/// Rows of the output head that are computed for so many scored tokens.
pub(super) fn scored_rows(scored: usize) -> usize {
    round(scored, ROUND_SCORED)
}

/// A prompt with its completion.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// Tokens.
    pub ids: &'a [u32],
    /// Position of each token on the axes time, height and width.
    pub positions: &'a [[u32; 3]],
    /// Tokens that have a loss: the completion. The first token of a sequence is predicted by nothing and cannot have one.
    pub scored: &'a Range<usize>,
    /// Tokens in whose place features of a picture go.
    pub placeholders: &'a [u32],
}

/// What does not fit together in a batch.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct BatchError(pub String);

/// One micro-batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Tokens of all sequences, but for those that are only predicted.
    pub ids: Vec<u32>,
    /// Position of each token on the axes time, height and width.
    pub positions: Vec<[u32; 3]>,
    /// Where each sequence begins, and where the last ends.
    pub offsets: Vec<u32>,
    /// Rows whose output is scored, ascending: each predicts the token after it.
    pub scored: Vec<u32>,
    /// The token that each scored row is to predict.
    pub targets: Vec<u32>,
    /// Rows in which features are in the place of embeddings, in the order of the features.
    pub placeholders: Vec<u32>,
}

impl Batch {
    /// Puts sequences behind one another.
    pub fn pack<'a>(sequences: impl IntoIterator<Item = Sequence<'a>>) -> Result<Self, BatchError> {
        let mut batch = Self {
            offsets: vec![0],
            ..Self::default()
        };
        for sequence in sequences {
            let (tokens, scored) = (sequence.ids.len(), sequence.scored);
            if tokens != sequence.positions.len() {
                let positions = sequence.positions.len();
                return Err(BatchError(format!("{tokens} tokens with {positions} positions")));
            }
            if !scored.is_empty() && (scored.start == 0 || scored.end > tokens) {
                return Err(BatchError(format!("tokens {scored:?} of {tokens} cannot be scored")));
            }
            // A last token that is only predicted is no row: nothing reads its output.
            let rows = tokens - usize::from(!scored.is_empty() && scored.end == tokens);
            if let Some(row) = sequence.placeholders.iter().find(|row| **row as usize >= rows) {
                return Err(BatchError(format!("placeholder {row} of {rows} rows")));
            }
            let begin = small(batch.ids.len())?;
            batch.ids.extend(&sequence.ids[..rows]);
            batch.positions.extend(&sequence.positions[..rows]);
            batch.offsets.push(small(batch.ids.len())?);
            for at in scored.clone() {
                batch.scored.push(begin + small(at)? - 1);
                batch.targets.push(sequence.ids[at]);
            }
            batch
                .placeholders
                .extend(sequence.placeholders.iter().map(|row| begin + row));
        }
        Ok(batch)
    }

    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Rows that are computed: the tokens and a filling up to a round number, a sequence of its own that nothing depends on.
    pub fn rows(&self) -> usize {
        rows(self.tokens())
    }

    /// Rows of the output head that are computed.
    pub fn scored_rows(&self) -> usize {
        scored_rows(self.scored.len())
    }

    /// Pairs of tokens that attention looks at.
    pub fn pairs(&self) -> f64 {
        let lengths = self.offsets.windows(2).map(|pair| f64::from(pair[1] - pair[0]));
        lengths.map(|length| length * (length + 1.0) / 2.0).sum()
    }
}

/// A number of tokens, which kernels count in 31 bits.
fn small(count: usize) -> Result<u32, BatchError> {
    let counted = u32::try_from(count).ok().filter(|count| *count < 1 << 31);
    counted.ok_or_else(|| BatchError(format!("{count} tokens in one batch")))
}

/// Distributes sequences of these lengths over micro-batches of at most `capacity` tokens and `most` sequences: as few as sorting
/// by length and putting each where it fits first gives. Depends on the lengths alone. A sequence that is longer than the capacity is an
/// error.
pub fn micro_batches(lengths: &[usize], capacity: usize, most: usize) -> Result<Vec<Vec<usize>>, BatchError> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|index| (std::cmp::Reverse(lengths[*index]), *index));
    let mut bins: Vec<(usize, Vec<usize>)> = Vec::new();
    for index in order {
        let length = lengths[index];
        if length > capacity {
            return Err(BatchError(format!(
                "a sequence of {length} tokens is longer than a micro-batch of {capacity}"
            )));
        }
        let open = |(used, bin): &&mut (usize, Vec<usize>)| *used + length <= capacity && bin.len() < most;
        match bins.iter_mut().find(open) {
            Some((used, bin)) => {
                *used += length;
                bin.push(index);
            }
            None => bins.push((length, vec![index])),
        }
    }
    Ok(bins.into_iter().map(|(_, bin)| bin).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const POSITIONS: [[u32; 3]; 4] = [[0; 3], [1; 3], [2; 3], [3; 3]];

    #[test]
    fn each_scored_row_predicts_the_token_after_it() {
        let sequence = |ids, scored, placeholders| Sequence {
            ids,
            positions: &POSITIONS,
            scored,
            placeholders,
        };
        let batch = Batch::pack([
            sequence(&[10, 11, 12, 13], &(2..4), &[]),
            sequence(&[20, 21, 22, 23], &(3..4), &[1, 2]),
        ])
        .expect("batch");
        assert_eq!(batch.offsets, [0, 3, 6]);
        assert_eq!(batch.ids, [10, 11, 12, 20, 21, 22]);
        assert_eq!(batch.scored, [1, 2, 5]);
        assert_eq!(batch.targets, [12, 13, 23]);
        assert_eq!(batch.placeholders, [4, 5]);
        assert_eq!((batch.rows(), batch.scored_rows(), batch.pairs()), (256, 128, 12.0));
    }

    #[test]
    fn counts_are_rounded_up_by_an_eighth_at_most_above_the_smallest() {
        assert_eq!(
            [1, 256, 257, 8192, 8193, 9217, 16_384].map(rows),
            [256, 256, 512, 8192, 9216, 10_240, 16_384]
        );
        for tokens in 2048..20_000 {
            assert!(rows(tokens) >= tokens && rows(tokens) * 8 <= tokens * 9 + 8, "{tokens}");
            assert!(rows(tokens) >= rows(tokens - 1), "{tokens}");
        }
    }

    #[test]
    fn the_first_token_cannot_be_scored() {
        let sequence = Sequence {
            ids: &[1, 2, 3, 4],
            positions: &POSITIONS,
            scored: &(0..2),
            placeholders: &[],
        };
        assert!(Batch::pack([sequence]).is_err());
    }

    #[test]
    fn every_sequence_is_in_one_micro_batch_and_none_is_too_large() {
        let lengths = [5, 9, 1, 3, 10, 7, 2, 2];
        let bins = micro_batches(&lengths, 10, 3).expect("bins");
        assert_eq!(bins, [vec![4], vec![1, 2], vec![5, 3], vec![0, 6, 7]]);
        let pairs = micro_batches(&lengths, 10, 2).expect("bins");
        assert_eq!(pairs, [vec![4], vec![1, 2], vec![5, 3], vec![0, 6], vec![7]]);
        assert!(micro_batches(&[11], 10, 3).is_err());
    }
}
