//! What a step costs beside the model: scheduling, blocks, keys, drawing from a small vocabulary.
//!
//! `cargo run --example scheduler [PROMPT_TOKENS] [NEW_TOKENS]`
//!
//! Each figure is of the steps in which all samples are decoded, so one block in sixteen steps is taken, identified and
//! remembered for each.

#![allow(clippy::expect_used, reason = "a measurement, not a service")]

use std::{ops::Range, sync::OnceLock, time::Instant};

use flotilla_engine::{
    Engine, Limits, Request, Runner, Sampling,
    blocks::Block,
    runner::{Answers, Cause, Chunk, Logits, NotBegun},
};

const VOCABULARY: usize = 16;

/// Computes nothing.
struct Nothing;

impl Runner for Nothing {
    type Prompt = Vec<u32>;
    type Pool = ();

    fn prompt_ids<'a>(&self, prompt: &'a Vec<u32>) -> &'a [u32] {
        prompt
    }

    fn content(&self, prompt: &Vec<u32>, drawn: &[u32], range: Range<usize>, out: &mut Vec<u8>) -> Result<(), Cause> {
        for index in range {
            let id = prompt.get(index).or_else(|| drawn.get(index - prompt.len()));
            out.extend(id.copied().unwrap_or_default().to_le_bytes());
        }
        Ok(())
    }

    fn pool(&self, _: usize, _: usize) -> Result<(), Cause> {
        Ok(())
    }

    fn copy(&mut self, (): &mut (), _: &[(Block, Block)]) -> Result<(), Cause> {
        Ok(())
    }

    fn step(&mut self, (): &mut (), chunks: &[Chunk<'_, Vec<u32>>]) -> Result<Answers, Cause> {
        let rows = chunks.iter().filter(|chunk| chunk.wanted).count();
        let logits = Logits {
            values: vec![0.0; rows * VOCABULARY],
            vocabulary: VOCABULARY,
        };
        Ok(logits.into())
    }

    fn begin(&mut self, (): &mut (), _: &[Chunk<'_, Vec<u32>>]) -> Result<bool, Cause> {
        Ok(false)
    }

    fn finish(&mut self) -> Result<Answers, Cause> {
        Err(NotBegun.into())
    }

    fn abandon(&mut self) {}

    fn flush(&mut self) {}

    fn lost(&mut self) -> Option<String> {
        None
    }
}

/// Seconds that this thread has computed; the time of the day where the system does not tell.
fn computed() -> f64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let start = START.get_or_init(Instant::now);
    let schedule = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let nanoseconds = schedule.and_then(|text| text.split(' ').next()?.parse::<f64>().ok());
    nanoseconds.map_or_else(|| start.elapsed().as_secs_f64(), |nanoseconds| nanoseconds * 1e-9)
}

/// Microseconds of a step: the median and the slowest in twenty by the clock, the mean by what the processor computed.
fn measure(samples: usize, per_request: usize, prompt_tokens: usize, new_tokens: usize) -> [f64; 3] {
    let limits = Limits {
        max_step_tokens: samples * (prompt_tokens + 1),
        ..Limits::default()
    };
    let mut engine = Engine::new(Nothing, "v0", limits).expect("an engine");
    for request in 0..samples / per_request {
        let prompt = (0..prompt_tokens).map(|i| (i * 7 + request) as u32).collect::<Vec<_>>();
        let sampling = Sampling {
            max_tokens: new_tokens,
            seed: request as u64,
            ..Sampling::default()
        };
        engine
            .submit(&Request::new(prompt, per_request, sampling))
            .expect("submits");
    }
    engine.step().expect("steps");
    let mut seconds = Vec::with_capacity(new_tokens);
    let before = computed();
    while engine.running() == samples {
        let start = Instant::now();
        engine.step().expect("steps");
        seconds.push(start.elapsed().as_secs_f64());
    }
    let mean = (computed() - before) / seconds.len() as f64;
    // The last step ends all samples.
    seconds.pop();
    seconds.sort_by(f64::total_cmp);
    let at = |share: f64| seconds[(seconds.len() as f64 * share) as usize] * 1e6;
    let mean = mean * 1e6;
    [at(0.5), mean, at(0.95)]
}

fn main() {
    let argument = |index: usize, default: usize| {
        let text = std::env::args().nth(index);
        text.map_or(default, |text| text.parse().expect("a number"))
    };
    let (prompt_tokens, new_tokens) = (argument(1, 512), argument(2, 400));
    println!("prompts of {prompt_tokens} tokens, {new_tokens} new ones");
    println!(
        "{:<36} {:>12} {:>12} {:>16}",
        "SAMPLES", "MEDIAN", "MEAN", "19 OF 20 BELOW"
    );
    for (samples, per_request) in [(1, 1), (32, 1), (256, 1), (32, 8), (256, 8)] {
        let [median, mean, slow] = measure(samples, per_request, prompt_tokens, new_tokens);
        let what = format!("{samples} samples, {per_request} a request");
        println!("{what:<36} {median:>9.1} us {mean:>9.1} us {slow:>13.1} us");
    }
}
