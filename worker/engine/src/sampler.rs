//! From logits to a token and its log-probability.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::request::{Sampling, Token};

/// Draws the tokens of one sample. Its state depends on the request's seed, the sample's index and the number of tokens
/// drawn, and on nothing else.
#[derive(Clone, Debug)]
pub struct Sampler {
    random: ChaCha8Rng,
}

impl Sampler {
    /// The sampler of sample `index` of a request with this seed.
    pub fn new(seed: u64, index: usize) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(index as u64);
        Self { random }
    }

    /// Draws one token from logits `[vocabulary]`. None if they give no distribution (a NaN, or nothing finite).
    pub fn draw(&mut self, logits: &[f32], sampling: &Sampling) -> Option<Token> {
        let greedy = sampling.temperature == 0.0;
        // One draw per token, greedy or not, so that a position always meets the same random number.
        let uniform: f64 = self.random.random();
        let temperature = if greedy { 1.0 } else { sampling.temperature };
        let distribution = Distribution::new(logits, temperature)?;
        let id = if greedy {
            distribution.most_likely()
        } else if sampling.top_k == 0 && sampling.top_p >= 1.0 {
            distribution.at(uniform)
        } else {
            distribution.at_truncated(uniform, sampling.top_k, sampling.top_p)
        };
        let untempered = Distribution::new(logits, 1.0)?;
        let of = |id: &u32| untempered.log_probability(*id as usize);
        Some(Token {
            id: u32::try_from(id).ok()?,
            log_probability: distribution.log_probability(id),
            model_log_probability: untempered.log_probability(id),
            watched: sampling.watched_ids.iter().map(of).collect(),
            top: Vec::new(),
        })
    }
}

/// A softmax that is not materialised: `exp(logit / temperature - peak) / mass`.
struct Distribution<'a> {
    logits: &'a [f32],
    inverse_temperature: f32,
    peak: f32,
    mass: f64,
}

impl<'a> Distribution<'a> {
    fn new(logits: &'a [f32], temperature: f32) -> Option<Self> {
        let inverse_temperature = 1.0 / temperature;
        let mut peak = f32::NEG_INFINITY;
        let mut broken = false;
        for logit in logits {
            broken |= logit.is_nan();
            peak = peak.max(*logit);
        }
        if broken || !peak.is_finite() {
            return None;
        }
        let mut distribution = Self {
            logits,
            inverse_temperature,
            peak: peak * inverse_temperature,
            mass: 0.0,
        };
        distribution.mass = (0..logits.len()).map(|id| distribution.weight(id)).sum();
        Some(distribution)
    }

    /// Probability of a token times [`Self::mass`].
    fn weight(&self, id: usize) -> f64 {
        f64::from((self.logits[id] * self.inverse_temperature - self.peak).exp())
    }

    #[allow(clippy::cast_possible_truncation, reason = "log-probabilities are f32 throughout")]
    fn log_probability(&self, id: usize) -> f32 {
        match self.logits.get(id) {
            Some(logit) => (f64::from(logit * self.inverse_temperature - self.peak) - self.mass.ln()) as f32,
            None => f32::NEG_INFINITY,
        }
    }

    /// The token of the highest logit; of equals the one with the lowest id.
    fn most_likely(&self) -> usize {
        let better = |best: usize, id: usize| if self.logits[id] > self.logits[best] { id } else { best };
        (1..self.logits.len()).fold(0, better)
    }

    /// The token at which the cumulated probability, in the order of ids, exceeds `uniform` in [0, 1).
    fn at(&self, uniform: f64) -> usize {
        self.walk(0..self.logits.len(), uniform * self.mass)
    }

    /// As [`Self::at`], in falling probability, among the `top_k` most likely that reach a share of `top_p`.
    fn at_truncated(&self, uniform: f64, top_k: usize, top_p: f32) -> usize {
        let mut ids: Vec<usize> = (0..self.logits.len()).collect();
        // A stable sort: tokens of equal probability stay in the order of their ids.
        ids.sort_by(|a, b| self.logits[*b].total_cmp(&self.logits[*a]));
        if top_k > 0 {
            ids.truncate(top_k);
        }
        let nucleus = f64::from(top_p) * ids.iter().map(|id| self.weight(*id)).sum::<f64>();
        let mut kept = 0.0;
        let mut count = 0;
        while count < ids.len() && (count == 0 || kept < nucleus) {
            kept += self.weight(ids[count]);
            count += 1;
        }
        ids.truncate(count);
        self.walk(ids.iter().copied(), uniform * kept)
    }

    fn walk(&self, ids: impl Iterator<Item = usize>, target: f64) -> usize {
        let mut cumulated = 0.0;
        let mut last = 0;
        for id in ids {
            let weight = self.weight(id);
            if weight == 0.0 {
                continue;
            }
            cumulated += weight;
            last = id;
            if cumulated > target {
                break;
            }
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sampling(temperature: f32, top_p: f32, top_k: usize) -> Sampling {
        Sampling {
            temperature,
            top_p,
            top_k,
            ..Sampling::default()
        }
    }

    fn draw(logits: &[f32], sampling: &Sampling, seed: u64) -> Token {
        Sampler::new(seed, 0).draw(logits, sampling).expect("a distribution")
    }

    #[test]
    fn temperature_zero_takes_the_most_likely_token_and_of_equals_the_first() {
        assert_eq!(draw(&[0.0, 2.0, 2.0, 1.0], &sampling(0.0, 1.0, 0), 7).id, 1);
    }

    #[test]
    fn log_probabilities_are_those_of_the_tempered_distribution() {
        // softmax([0, ln 3] / 0.5) = [1, 9] / 10
        let token = draw(&[0.0, 3f32.ln()], &sampling(0.5, 1.0, 1), 0);
        assert_eq!(token.id, 1);
        assert!((token.log_probability - 0.9f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn watched_tokens_are_those_of_the_untempered_distribution() {
        let sampling = Sampling {
            watched_ids: vec![1, 0, 9],
            temperature: 0.5,
            ..Sampling::default()
        };
        let watched = draw(&[0.0, 3f32.ln()], &sampling, 0).watched;
        assert!((watched[0] - watched[1] - 3f32.ln()).abs() < 1e-6);
        assert_eq!(watched[2], f32::NEG_INFINITY);
    }

    #[test]
    fn frequencies_follow_the_distribution() {
        let logits = [1f32.ln(), 2f32.ln(), 5f32.ln()];
        let mut sampler = Sampler::new(3, 0);
        let mut counts = [0f64; 3];
        for _ in 0..8000 {
            counts[sampler.draw(&logits, &sampling(1.0, 1.0, 0)).expect("draws").id as usize] += 1.0;
        }
        for (count, share) in counts.iter().zip([0.125, 0.25, 0.625]) {
            // four standard deviations of a binomial count
            let tolerance = 4.0 * (8000.0f64 * share * (1.0 - share)).sqrt();
            assert!((count - 8000.0 * share).abs() < tolerance, "{counts:?}");
        }
    }

    #[test]
    fn the_nucleus_is_the_smallest_set_that_reaches_its_share() {
        let logits = [5f32.ln(), 3f32.ln(), 2f32.ln()];
        for seed in 0..64 {
            assert!(draw(&logits, &sampling(1.0, 0.7, 0), seed).id < 2);
            assert_eq!(draw(&logits, &sampling(1.0, 0.5, 0), seed).id, 0);
        }
    }

    #[test]
    fn samples_of_one_request_draw_different_numbers() {
        let logits = [0.0; 64];
        let drawn = |index| {
            let mut sampler = Sampler::new(1, index);
            (0..8)
                .map(|_| sampler.draw(&logits, &sampling(1.0, 1.0, 0)).expect("draws").id)
                .collect::<Vec<_>>()
        };
        assert_eq!(drawn(0), drawn(0));
        assert_ne!(drawn(0), drawn(1));
    }

    #[test]
    fn broken_logits_give_no_token() {
        for logits in [
            vec![0.0, f32::NAN],
            vec![f32::NEG_INFINITY; 3],
            vec![],
            vec![f32::INFINITY, 0.0],
        ] {
            assert!(Sampler::new(0, 0).draw(&logits, &Sampling::default()).is_none());
        }
    }

    proptest! {
        #[test]
        fn a_drawn_token_has_a_probability(
            logits in prop::collection::vec(prop_oneof![9 => -30f32..30.0, 1 => Just(f32::NEG_INFINITY)], 1..40),
            temperature in prop_oneof![Just(0f32), 0.05f32..4.0],
            top_p in 0.01f32..=1.0,
            top_k in 0usize..50,
            seed: u64,
        ) {
            prop_assume!(logits.iter().any(|logit| logit.is_finite()));
            let token = draw(&logits, &sampling(temperature, top_p, top_k), seed);
            prop_assert!(logits[token.id as usize].is_finite());
            prop_assert!(token.log_probability <= 1e-6 && token.log_probability.is_finite());
        }
    }
}
