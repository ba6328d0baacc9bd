//! How much faster the engine is on many requests than on one after the other, and what a shared prompt saves.

use std::time::Instant;

use flotilla_engine::{EngineError, Limits, Prompt, Request, Sampling, VlmRunner, engine_for};
use flotilla_model::{Row, Vlm};
use serde_json::{Value, json};

/// Requests that the engine works on at once.
const AT_ONCE: [usize; 4] = [1, 8, 32, 128];
/// Samples of the group that shares one prompt.
const GROUP: usize = 128;
/// Requests that are run one after the other to know how fast that is.
const ONE_BY_ONE: usize = 4;

/// One measurement.
#[derive(Debug)]
pub struct Throughput {
    what: String,
    /// Drawn tokens per second, prompts included in the time.
    tokens_per_second: f64,
    /// Prompt tokens that went through the model.
    prompt_tokens: u64,
    seconds: f64,
}

/// Runs requests of `prompt_tokens` tokens that have nothing in common, and a group over one such prompt, to `new_tokens`
/// tokens each. The first line is one request after the other.
pub fn measure(model: &Vlm, prompt_tokens: usize, new_tokens: usize) -> Result<Vec<Throughput>, EngineError> {
    let request = |index: usize, n: usize| {
        let vocabulary = model.config().text.vocab_size;
        let id = |i: usize| ((i * 7919 + 13 + index * 101) % vocabulary) as u32;
        let sampling = Sampling {
            max_tokens: new_tokens,
            seed: index as u64,
            ..Sampling::default()
        };
        let row = Row::text((0..prompt_tokens).map(id).collect());
        Request::new(Prompt::from(row), n, sampling)
    };
    // Once without counting: the memory is touched.
    run(model, &[request(0, 1)])?;
    let mut alone = Throughput {
        what: format!("{ONE_BY_ONE} requests, one after the other"),
        tokens_per_second: 0.0,
        prompt_tokens: 0,
        seconds: 0.0,
    };
    for index in 0..ONE_BY_ONE {
        let (seconds, computed) = run(model, &[request(index, 1)])?;
        alone.seconds += seconds;
        alone.prompt_tokens += computed;
    }
    alone.tokens_per_second = (ONE_BY_ONE * new_tokens) as f64 / alone.seconds;
    let mut lines = vec![alone];
    let together = AT_ONCE.map(|count| {
        (
            format!("{count} at once"),
            (0..count).map(|index| request(index, 1)).collect(),
        )
    });
    let group = (format!("{GROUP} samples of one prompt"), vec![request(0, GROUP)]);
    for (what, requests) in together.into_iter().chain([group]) {
        let requests: Vec<_> = requests;
        let samples = requests.iter().map(|request| request.n).sum::<usize>();
        let (seconds, prompt_tokens) = run(model, &requests)?;
        lines.push(Throughput {
            what,
            tokens_per_second: (samples * new_tokens) as f64 / seconds,
            prompt_tokens,
            seconds,
        });
    }
    Ok(lines)
}

/// Seconds, and prompt tokens that went through the model.
fn run(model: &Vlm, requests: &[Request<Prompt>]) -> Result<(f64, u64), EngineError> {
    let limits = Limits::default();
    let start = Instant::now();
    let mut engine = engine_for(VlmRunner::new(model, &limits), "", requests, limits)?;
    for request in requests {
        engine.submit(request)?;
    }
    while !engine.is_idle() {
        if let Some((_, error)) = engine.step()?.failures.into_iter().next() {
            return Err(error);
        }
    }
    Ok((start.elapsed().as_secs_f64(), engine.stats().prefill_tokens.get()))
}

/// Times faster than one request after the other.
fn ratio(line: &Throughput, lines: &[Throughput]) -> f64 {
    lines
        .first()
        .map_or(1.0, |alone| line.tokens_per_second / alone.tokens_per_second)
}

/// The measurements as JSON.
pub fn document(lines: &[Throughput]) -> Value {
    let line = |line: &Throughput| {
        json!({
            "what": line.what, "tokens_per_second": line.tokens_per_second, "seconds": line.seconds,
            "prompt_tokens_computed": line.prompt_tokens, "ratio": ratio(line, lines),
        })
    };
    lines.iter().map(line).collect()
}

/// Prints the measurements as a table.
pub fn print(lines: &[Throughput]) {
    println!(
        "\n{:<38} {:>12} {:>9} {:>10} {:>16}",
        "ENGINE", "TOKENS/S", "RATIO", "SECONDS", "PROMPT TOKENS"
    );
    for line in lines {
        println!(
            "{:<38} {:>12.1} {:>9.2} {:>10.3} {:>16}",
            line.what,
            line.tokens_per_second,
            ratio(line, lines),
            line.seconds,
            line.prompt_tokens
        );
    }
}
