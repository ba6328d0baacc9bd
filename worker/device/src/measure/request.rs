//! Whole requests, from the prompt to the last token, and prompts alone.

use std::time::Instant;

use super::{
    Bench, Line,
    bench::{DeviceEngine, failed},
    floor::prefill_operations,
};
use crate::{error::DeviceError, runner::Sharing};

impl Bench {
    /// `count` requests at once, each of `n` samples of `new_tokens` tokens after a prompt of its own of `prompt` tokens; the
    /// second time counts, with other prompts. The rate is that of new tokens over the whole time.
    pub fn requests(&self, count: usize, n: usize, prompt: usize, new_tokens: usize) -> Result<Line, DeviceError> {
        let mut engine = self.engine(count * n, prompt + new_tokens, Sharing::WhereItPays)?;
        let (mut seconds, mut host) = (0.0, 0.0);
        for round in 0..2 {
            for index in 0..count {
                let request = self.request(1000 * (round + 1) + index, n, prompt, new_tokens);
                engine.submit(&request).map_err(failed)?;
            }
            let on_card = engine.runner().on_card();
            let drawn = self.finish(&mut engine, &mut seconds)?;
            let wanted = count * n * new_tokens;
            if drawn != wanted {
                return Err(DeviceError::Input(format!("{drawn} of {wanted} tokens were drawn")));
            }
            host = seconds - (engine.runner().on_card() - on_card).as_secs_f64();
        }
        let what = match n {
            1 => format!("requests {count} x {prompt}+{new_tokens}"),
            _ if count == 1 => format!("request of {n} x {prompt}+{new_tokens}"),
            _ => format!("requests {count} of {n} x {prompt}+{new_tokens}"),
        };
        let floor = self.ceiling.requests(self.shape(), (count, n), prompt, new_tokens);
        Ok(Line::new(what, (count * n * new_tokens, "tokens"), seconds, floor).with_host(host))
    }

    /// Prompts of `tokens` tokens each, `rows` of them, until each has its first token; the third time counts.
    pub fn prefill(&self, rows: usize, tokens: usize) -> Result<Line, DeviceError> {
        let mut engine = self.engine(rows, tokens + 2, Sharing::WhereItPays)?;
        let mut seconds = 0.0;
        for round in 0..3 {
            for index in 0..rows {
                let request = self.request(1000 * (round + 1) + index, 1, tokens, 1);
                engine.submit(&request).map_err(failed)?;
            }
            self.finish(&mut engine, &mut seconds)?;
        }
        let operations = prefill_operations(self.shape(), rows, 0, tokens);
        let floor = self.ceiling.arithmetic(operations);
        let what = format!("prefill {rows} x {tokens}");
        Ok(Line::new(what, (rows * tokens, "tokens"), seconds, floor))
    }

    /// Steps until there is nothing to do; how many tokens were drawn.
    fn finish(&self, engine: &mut DeviceEngine, seconds: &mut f64) -> Result<usize, DeviceError> {
        self.gpu.synchronize()?;
        let begin = Instant::now();
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
