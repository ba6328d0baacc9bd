//! Best of n from the first token to the last verdict: candidates of one question, then a knock-out in which the same model
//! compares them, as `worker/src/critic` does it: a question, two answers after it, and what the critic writes.

use std::collections::HashMap;

use flotilla_engine::{Prompt, Request, Sampling};
use flotilla_model::Row;

use super::{
    Bench, BestOf, Contest, Floor, Wave,
    bench::{DeviceEngine, Watch, failed, sampling},
    floor::prefill_operations,
    knockout,
};
use crate::{error::DeviceError, runner::Sharing};

/// Tokens of the critic's template: before the first answer, between the two, and behind them.
const TEMPLATE: [usize; 3] = [4, 4, 8];

/// Tokens whose log-probabilities give the critic's margin.
const LABELS: [u32; 2] = [16, 17];

impl Bench {
    /// A best of n; the second time counts, with another question.
    pub fn best_of(&self, question: BestOf) -> Result<Contest, DeviceError> {
        let answers = question.prompt_tokens + 2 * question.new_tokens + TEMPLATE.iter().sum::<usize>();
        let mut engine = self.engine(question.n, answers + question.critic_tokens, Sharing::WhereItPays, None)?;
        self.contest(&mut engine, question, 1)?;
        self.contest(&mut engine, question, 2)
    }

    fn contest(&self, engine: &mut DeviceEngine, question: BestOf, index: usize) -> Result<Contest, DeviceError> {
        let BestOf {
            n,
            prompt_tokens,
            new_tokens,
            critic_tokens,
            ..
        } = question;
        let asked = self.ids(index, prompt_tokens);
        let candidates = Request::new(text(asked.clone()), n, sampling(index, new_tokens));
        let floor = self.ceiling.requests(self.shape(), (1, n), prompt_tokens, new_tokens);
        let (wave, answers) = self.wave(engine, &[candidates], floor)?;
        let mut waves = vec![wave];
        let rounds = knockout::rounds(n, index as u64);
        let template = TEMPLATE.map(|tokens| self.ids(9000 + tokens, tokens));
        let known = knockout::known_before(&rounds);
        for (pairs, known) in rounds.iter().zip(known) {
            let requests = pairs.iter().map(|[first, second]| {
                let [open, middle, close] = &template;
                let parts = [&asked, open, &answers[*first], middle, &answers[*second], close];
                let writing = Sampling {
                    temperature: 0.0,
                    watched_ids: if question.margins { LABELS.to_vec() } else { Vec::new() },
                    ..sampling(index, critic_tokens)
                };
                Request::new(text(parts.into_iter().flatten().copied().collect()), 1, writing)
            });
            let floor = self.comparisons(question, &known);
            waves.push(self.wave(engine, &requests.collect::<Vec<_>>(), floor)?.0);
        }
        Ok(Contest { question, waves })
    }

    /// The least time of a round: a cache knows the question, and first answers that it has seen in that place.
    fn comparisons(&self, question: BestOf, known: &[bool]) -> Floor {
        let [open, middle, close] = TEMPLATE;
        let (stored, answer) = (question.prompt_tokens, question.new_tokens);
        let all = open + middle + close + 2 * answer;
        let prefill = |count: usize, found: usize| prefill_operations(self.shape(), count, stored + found, all - found);
        let again = known.iter().filter(|known| **known).count();
        let fresh = known.len() - again;
        let operations = prefill(fresh, 0) + prefill(again, open + answer);
        let contexts = stored + known.len() * all;
        let writing = self
            .ceiling
            .draws(self.shape(), known.len(), contexts, question.critic_tokens);
        self.ceiling.arithmetic(operations).then(writing)
    }

    /// Requests at once, until all are done; the tokens of their samples one after the other.
    fn wave(
        &self,
        engine: &mut DeviceEngine,
        requests: &[Request<Prompt>],
        floor: Floor,
    ) -> Result<(Wave, Vec<Vec<u32>>), DeviceError> {
        let computed = engine.stats().prefill_tokens.get();
        let mut places = HashMap::new();
        let mut samples = 0;
        let mut watch = Watch::new(&self.gpu)?;
        for request in requests {
            places.insert(engine.submit(request).map_err(failed)?, samples);
            samples += request.n;
        }
        let mut drawn = vec![Vec::new(); samples];
        while !engine.is_idle() {
            let step = engine.step().map_err(failed)?;
            if let Some((_, error)) = step.failures.into_iter().next() {
                return Err(failed(error));
            }
            for event in step.events {
                if let Some(first) = places.get(&event.request) {
                    drawn[first + event.sample].push(event.token.id);
                }
            }
        }
        let seconds = watch.lap()?;
        let wave = Wave {
            requests: requests.len(),
            asked: requests.iter().map(|request| request.prompt.row.ids.len()).sum(),
            computed: usize::try_from(engine.stats().prefill_tokens.get() - computed).unwrap_or(usize::MAX),
            drawn: drawn.iter().map(Vec::len).sum(),
            seconds,
            floor: floor.seconds,
        };
        Ok((wave, drawn))
    }
}

fn text(ids: Vec<u32>) -> Prompt {
    Prompt::new(Row::text(ids), Vec::new())
}
