//! Whole requests, from the prompt to the last token, and prompts alone.

use std::time::Instant;

use flotilla_engine::{Prompt, Request};

use super::{
    Bench, Line,
    bench::{DeviceEngine, Shown, failed, sampling},
    floor::{prefill_operations, vision_operations},
    names,
};
use crate::{error::DeviceError, runner::Sharing};

impl Bench {
    /// `count` requests at once, each of `n` samples of `new_tokens` tokens after a prompt of its own of `prompt` tokens; the
    /// second time counts, with other prompts. A picture is the same in all requests of a time, another the next, and is
    /// encoded in it. The rate is that of new tokens over the whole time.
    pub(super) fn requests(
        &self,
        (count, n): (usize, usize),
        prompt: usize,
        new_tokens: usize,
        shown: Option<&Shown>,
    ) -> Result<Line, DeviceError> {
        let mut engine = self.engine(count * n, prompt + new_tokens, Sharing::WhereItPays, shown)?;
        let (mut seconds, mut host) = (0.0, 0.0);
        for round in 0..2 {
            let first = self.prompt(1000 * (round + 1), prompt, shown)?;
            let requests = (0..count).map(|index| {
                let index = 1000 * (round + 1) + index;
                let prompt = self.prompt_like(&first, index, shown)?;
                Ok(Request::new(prompt, n, sampling(index, new_tokens)))
            });
            let requests = requests.collect::<Result<Vec<_>, DeviceError>>()?;
            let on_card = engine.runner().on_card();
            let drawn = self.finish(&mut engine, &requests, &mut seconds)?;
            let wanted = count * n * new_tokens;
            if drawn != wanted {
                return Err(DeviceError::Input(format!("{drawn} of {wanted} tokens were drawn")));
            }
            host = seconds - (engine.runner().on_card() - on_card).as_secs_f64();
        }
        let what = names::requests((count, n), (prompt, new_tokens), shown.is_some());
        let encoding = shown.map_or(0.0, |shown| {
            vision_operations(shown.tower.shape(), shown.size.patches())
        });
        let of_text = self.ceiling.requests(self.shape(), (count, n), prompt, new_tokens);
        let floor = self.ceiling.arithmetic(encoding).then(of_text);
        Ok(Line::new(what, (count * n * new_tokens, "tokens"), seconds, floor).with_host(host))
    }

    /// The same samples as in a request of `n` without anything shared: every one computes and stores a prompt of its own.
    pub(super) fn requests_alone(
        &self,
        n: usize,
        prompt: usize,
        new_tokens: usize,
        shown: Option<&Shown>,
    ) -> Result<Line, DeviceError> {
        let line = self.requests((n, 1), prompt, new_tokens, shown)?;
        Ok(Line {
            what: names::requests_alone(n, (prompt, new_tokens), shown.is_some()),
            ..line
        })
    }

    /// Prompts of `tokens` tokens each, `rows` of them, until each has its first token; the third time counts.
    pub fn prefill(&self, rows: usize, tokens: usize) -> Result<Line, DeviceError> {
        let mut engine = self.engine(rows, tokens + 2, Sharing::WhereItPays, None)?;
        let mut seconds = 0.0;
        for round in 0..3 {
            let requests = (0..rows).map(|index| {
                let index = 1000 * (round + 1) + index;
                Ok(Request::new(self.prompt(index, tokens, None)?, 1, sampling(index, 1)))
            });
            let requests = requests.collect::<Result<Vec<_>, DeviceError>>()?;
            self.finish(&mut engine, &requests, &mut seconds)?;
        }
        let operations = prefill_operations(self.shape(), rows, 0, tokens);
        let floor = self.ceiling.arithmetic(operations);
        let what = format!("prefill {rows} x {tokens}");
        Ok(Line::new(what, (rows * tokens, "tokens"), seconds, floor))
    }

    /// Submits requests and steps until there is nothing to do; how many tokens were drawn.
    fn finish(
        &self,
        engine: &mut DeviceEngine,
        requests: &[Request<Prompt>],
        seconds: &mut f64,
    ) -> Result<usize, DeviceError> {
        self.gpu.synchronize()?;
        let begin = Instant::now();
        for request in requests {
            engine.submit(request).map_err(failed)?;
        }
        let mut drawn = 0;
        while !engine.is_idle() {
            let step = engine.step().map_err(failed)?;
            drawn += step.events.len();
            if let Some((_, error)) = step.failures.into_iter().next() {
                return Err(failed(error));
            }
        }
        self.gpu.synchronize()?;
        *seconds = begin.elapsed().as_secs_f64();
        Ok(drawn)
    }
}
