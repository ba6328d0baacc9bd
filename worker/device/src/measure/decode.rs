//! Decode steps once all sequences decode: alone and in groups.

use std::time::Instant;

use flotilla_engine::Request;

use super::{
    Bench, Floor, Line,
    bench::{DeviceEngine, Shown, failed, sampling},
    memory::STEP_TOKENS,
    names,
};
use crate::{error::DeviceError, runner::Sharing};

/// Steps of one size before it is measured.
const WARM: usize = 8;

/// Steps that are measured.
const STEPS: usize = 48;

/// A step once it is always the same.
#[derive(Clone, Copy)]
struct Steady {
    seconds: f64,
    /// Those in which the card had nothing to do.
    host: f64,
}

impl Bench {
    /// Decoding: `rows` sequences, each after a prompt of its own of `context` tokens.
    pub fn decode(&self, rows: usize, context: usize) -> Result<Line, DeviceError> {
        let (steady, floor) = self.decoding((rows, 1), context, Sharing::WhereItPays, None)?;
        Ok(steady.line(format!("decode {rows} x {context}"), rows, floor))
    }

    /// Decoding: `groups` of `n` samples, each group over a prompt of its own.
    pub(super) fn groups(
        &self,
        (groups, n): (usize, usize),
        prompt: usize,
        sharing: Sharing,
        shown: Option<&Shown>,
    ) -> Result<Line, DeviceError> {
        let (steady, floor) = self.decoding((groups, n), prompt, sharing, shown)?;
        let what = names::groups((groups, n), prompt, shown.is_some(), sharing.name());
        Ok(steady.line(what, groups * n, floor))
    }

    /// Decoding as in [`Self::groups`] without anything shared: every sample computes and stores a prompt of its own.
    pub(super) fn alone(&self, n: usize, prompt: usize, shown: Option<&Shown>) -> Result<Line, DeviceError> {
        let (steady, floor) = self.decoding((n, 1), prompt, Sharing::WhereItPays, shown)?;
        Ok(steady.line(names::alone(n, prompt, shown.is_some()), n, floor))
    }

    /// A step of `groups` of `n` samples, and its floor. Prompts differ from their first token on; the picture is the same in
    /// all, and encoded once.
    fn decoding(
        &self,
        (groups, n): (usize, usize),
        prompt: usize,
        sharing: Sharing,
        shown: Option<&Shown>,
    ) -> Result<(Steady, Floor), DeviceError> {
        let (rows, early) = (groups * n, early(groups * prompt));
        let new_tokens = early + STEPS + 2 * WARM;
        let mut engine = self.engine(rows, prompt + new_tokens, sharing, shown)?;
        let first = self.prompt(0, prompt, shown)?;
        for index in 0..groups {
            let prompt = self.prompt_like(&first, index, shown)?;
            let request = Request::new(prompt, n, sampling(index, new_tokens));
            engine.submit(&request).map_err(failed)?;
        }
        let steady = self.steady(&mut engine, rows)?;
        Ok((steady, self.floor(rows, groups * prompt, early)))
    }

    /// Of the step in the middle, after prompts of `prompts` tokens in all.
    fn floor(&self, rows: usize, prompts: usize, early: usize) -> Floor {
        let drawn = early / 2 + WARM + STEPS / 2;
        self.ceiling.decode(self.shape(), rows, prompts + rows * drawn)
    }

    /// Seconds of a step once all rows decode.
    fn steady(&self, engine: &mut DeviceEngine, rows: usize) -> Result<Steady, DeviceError> {
        // The first step of a size warms up, the second is recorded.
        let mut warm = 0;
        while warm < WARM {
            let step = engine.step().map_err(failed)?;
            warm = if step.events.len() == rows { warm + 1 } else { 0 };
            if engine.is_idle() {
                return Err(DeviceError::Input(format!("{rows} rows never decoded together")));
            }
        }
        self.gpu.synchronize()?;
        let (begin, allocations) = (Instant::now(), self.gpu.allocations());
        let on_card = engine.runner().on_card();
        for _ in 0..STEPS {
            let drawn = engine.step().map_err(failed)?.events.len();
            if drawn != rows {
                return Err(DeviceError::Input(format!("a step of {drawn} of {rows} rows")));
            }
        }
        self.gpu.synchronize()?;
        let seconds = begin.elapsed().as_secs_f64() / STEPS as f64;
        let card = (engine.runner().on_card() - on_card).as_secs_f64() / STEPS as f64;
        let more = self.gpu.allocations() - allocations;
        if more > 0 {
            return Err(DeviceError::Input(format!("{more} allocations in {STEPS} warm steps")));
        }
        Ok(Steady {
            seconds,
            host: seconds - card,
        })
    }
}

impl Steady {
    fn line(self, what: String, rows: usize, floor: Floor) -> Line {
        Line::new(what, (rows, "tokens"), self.seconds, floor).with_host(self.host)
    }
}

/// Tokens that the first sequences draw while the prompts of the last, `prompts` tokens in all, are still computed.
fn early(prompts: usize) -> usize {
    prompts.div_ceil(STEP_TOKENS) + 1
}
