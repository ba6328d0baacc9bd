//! What one token costs in the sampler, with a vocabulary as large as Qwen's: `cargo run --example sampling`.
//! `FIRST` is what the first tokens of 128 samples of a request cost together, in milliseconds.

#![allow(clippy::expect_used, clippy::print_stdout, reason = "a program for people")]

use std::{sync::Arc, time::Instant};

use flotilla_engine::{Recipe, Sampling, sequence::Sequence, shared::SharedLogits};
use rand::{Rng, SeedableRng, rngs::StdRng};

const VOCABULARY: usize = 152_064;
const ROWS: usize = 16;
const TOKENS: usize = 400;
const SAMPLES: usize = 128;

fn main() {
    let mut random = StdRng::seed_from_u64(0);
    // Sums of uniform numbers: a bell of standard deviation 2, as logits of language models have about.
    let mut logit = || (0..12).map(|_| random.random_range(-1.0f32..1.0)).sum::<f32>();
    let rows: Vec<Vec<f32>> = (0..ROWS).map(|_| (0..VOCABULARY).map(|_| logit()).collect()).collect();
    let prompt: Vec<u32> = (0..2000).map(|i| i * 37).collect();
    let plain = || Sampling {
        max_tokens: usize::MAX,
        ..Sampling::default()
    };
    let cases = [
        ("temperature 1", plain()),
        (
            "temperature 0.7",
            Sampling {
                temperature: 0.7,
                ..plain()
            },
        ),
        (
            "temperature 0",
            Sampling {
                temperature: 0.0,
                ..plain()
            },
        ),
        ("top_p 0.95", Sampling { top_p: 0.95, ..plain() }),
        ("top_k 50", Sampling { top_k: 50, ..plain() }),
        (
            "top_k 20, top_p 0.8",
            Sampling {
                top_k: 20,
                top_p: 0.8,
                ..plain()
            },
        ),
        ("min_p 0.05", Sampling { min_p: 0.05, ..plain() }),
        (
            "repetition penalty 1.05",
            Sampling {
                repetition_penalty: 1.05,
                ..plain()
            },
        ),
        (
            "20 top tokens",
            Sampling {
                top_log_probabilities: 20,
                ..plain()
            },
        ),
    ];
    println!("{VOCABULARY} tokens in the vocabulary, microseconds for one token, milliseconds for first ones:");
    println!("{:>8} {:>8}", "ONE", "FIRST");
    for (name, sampling) in cases {
        let recipe = Recipe::new(&sampling, None, 1, &prompt).expect("valid");
        let mut sequence = Sequence::new(0, 0, Arc::new(recipe));
        let begun = Instant::now();
        for row in rows.iter().cycle().take(TOKENS) {
            sequence.extend(row).expect("draws");
        }
        let one = begun.elapsed().as_secs_f64() * 1e6 / TOKENS as f64;
        let recipe = Arc::new(Recipe::new(&sampling, None, SAMPLES, &prompt).expect("valid"));
        let begun = Instant::now();
        let shared = SharedLogits::new(&rows[0]);
        for sample in 0..SAMPLES {
            let mut sequence = Sequence::new(0, sample, recipe.clone());
            sequence.extend_shared(&shared).expect("draws");
        }
        let first = begun.elapsed().as_secs_f64() * 1e3;
        println!("{one:>8.0} {first:>8.2}  {name}");
    }
}
