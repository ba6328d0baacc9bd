//! Penalties for what was said.

use std::collections::HashMap;

use crate::recipe::Recipe;

/// Tokens that a sample has drawn, with their numbers; empty if no penalty counts them.
#[derive(Clone, Debug, Default)]
pub struct History {
    counts: HashMap<u32, u32>,
}

impl History {
    /// Counts a token.
    pub fn push(&mut self, id: u32) {
        *self.counts.entry(id).or_default() += 1;
    }

    /// Changes the logits `[vocabulary]` of tokens of the prompt and of the completion. The repetition penalty is that of
    /// transformers: positive logits are divided by it and negative ones multiplied, once for each token that stands in the prompt
    /// or the completion. The other two are OpenAI's: `logit - count * frequency - (count > 0) * presence`, counted in the
    /// completion alone.
    pub fn penalize(&self, logits: &mut [f32], recipe: &Recipe) {
        let sampling = recipe.sampling();
        let repetition = sampling.repetition_penalty;
        let mut repeat = |id: u32| {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = if *logit > 0.0 {
                    *logit / repetition
                } else {
                    *logit * repetition
                };
            }
        };
        if sampling.penalizes_repetition() {
            recipe.prompt_ids().iter().copied().for_each(&mut repeat);
            let fresh = |id: &u32| recipe.prompt_ids().binary_search(id).is_err();
            self.counts.keys().copied().filter(fresh).for_each(&mut repeat);
        }
        let (presence, frequency) = (sampling.presence_penalty, sampling.frequency_penalty);
        if presence == 0.0 && frequency == 0.0 {
            return;
        }
        for (id, count) in &self.counts {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit -= *count as f32 * frequency + presence;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::request::Sampling;

    /// The definitions, word for word.
    fn reference(logits: &[f32], prompt: &[u32], drawn: &[u32], sampling: &Sampling) -> Vec<f32> {
        let of = |(id, logit): (usize, &f32)| {
            let id = id as u32;
            let count = drawn.iter().filter(|other| **other == id).count() as f32;
            let mut logit = *logit;
            if prompt.contains(&id) || drawn.contains(&id) {
                logit = if logit > 0.0 {
                    logit / sampling.repetition_penalty
                } else {
                    logit * sampling.repetition_penalty
                };
            }
            logit - count * sampling.frequency_penalty - if count > 0.0 { sampling.presence_penalty } else { 0.0 }
        };
        logits.iter().enumerate().map(of).collect()
    }

    proptest! {
        #[test]
        fn penalties_are_those_of_their_definitions(
            logits in prop::collection::vec(-9f32..9.0, 1..12),
            prompt in prop::collection::vec(0u32..14, 1..8),
            drawn in prop::collection::vec(0u32..14, 0..12),
            repetition_penalty in prop_oneof![Just(1f32), 0.5f32..2.0],
            presence_penalty in prop_oneof![Just(0f32), -2f32..2.0],
            frequency_penalty in prop_oneof![Just(0f32), -2f32..2.0],
        ) {
            let sampling = Sampling { repetition_penalty, presence_penalty, frequency_penalty, ..Sampling::default() };
            let recipe = Recipe::new(&sampling, None, 1, &prompt).expect("valid");
            let mut history = History::default();
            drawn.iter().for_each(|id| history.push(*id));
            let mut penalized = logits.clone();
            history.penalize(&mut penalized, &recipe);
            let expected = reference(&logits, &prompt, &drawn, &sampling);
            for (found, expected) in penalized.iter().zip(expected) {
                prop_assert!((found - expected).abs() < 1e-4, "{found} {expected}");
            }
        }
    }
}
