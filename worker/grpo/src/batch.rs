//! Samples of a mini-batch: de-duplication, the weight of each token, splits that leave the loss unchanged.

use std::collections::HashMap;

/// Over what the loss is averaged.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Aggregation {
    /// Over all valid tokens of the mini-batch.
    TokenMean,
    /// Over the tokens of each sequence, then over the sequences.
    SequenceMean,
}

/// A sampled completion and what is known about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Index of its prompt.
    pub prompt: usize,
    /// Tokens up to and including the end token.
    pub tokens: Vec<u32>,
    /// Log-probability of each token under the weights that sampled it.
    pub old: Vec<f32>,
    /// Advantage, the same for every token.
    pub advantage: f32,
    /// How many equal completions of the prompt it stands for.
    pub count: u32,
}

/// Joins equal completions of a prompt, in order of first appearance. They have one reward, so one advantage and one
/// gradient: trained once with their count as weight the loss is the same.
pub fn deduplicate(samples: Vec<Sample>) -> Vec<Sample> {
    let mut place: HashMap<(usize, Vec<u32>), usize> = HashMap::new();
    let mut distinct: Vec<Sample> = Vec::new();
    for sample in samples {
        match place.get(&(sample.prompt, sample.tokens.clone())) {
            Some(&index) => distinct[index].count += sample.count,
            None => {
                place.insert((sample.prompt, sample.tokens.clone()), distinct.len());
                distinct.push(sample);
            }
        }
    }
    distinct
}

/// Weight of every token of each sample: the loss of the mini-batch is the weighted sum over all tokens, however the
/// samples are split. Length and count of each sample are given; the weights of all tokens with their counts sum to 1.
pub fn token_weights(samples: &[(usize, u32)], aggregation: Aggregation) -> Vec<f32> {
    let count: f64 = match aggregation {
        Aggregation::TokenMean => samples
            .iter()
            .map(|(length, count)| *length as f64 * f64::from(*count))
            .sum(),
        Aggregation::SequenceMean => samples
            .iter()
            .filter(|(length, _)| *length > 0)
            .map(|(_, count)| f64::from(*count))
            .sum(),
    };
    samples
        .iter()
        .map(|(length, own)| {
            let share = match aggregation {
                Aggregation::TokenMean => f64::from(*own) / count,
                Aggregation::SequenceMean => f64::from(*own) / count / *length as f64,
            };
            share as f32
        })
        .collect()
}

/// Cuts `items` into `parts` runs whose sizes differ by at most one; fewer where there are fewer items.
pub fn split_evenly<T: Clone>(items: &[T], parts: usize) -> Vec<Vec<T>> {
    let parts = parts.clamp(1, items.len().max(1));
    (0..parts)
        .map(|part| items[part * items.len() / parts..(part + 1) * items.len() / parts].to_vec())
        .filter(|part| !part.is_empty())
        .collect()
}

/// Sorts rows by length and cuts them into shards of at most `rows` rows, longest first: rows of a shard need little
/// padding. The cut depends on the lengths alone, so a sum over shards in order is the same on any number of threads.
pub fn shards_by_length(lengths: &[usize], rows: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|index| (std::cmp::Reverse(lengths[*index]), *index));
    split_evenly(&order, lengths.len().div_ceil(rows.max(1)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(prompt: usize, tokens: &[u32]) -> Sample {
        Sample {
            prompt,
            tokens: tokens.to_vec(),
            old: vec![-1.0; tokens.len()],
            advantage: 0.5,
            count: 1,
        }
    }

    #[test]
    fn equal_completions_of_one_prompt_are_joined_and_of_two_prompts_are_not() {
        let samples = vec![
            sample(0, &[1, 2]),
            sample(1, &[1, 2]),
            sample(0, &[1, 2]),
            sample(0, &[1]),
        ];
        let counts: Vec<_> = deduplicate(samples)
            .iter()
            .map(|s| (s.prompt, s.tokens.len(), s.count))
            .collect();
        assert_eq!(counts, vec![(0, 2, 2), (1, 2, 1), (0, 1, 1)]);
    }

    proptest! {
        #[test]
        fn weights_of_all_tokens_sum_to_one(
            samples in prop::collection::vec((1_usize..20, 1_u32..9), 1..30),
            token_mean: bool,
        ) {
            let aggregation = if token_mean { Aggregation::TokenMean } else { Aggregation::SequenceMean };
            let weights = token_weights(&samples, aggregation);
            let sum: f64 = weights.iter().zip(&samples).map(|(w, (length, _))| f64::from(*w) * *length as f64).sum();
            prop_assert!((sum - 1.0).abs() < 1e-5, "{}", sum);
        }

        #[test]
        fn every_row_is_in_exactly_one_shard(lengths in prop::collection::vec(1_usize..40, 0..70), rows in 1_usize..20) {
            let shards = shards_by_length(&lengths, rows);
            prop_assert!(shards.iter().all(|shard| (1..=rows).contains(&shard.len())));
            let mut all: Vec<usize> = shards.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
        }
    }
}
