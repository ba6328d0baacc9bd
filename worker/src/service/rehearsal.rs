//! The first steps of a model on a GPU, before anybody asks.
//!
//! A kernel is compiled when it is launched first, and the way of a product is chosen when its size comes first: the first
//! requests of a new server waited for seconds (docs/experiments.md). A rehearsal is computed by an engine of its own: kernels
//! and choices stay, keys, values and features do not.

use std::time::Instant;

use flotilla_engine::{Engine, EngineError, Limits, Prompt, Request, Sampling};
use flotilla_model::{Medium, Message, ModelError, Picture, Processor};

use super::BASE_VERSION;
use crate::{error::WorkerError, runner::ModelRunner};

/// Samples that are decoded at once: with more, the library's products alone do the work.
const ROWS: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 96, 128];
/// Tokens of the prompt of each of them.
const SHORT: usize = 24;
/// Tokens of prompts that are computed alone, as far as they fit.
const LONG: [usize; 3] = [300, 1000, 2000];
/// Tokens of a prompt whose samples read it together, and how many there are.
const SHARED: (usize, usize) = (656, 64);
/// Tokens of every answer.
const DRAWN: usize = 6;
/// What prompts are made of.
const TEXT: &str =
    "Seven ships sail on the sea, and the harbour master counts what they carry before any of them may leave again.";
/// Steps that one wave may take where few tokens fit into one.
const STEPS: usize = 64;
/// Pixels of the picture.
const PICTURE: (usize, usize) = (112, 84);

/// Requests that are computed together.
type Wave = Vec<Request<Prompt>>;

/// Computes what the first requests will want: as many samples at once as come, prompts of several lengths, alone and behind what
/// is stored, a prompt that samples share, draws of every kind, a picture.
///
/// A request whose numbers are not finite is no reason to serve nobody: it is logged, as one that a client sends.
///
/// # Errors
/// A step failed, as the first one of a request would have.
pub fn rehearse(
    runner: &mut ModelRunner,
    processor: &Processor,
    limits: Limits,
    max_tokens: usize,
) -> Result<(), WorkerError> {
    let begun = Instant::now();
    if limits.kv_blocks < 2 {
        return Ok(());
    }
    // Other GPUs of a group tell pools apart by their size, and this one from that which is served with.
    let limits = Limits {
        kv_blocks: limits.kv_blocks - 1,
        ..limits
    };
    let waves = waves(processor, &limits, max_tokens)
        .map_err(|error| WorkerError::permanent("failed to make a prompt of the model's tokenizer", error))?;
    let failed = |error: EngineError| WorkerError::retryable("the model's first steps failed", error);
    let kv_blocks = waves
        .iter()
        .map(|wave| limits.fit(wave.iter().map(size)).kv_blocks)
        .max();
    let limits = Limits {
        kv_blocks: kv_blocks.unwrap_or(1),
        ..limits
    };
    let mut engine = Engine::new(runner, BASE_VERSION, limits).map_err(failed)?;
    let mut failures = Vec::new();
    for wave in &waves {
        for request in wave {
            engine.submit(request).map_err(failed)?;
        }
        while !engine.is_idle() {
            failures.extend(engine.step().map_err(failed)?.failures);
        }
    }
    engine.forget().map_err(failed)?;
    if let Some((_, error)) = failures.first() {
        tracing::warn!(requests = failures.len(), "first steps failed: {error}");
    }
    let seconds = begun.elapsed().as_secs_f64();
    tracing::info!("computed first steps, for which kernels were compiled or read, in {seconds:.1} s");
    Ok(())
}

/// Samples, tokens of the prompt and tokens of an answer.
fn size(request: &Request<Prompt>) -> (usize, usize, usize) {
    (request.n, request.prompt.row.ids.len(), request.sampling.max_tokens)
}

/// What is computed, in this order: nothing that the limits refuse.
fn waves(processor: &Processor, limits: &Limits, max_tokens: usize) -> Result<Vec<Wave>, ModelError> {
    let Some(room) = max_tokens.checked_sub(DRAWN).filter(|room| *room > 0) else {
        return Ok(Vec::new());
    };
    let words = processor.tokenizer().encode(TEXT)?;
    let prompt = |tokens: usize, number: usize| -> Result<Prompt, ModelError> {
        // No two numbers begin alike.
        let first = words.iter().cycle().skip(number / words.len()).take(1);
        let ids = first.chain(words.iter().cycle().skip(number)).take(tokens.min(room));
        Ok(processor.arrange(ids.copied().collect(), Vec::new())?.into())
    };
    let likeliest = Sampling {
        temperature: 0.0,
        max_tokens: DRAWN,
        ..Sampling::default()
    };
    let drawn = Sampling {
        temperature: 1.0,
        top_k: 50,
        top_p: 0.95,
        min_p: 0.01,
        ..likeliest.clone()
    };
    let watched = Sampling {
        watched_ids: words.iter().take(2).copied().collect(),
        ..likeliest.clone()
    };
    let listed = Sampling {
        top_log_probabilities: 2,
        ..likeliest.clone()
    };

    let mut waves = Vec::new();
    for rows in ROWS.into_iter().filter(|rows| *rows <= limits.max_rows) {
        let sampling = |number: usize| if number.is_multiple_of(2) { &likeliest } else { &drawn };
        let wave = (0..rows).map(|number| Ok(Request::new(prompt(SHORT, number)?, 1, sampling(number).clone())));
        waves.push(wave.collect::<Result<Wave, ModelError>>()?);
    }
    for tokens in LONG.into_iter().filter(|tokens| *tokens <= room) {
        // The second finds the first one's keys and values.
        for sampling in [&likeliest, &drawn] {
            waves.push(vec![Request::new(prompt(tokens, tokens)?, 1, sampling.clone())]);
        }
    }
    let (tokens, samples) = SHARED;
    waves.push(vec![Request::new(
        prompt(tokens, 0)?,
        samples.min(limits.max_rows),
        drawn,
    )]);
    for sampling in [watched, listed] {
        waves.push(vec![Request::new(prompt(SHORT, 0)?, 1, sampling)]);
    }
    let (width, height) = PICTURE;
    let picture = Picture {
        width,
        height,
        rgb: vec![128; 3 * width * height],
    };
    // A model may have no pictures, or no room for one.
    if let Ok(prompt) = processor.prepare(&[Message::user(1, TEXT)], &[Medium::Picture(picture)], room) {
        waves.push(vec![Request::new(Prompt::from(prompt), 1, likeliest)]);
    }
    let fits = |request: &Request<Prompt>| {
        let (_, prompt, new) = size(request);
        limits.blocks_of(prompt, new) <= limits.kv_blocks
    };
    let steps = |wave: &Wave| wave.iter().map(|request| size(request).1).sum::<usize>() / limits.max_step_tokens;
    waves.retain(|wave: &Wave| wave.iter().all(fits) && steps(wave) <= STEPS);
    Ok(waves)
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, path::Path};

    use super::*;
    use crate::{device::Wanted, runner::default_dtype};

    fn model(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/parity/fixtures")
            .join(name)
    }

    fn processor(name: &str) -> Processor {
        Processor::load(&model(name)).expect("a processor")
    }

    #[test]
    fn as_many_prompts_at_once_as_a_step_has_rows_and_no_two_of_them_share_a_block() {
        for name in ["tiny-qwen2.5-vl", "tiny-llava-onevision"] {
            let limits = Limits::default();
            let waves = waves(&processor(name), &limits, 4096).expect("waves");
            for (rows, wave) in ROWS.into_iter().zip(&waves) {
                let begins = wave.iter().map(|request| &request.prompt.row.ids[..limits.block_size]);
                assert_eq!(begins.collect::<HashSet<_>>().len(), rows);
            }
            assert!(waves.iter().flatten().any(|request| !request.prompt.visuals.is_empty()));
        }
    }

    #[test]
    fn what_the_limits_refuse_is_left_out() {
        let processor = processor("tiny-qwen2.5-vl");
        let narrow = Limits {
            max_step_tokens: 1,
            ..Limits::default()
        };
        let short = waves(&processor, &narrow, 4096).expect("waves");
        assert!(short.iter().flatten().all(|request| size(request).1 <= STEPS));
        for (max_rows, kv_blocks, max_tokens) in
            [(1, 1, 16), (3, 2, 8), (256, 40, 4096), (8, 1 << 16, 20), (8, 8, DRAWN)]
        {
            let limits = Limits {
                max_rows,
                kv_blocks,
                ..Limits::default()
            };
            for request in waves(&processor, &limits, max_tokens).expect("waves").iter().flatten() {
                let (samples, prompt, new) = size(request);
                assert!(samples <= max_rows && prompt + new <= max_tokens, "{prompt} + {new}");
                assert!(limits.blocks_of(prompt, new) <= kv_blocks, "{prompt} + {new}");
            }
        }
    }

    #[test]
    fn a_rehearsal_ends_well_within_narrow_limits() {
        let name = model("tiny-qwen2.5-vl");
        let limits = Limits {
            max_rows: 3,
            kv_blocks: 6,
            ..Limits::default()
        };
        let opened = Wanted::Cpu.open().expect("the CPU");
        let dtype = default_dtype(opened.place);
        let mut runner = ModelRunner::read(&name, None, dtype, &opened, &limits, 64, None).expect("a model");
        rehearse(&mut runner, &processor("tiny-qwen2.5-vl"), limits, 64).expect("computed");
    }
}
