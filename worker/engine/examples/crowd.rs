//! In how many samples a crowd changes tokens: each request alone, then all of them together, over tiny models.
//!
//! `cargo run --example crowd [REQUESTS] [NEW_TOKENS]`
//!
//! In exact arithmetic it would be none. Matrix products sum in another order for other numbers of rows, and where two tokens
//! are nearly as likely (or the drawn number falls on the border between them) that decides.

#![allow(clippy::expect_used, reason = "a measurement, not a service")]

use std::path::Path;

use flotilla_engine::{Completion, Limits, Prompt, Request, Sampling, VlmRunner, generate};
use flotilla_model::{Config, LoadOptions, Row, Vlm};

fn requests(vocabulary: usize, count: usize, new_tokens: usize, temperature: f32) -> Vec<Request<Prompt>> {
    let request = |index: usize| {
        let length = 8 + index * 13 % 50;
        let ids = (0..length).map(|i| ((i * 37 + index * 11 + 5) % vocabulary) as u32);
        let sampling = Sampling {
            max_tokens: new_tokens,
            temperature,
            seed: index as u64,
            ..Sampling::default()
        };
        Request::new(Prompt::from(Row::text(ids.collect())), 2, sampling)
    };
    (0..count).map(request).collect()
}

fn completions(model: &Vlm, requests: &[Request<Prompt>]) -> Vec<Completion> {
    let limits = Limits::default();
    let groups = generate(VlmRunner::new(model, &limits), requests, limits, &|| false).expect("generates");
    groups.into_iter().flat_map(|group| group.completions).collect()
}

fn measure(name: &str, model: &Vlm, count: usize, new_tokens: usize) {
    for temperature in [0.0, 1.0] {
        let requests = requests(model.config().text.vocab_size, count, new_tokens, temperature);
        let together = completions(model, &requests);
        let again = completions(model, &requests);
        let alone = requests
            .iter()
            .flat_map(|request| completions(model, std::slice::from_ref(request)));
        let alone = alone.collect::<Vec<_>>();
        let differ = |a: &[Completion], b: &[Completion]| a.iter().zip(b).filter(|(a, b)| a.ids() != b.ids()).count();
        let mut largest = 0f32;
        for (a, b) in alone.iter().zip(&together).filter(|(a, b)| a.ids() == b.ids()) {
            for (a, b) in a.log_probabilities().iter().zip(b.log_probabilities()) {
                largest = largest.max((a - b).abs());
            }
        }
        println!(
            "{name:<24} temperature {temperature}: {} of {} samples of {new_tokens} tokens differ alone and in the crowd, \
             {} between two crowds; log-probabilities of the others differ by {largest:.1e} at most",
            differ(&alone, &together),
            together.len(),
            differ(&together, &again),
        );
    }
}

fn main() {
    let argument = |index: usize, default: usize| {
        let text = std::env::args().nth(index);
        text.map_or(default, |text| text.parse().expect("a number"))
    };
    let (count, new_tokens) = (argument(1, 128), argument(2, 64));
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let digits = Config::load(&root.join("manifests/samples/critic-digits/base")).expect("a config");
    let digits = Vlm::random(digits, 7, &LoadOptions::default()).expect("a model");
    measure("critic-digits (random)", &digits, count, new_tokens);
    for family in ["tiny-qwen2.5-vl", "tiny-llava-onevision"] {
        let fixture = root.join("tests/parity/fixtures").join(family);
        let model = Vlm::load(&fixture, &LoadOptions::default()).expect("a model");
        measure(family, &model, count, new_tokens);
    }
}
