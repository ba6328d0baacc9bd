//! One sample on its way.

use std::{cell::RefCell, sync::Arc};

use crate::{
    constraint::Progress,
    error::EngineError,
    history::History,
    recipe::Recipe,
    request::{FinishReason, Token},
    runner::{Draw, Drawn},
    sampler::Sampler,
    shared::SharedLogits,
};

thread_local! {
    /// Logits on their way through bias, penalties and constraint.
    static ADJUSTED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Number of a request within an engine.
pub type RequestId = u64;

/// One sample of a request. What it holds depends on the tokens drawn alone, not on where keys and values lie.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// The request it belongs to.
    pub request: RequestId,
    /// Its index in the request.
    pub sample: usize,
    recipe: Arc<Recipe>,
    sampler: Sampler,
    history: History,
    progress: Progress,
    generated: usize,
    last: u32,
}

impl Sequence {
    /// Before its first token.
    pub fn new(request: RequestId, sample: usize, recipe: Arc<Recipe>) -> Self {
        let sampler = Sampler::new(recipe.sampling().seed, sample);
        let progress = Progress::new(recipe.constraint(), sample);
        Self {
            request,
            sample,
            recipe,
            sampler,
            history: History::default(),
            progress,
            generated: 0,
            last: 0,
        }
    }

    /// The newest token, which the next decode step takes as its input.
    pub fn last(&self) -> u32 {
        self.last
    }

    /// Draws the next token from the model's logits `[vocabulary]`; the reason is set if it is the last one. An error concerns
    /// this request and no other.
    pub fn extend(&mut self, logits: &[f32]) -> Result<(Token, Option<FinishReason>), EngineError> {
        let token = self.draw(logits)?;
        let finish = self.push(&token)?;
        Ok((token, finish))
    }

    /// As [`Self::extend`], from logits that other samples of the request draw from.
    pub fn extend_shared(&mut self, logits: &SharedLogits) -> Result<(Token, Option<FinishReason>), EngineError> {
        if self.adjusts() || self.progress.forced().is_some() {
            return self.extend(logits.logits());
        }
        let drawn = self.sampler.draw_shared(logits, self.recipe.sampling());
        let token = drawn.ok_or_else(|| self.not_finite())?;
        let finish = self.push(&token)?;
        Ok((token, finish))
    }

    /// The model has given no distribution.
    fn not_finite(&self) -> EngineError {
        EngineError::NotFinite {
            sample: self.sample,
            tokens: self.generated,
        }
    }

    /// Tokens whose log-probabilities are recorded at each position.
    pub fn watched_ids(&self) -> &[u32] {
        &self.recipe.sampling().watched_ids
    }

    /// How the next token is drawn, if that [needs](Self::is_plain) nothing but the model's logits.
    pub fn next_draw(&self) -> Option<Draw> {
        self.is_plain().then(|| self.draw_by(self.sampler.next_uniform()))
    }

    /// How the token after the next one is drawn, if neither needs more than the model's logits.
    pub fn draw_after_next(&self) -> Option<Draw> {
        self.is_plain().then(|| self.draw_by(self.sampler.uniform_after_next()))
    }

    /// Whether the next token, and any after it, needs nothing but the model's logits, and says nothing but the token and the
    /// [watched](Self::watched_ids) ones.
    pub fn is_plain(&self) -> bool {
        !self.adjusts() && self.progress.forced().is_none() && self.recipe.sampling().top_log_probabilities == 0
    }

    /// Whether the next token is the last one for its number.
    pub fn ends_next(&self) -> bool {
        self.generated + 1 >= self.recipe.sampling().max_tokens
    }

    fn draw_by(&self, uniform: f64) -> Draw {
        let sampling = self.recipe.sampling();
        Draw {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            uniform,
        }
    }

    /// As [`Self::extend`], with the token that the runner has drawn by [`Self::next_draw`].
    pub fn accept(&mut self, drawn: Option<&Drawn>) -> Result<(Token, Option<FinishReason>), EngineError> {
        self.sampler.skip();
        let drawn = drawn.ok_or_else(|| self.not_finite())?;
        let token = Token {
            id: drawn.id,
            log_probability: drawn.log_probability,
            model_log_probability: drawn.model_log_probability,
            watched: drawn.watched.clone(),
            top: Vec::new(),
        };
        let finish = self.push(&token)?;
        Ok((token, finish))
    }

    /// Counts a token that was drawn; the reason is set if it is the last one.
    fn push(&mut self, token: &Token) -> Result<Option<FinishReason>, EngineError> {
        let sampling = self.recipe.sampling();
        self.generated += 1;
        self.last = token.id;
        if sampling.counts_tokens() {
            self.history.push(token.id);
        }
        self.progress.push(token.id)?;
        let stopped = sampling.stop_ids.contains(&token.id);
        let finish = if self.progress.is_complete(stopped) {
            Some(FinishReason::Stop)
        } else if self.generated >= sampling.max_tokens {
            Some(FinishReason::Length)
        } else {
            None
        };
        Ok(finish)
    }

    fn draw(&mut self, logits: &[f32]) -> Result<Token, EngineError> {
        let forced = self.progress.forced();
        let recipe = self.recipe.clone();
        let drawn = if self.adjusts() {
            ADJUSTED.with_borrow_mut(|adjusted| {
                adjusted.clear();
                adjusted.extend_from_slice(logits);
                self.adjust(adjusted)?;
                let sampler = &mut self.sampler;
                Ok(sampler.draw_adjusted(logits, Some(adjusted), recipe.sampling(), forced))
            })?
        } else {
            self.sampler.draw_adjusted(logits, None, recipe.sampling(), forced)
        };
        drawn.ok_or_else(|| self.not_finite())
    }

    /// Whether [`Self::adjust`] would change anything.
    fn adjusts(&self) -> bool {
        let sampling = self.recipe.sampling();
        !sampling.logit_bias.is_empty()
            || sampling.counts_tokens()
            || self.generated < sampling.min_tokens
            || self.progress.masks()
    }

    /// Bias, penalties, and what may not come at all.
    fn adjust(&mut self, logits: &mut [f32]) -> Result<(), EngineError> {
        let sampling = self.recipe.sampling();
        for (id, bias) in &sampling.logit_bias {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit += bias;
            }
        }
        self.history.penalize(logits, &self.recipe);
        if self.generated < sampling.min_tokens {
            for id in &sampling.stop_ids {
                if let Some(logit) = logits.get_mut(*id as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        self.progress.mask(logits, &sampling.stop_ids)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{constraint::Constraint, request::Sampling};

    const VOCABULARY: usize = 8;

    /// Tokens of one sample whose logits at each position are a row of `logits`, again from the first after the last.
    fn run(
        logits: &[Vec<f32>],
        sampling: &Sampling,
        constraint: Option<&Constraint>,
    ) -> Result<(Vec<Token>, FinishReason), EngineError> {
        let n = match constraint {
            Some(Constraint::Forced(answers)) => answers.len(),
            _ => 1,
        };
        let recipe = Recipe::new(sampling, constraint, n, &[1, 2, 1])?;
        let mut sequence = Sequence::new(0, 0, Arc::new(recipe));
        let mut tokens = Vec::new();
        for row in logits.iter().cycle() {
            let (token, finish) = sequence.extend(row)?;
            assert_eq!(token.id, sequence.last());
            tokens.push(token);
            if let Some(finish) = finish {
                return Ok((tokens, finish));
            }
        }
        unreachable!("max_tokens ends a sample")
    }

    fn ids(tokens: &[Token]) -> Vec<u32> {
        tokens.iter().map(|token| token.id).collect()
    }

    fn rows() -> impl Strategy<Value = Vec<Vec<f32>>> {
        let row = prop::collection::vec(-9f32..9.0, VOCABULARY);
        prop::collection::vec(row, 1..6)
    }

    proptest! {
        #[test]
        fn a_choice_is_one_of_its_answers(
            logits in rows(),
            answers in prop::collection::vec(prop::collection::vec(0u32..7, 1..5), 1..6),
            seed: u64,
            temperature in prop_oneof![Just(0f32), 0.5f32..3.0],
        ) {
            let sampling = Sampling { seed, temperature, stop_ids: vec![7], ..Sampling::default() };
            let choice = Constraint::choice(&answers).expect("answers");
            let (tokens, finish) = run(&logits, &sampling, Some(&choice)).expect("draws");
            let mut drawn = ids(&tokens);
            if drawn.last() == Some(&7) {
                drawn.pop();
            }
            prop_assert!(answers.contains(&drawn), "{:?} is none of {:?}", drawn, answers);
            prop_assert_eq!(finish, FinishReason::Stop);
            prop_assert!(tokens.iter().all(|token| token.log_probability.is_finite()));
        }

        #[test]
        fn a_forced_sample_is_its_answer_with_the_probabilities_of_the_model(
            logits in rows(),
            answer in prop::collection::vec(0u32..8, 1..9),
        ) {
            let sampling = Sampling { stop_ids: vec![7], ..Sampling::default() };
            let forced = Constraint::Forced(vec![answer.clone()].into());
            let (tokens, finish) = run(&logits, &sampling, Some(&forced)).expect("draws");
            prop_assert_eq!(ids(&tokens), answer);
            prop_assert_eq!(finish, FinishReason::Stop);
            for (token, row) in tokens.iter().zip(logits.iter().cycle()) {
                let mass: f32 = row.iter().map(|logit| logit.exp()).sum();
                let expected = row[token.id as usize] - mass.ln();
                prop_assert!((token.model_log_probability - expected).abs() < 1e-4);
                prop_assert_eq!(token.model_log_probability, token.log_probability);
            }
        }

        #[test]
        fn no_stop_token_is_drawn_before_min_tokens(logits in rows(), seed: u64, min_tokens in 0usize..16) {
            let sampling = Sampling { seed, min_tokens, stop_ids: vec![0, 1, 2, 3, 4, 5], ..Sampling::default() };
            let (tokens, _) = run(&logits, &sampling, None).expect("draws");
            prop_assert!(tokens.len() >= min_tokens);
            let early = tokens.iter().take(min_tokens);
            prop_assert!(early.clone().all(|token| token.id > 5));
        }
    }

    #[test]
    fn a_bias_moves_probability_and_not_the_model_s_own() {
        let sampling = Sampling {
            logit_bias: vec![(3, 100.0), (99, 1.0)],
            max_tokens: 4,
            ..Sampling::default()
        };
        let (tokens, finish) = run(&[vec![0.0; VOCABULARY]], &sampling, None).expect("draws");
        assert_eq!(ids(&tokens), [3; 4]);
        assert_eq!(finish, FinishReason::Length);
        assert!((tokens[0].model_log_probability + 8f32.ln()).abs() < 1e-6);
        assert!(tokens[0].log_probability > -1e-6);
    }

    #[test]
    fn a_presence_penalty_keeps_a_sample_from_saying_a_token_twice() {
        let sampling = Sampling {
            presence_penalty: 50.0,
            max_tokens: VOCABULARY,
            ..Sampling::default()
        };
        let (tokens, _) = run(&[vec![0.0; VOCABULARY]], &sampling, None).expect("draws");
        let mut drawn = ids(&tokens);
        drawn.sort_unstable();
        assert_eq!(drawn, (0..VOCABULARY as u32).collect::<Vec<_>>());
    }

    #[test]
    fn a_repetition_penalty_counts_the_prompt() {
        let sampling = Sampling {
            repetition_penalty: 3.0,
            temperature: 0.0,
            max_tokens: 1,
            ..Sampling::default()
        };
        // Token 1 stands in the prompt: 2 / 3 is less than 1.
        let (tokens, _) = run(&[vec![0.0, 2.0, 0.0, 1.0]], &sampling, None).expect("draws");
        assert_eq!(ids(&tokens), [3]);
    }

    #[test]
    fn what_does_not_go_together_is_refused_with_its_numbers() {
        let plain = Sampling::default();
        let forced = |answers: &[&[u32]]| {
            Constraint::Forced(answers.iter().map(|answer| answer.to_vec()).collect::<Vec<_>>().into())
        };
        let choice = |answers: &[Vec<u32>]| Constraint::choice(answers).expect("answers");
        let long = vec![1; 17];
        let min_tokens = Sampling {
            min_tokens: 2,
            ..Sampling::default()
        };
        for (sampling, constraint, n, reason) in [
            (&plain, forced(&[&[1]]), 2, "1 forced answers for 2 samples"),
            (
                &plain,
                forced(&[&long]),
                1,
                "17 tokens, which must be 1 to max_tokens (16)",
            ),
            (&plain, forced(&[&[]]), 1, "0 tokens"),
            (
                &plain,
                choice(std::slice::from_ref(&long)),
                1,
                "takes 17 tokens, max_tokens is 16",
            ),
            (&plain, choice(&[vec![1], vec![1, 2]]), 1, "[1] is the beginning"),
            (&min_tokens, forced(&[&[1]]), 1, "min_tokens is 2"),
        ] {
            let error = Recipe::new(sampling, Some(&constraint), n, &[])
                .expect_err(reason)
                .to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
