//! From logits to a token and its log-probability.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{
    distribution::Distribution,
    request::{Sampling, Token},
    shared::SharedLogits,
};

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

    /// The random number of the next token, which stays the next one.
    pub fn next_uniform(&self) -> f64 {
        self.random.clone().random()
    }

    /// The random number of the token after the next one.
    pub fn uniform_after_next(&self) -> f64 {
        let mut after = self.clone();
        after.skip();
        after.random.random()
    }

    /// Passes over the random number of a token that was drawn elsewhere.
    pub fn skip(&mut self) {
        let _: f64 = self.random.random();
    }

    /// Draws one token from logits `[vocabulary]` as they are: by temperature, `top_k`, `top_p` and `min_p`. None if they give
    /// no distribution (a NaN, or nothing finite).
    pub fn draw(&mut self, logits: &[f32], sampling: &Sampling) -> Option<Token> {
        self.draw_adjusted(logits, None, sampling, None)
    }

    /// As [`Self::draw`], from logits that other samples draw from in the same way.
    pub fn draw_shared(&mut self, logits: &SharedLogits, sampling: &Sampling) -> Option<Token> {
        logits.at(self.random.random(), sampling)
    }

    /// As [`Self::draw`], from the `adjusted` logits if there are any, or without a draw the token that is `forced`. `logits`
    /// remain those of the model.
    pub fn draw_adjusted(
        &mut self,
        logits: &[f32],
        adjusted: Option<&[f32]>,
        sampling: &Sampling,
        forced: Option<u32>,
    ) -> Option<Token> {
        let greedy = sampling.temperature == 0.0;
        // One draw per token, whether it is needed or not, so that a position always meets the same random number.
        let uniform: f64 = self.random.random();
        let temperature = if greedy { 1.0 } else { sampling.temperature };
        let model = Distribution::new(logits, 1.0)?;
        let distribution = match adjusted {
            None if temperature == 1.0 => model,
            adjusted => Distribution::new(adjusted.unwrap_or(logits), temperature)?,
        };
        let id = match forced {
            Some(id) => id as usize,
            None if greedy => distribution.most_likely(),
            None => distribution.at(uniform, sampling),
        };
        let of = |id: &u32| model.log_probability(*id as usize);
        Some(Token {
            id: u32::try_from(id).ok()?,
            log_probability: distribution.log_probability(id),
            model_log_probability: model.log_probability(id),
            watched: sampling.watched_ids.iter().map(of).collect(),
            top: match sampling.top_log_probabilities {
                0 => Vec::new(),
                count => model.top(count),
            },
        })
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
    fn the_model_s_own_log_probabilities_know_no_temperature_and_no_adjustment() {
        let sampling = Sampling {
            top_log_probabilities: 1,
            ..sampling(0.5, 1.0, 0)
        };
        let logits = [0.0, 3f32.ln()];
        let adjusted = [0.0, f32::NEG_INFINITY];
        let token = Sampler::new(0, 0).draw_adjusted(&logits, Some(&adjusted), &sampling, None);
        let token = token.expect("a distribution");
        assert_eq!((token.id, token.log_probability), (0, 0.0));
        assert!((token.model_log_probability - 0.25f32.ln()).abs() < 1e-6);
        assert_eq!(token.top[0].0, 1);
        assert!((token.top[0].1 - 0.75f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn a_forced_token_leaves_the_random_numbers_of_those_after_it_in_place() {
        let logits = [0.0; 64];
        let (mut free, mut forced) = (Sampler::new(5, 0), Sampler::new(5, 0));
        let sampling = Sampling::default();
        free.draw(&logits, &sampling);
        let token = forced
            .draw_adjusted(&logits, None, &sampling, Some(7))
            .expect("a distribution");
        assert_eq!(token.id, 7);
        assert!((token.log_probability + 64f32.ln()).abs() < 1e-6);
        assert_eq!(free.draw(&logits, &sampling), forced.draw(&logits, &sampling));
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
