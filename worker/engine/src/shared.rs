//! Logits that several samples draw from.

use std::sync::OnceLock;

use crate::{
    distribution::{Cumulated, Distribution, Scale},
    request::{Sampling, Token},
};

/// Logits after a prompt, from which the samples of its request draw their first tokens, all in the same way. What does not
/// depend on their random numbers is computed by the first of them.
#[derive(Debug)]
pub struct SharedLogits {
    logits: Box<[f32]>,
    prepared: OnceLock<Option<Prepared>>,
}

/// A distribution, ready to be drawn from.
#[derive(Debug)]
struct Prepared {
    model: Scale,
    tempered: Scale,
    choice: Choice,
    /// The most likely tokens of the model, as many as are recorded.
    top: Vec<(u32, f32)>,
}

#[derive(Debug)]
enum Choice {
    /// At temperature 0.
    Always(usize),
    /// By a random number.
    By(Cumulated),
}

impl SharedLogits {
    /// Logits `[vocabulary]`.
    pub fn new(logits: &[f32]) -> Self {
        Self {
            logits: logits.into(),
            prepared: OnceLock::new(),
        }
    }

    /// The logits.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// What [`Sampler::draw`](crate::sampler::Sampler::draw) gives for this random number in [0, 1). `sampling` must be the
    /// same in every call.
    pub fn at(&self, uniform: f64, sampling: &Sampling) -> Option<Token> {
        let prepared = self.prepared.get_or_init(|| self.prepare(sampling)).as_ref()?;
        let id = match &prepared.choice {
            Choice::Always(id) => *id,
            Choice::By(cumulated) => cumulated.at(uniform),
        };
        let model = Distribution::with(&self.logits, prepared.model);
        let tempered = Distribution::with(&self.logits, prepared.tempered);
        let of = |id: &u32| model.log_probability(*id as usize);
        Some(Token {
            id: u32::try_from(id).ok()?,
            log_probability: tempered.log_probability(id),
            model_log_probability: model.log_probability(id),
            watched: sampling.watched_ids.iter().map(of).collect(),
            top: prepared.top.clone(),
        })
    }

    fn prepare(&self, sampling: &Sampling) -> Option<Prepared> {
        let model = Distribution::new(&self.logits, 1.0)?;
        let greedy = sampling.temperature == 0.0;
        let tempered = if greedy || sampling.temperature == 1.0 {
            model
        } else {
            Distribution::new(&self.logits, sampling.temperature)?
        };
        let choice = if greedy {
            Choice::Always(tempered.most_likely())
        } else {
            Choice::By(tempered.cumulate(sampling))
        };
        Some(Prepared {
            model: model.scale(),
            tempered: tempered.scale(),
            choice,
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
    use crate::sampler::Sampler;

    proptest! {
        #[test]
        fn every_sample_draws_what_it_draws_alone(
            logits in prop::collection::vec(-9f32..9.0, 1..200),
            temperature in prop_oneof![Just(0f32), Just(1f32), 0.1f32..3.0],
            top_k in prop_oneof![Just(0usize), 1usize..220],
            top_p in prop_oneof![Just(1f32), 0.01f32..1.0],
            min_p in prop_oneof![Just(0f32), 0.001f32..=1.0],
            top_log_probabilities in 0usize..4,
            seed: u64,
        ) {
            let watched_ids = vec![3, 999];
            let sampling =
                Sampling { temperature, top_k, top_p, min_p, top_log_probabilities, watched_ids, seed, ..Sampling::default() };
            let shared = SharedLogits::new(&logits);
            for sample in 0..20 {
                let mut alone = Sampler::new(seed, sample);
                let mut together = alone.clone();
                prop_assert_eq!(together.draw_shared(&shared, &sampling), alone.draw(&logits, &sampling));
                prop_assert_eq!(together.next_uniform(), alone.next_uniform());
            }
        }
    }

    #[test]
    fn logits_that_are_no_numbers_give_no_token() {
        let shared = SharedLogits::new(&[0.0, f32::NAN]);
        assert_eq!(shared.at(0.5, &Sampling::default()), None);
    }
}
