//! The engine over tiny checkpoints of both families, with pictures.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::path::PathBuf;

use flotilla_engine::{Engine, Group, Limits, Prompt, Request, Sampling, VlmRunner, engine_for, generate};
use flotilla_model::{LoadOptions, Medium, Message, Pass, Picture, Processor, Row, TextBatch, Vlm};

const FAMILIES: [&str; 2] = ["tiny-qwen2.5-vl", "tiny-llava-onevision"];

/// A checkpoint and what turns messages into its prompts.
struct Checkpoint {
    model: Vlm,
    processor: Processor,
}

impl Checkpoint {
    fn load(name: &str) -> Self {
        let fixtures = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/fixtures");
        let options = LoadOptions::default();
        Self {
            model: Vlm::load(&fixtures.join(name), &options).expect("a model"),
            processor: Processor::load(&fixtures.join(name)).expect("a processor"),
        }
    }

    fn prepare(&self, pictures: &[usize], text: &str) -> flotilla_model::Prompt {
        let message = Message::user(pictures.len(), text);
        let media = pictures.iter().map(|seed| Medium::Picture(picture(*seed)));
        let prepared = self.processor.prepare(&[message], &media.collect::<Vec<_>>(), 4096);
        prepared.expect("a prompt")
    }

    fn request(&self, pictures: &[usize], text: &str, n: usize) -> Request<Prompt> {
        let sampling = Sampling {
            max_tokens: 8,
            temperature: 0.0,
            ..Sampling::default()
        };
        Request::new(Prompt::from(self.prepare(pictures, text)), n, sampling)
    }

    fn run(&self, requests: &[Request<Prompt>], limits: Limits) -> Vec<Group> {
        generate(VlmRunner::new(&self.model, &limits), requests, limits, &|| false).expect("generates")
    }

    fn engine(&self, requests: &[Request<Prompt>], limits: Limits) -> Engine<VlmRunner<&Vlm>> {
        let runner = VlmRunner::new(&self.model, &limits);
        engine_for(runner, "v0", requests, limits).expect("an engine")
    }

    /// The most likely tokens by whole forward passes over the row as it grows.
    fn greedy(&self, pictures: &[usize], text: &str, tokens: usize) -> Vec<u32> {
        let prompt = self.prepare(pictures, text);
        let features = self
            .model
            .encode(&prompt.visuals.iter().collect::<Vec<_>>(), Pass::Infer);
        let mut row = prompt.row(&features.expect("features")).expect("a row");
        let first = row.ids.len();
        while row.ids.len() < first + tokens {
            row = row.followed_by(&[self.next(&row)]);
        }
        row.ids[first..].to_vec()
    }

    fn next(&self, row: &Row) -> u32 {
        let batch = TextBatch::new(std::slice::from_ref(row)).expect("a batch");
        let hidden = self.model.forward(&batch, Pass::Infer).expect("states");
        let last = hidden.narrow(1, row.ids.len() - 1, 1).expect("the last state");
        let logits = self.model.logits(&last, Pass::Infer).expect("logits");
        let id = logits.flatten_all().and_then(|logits| logits.argmax(0));
        id.and_then(|id| id.to_scalar()).expect("an id")
    }
}

fn picture(seed: usize) -> Picture {
    let (width, height) = (90, 60);
    Picture {
        width,
        height,
        rgb: (0..width * height * 3).map(|i| (i * (31 + seed) % 256) as u8).collect(),
    }
}

fn ids(groups: &[Group]) -> Vec<Vec<u32>> {
    let completions = groups.iter().flat_map(|group| &group.completions);
    completions.map(flotilla_engine::Completion::ids).collect()
}

/// Runs all requests to their end.
fn drain(engine: &mut Engine<VlmRunner<&Vlm>>) {
    while !engine.is_idle() {
        engine.step().expect("steps");
    }
}

#[test]
fn tokens_are_those_of_whole_forward_passes() {
    for family in FAMILIES {
        let checkpoint = Checkpoint::load(family);
        let cases: [(&[usize], &str); 3] = [(&[1], "What is it?"), (&[], "Say it."), (&[1, 2], "Compare them.")];
        let requests: Vec<_> = cases
            .iter()
            .map(|(pictures, text)| checkpoint.request(pictures, text, 1))
            .collect();
        let found = ids(&checkpoint.run(&requests, Limits::default()));
        for ((pictures, text), found) in cases.iter().zip(found) {
            assert_eq!(found, checkpoint.greedy(pictures, text, 8), "{family}: {text}");
        }
    }
}

#[test]
fn chunks_that_cut_pictures_give_the_same_tokens_in_hardly_enough_blocks() {
    for family in FAMILIES {
        let checkpoint = Checkpoint::load(family);
        let requests = [
            checkpoint.request(&[1], "What is it?", 3),
            checkpoint.request(&[1, 2], "Compare them.", 1),
            checkpoint.request(&[3], "And this?", 2),
        ];
        let expected = ids(&checkpoint.run(&requests, Limits::default()));
        let longest = requests.iter().map(|request| request.prompt.row.ids.len()).max();
        let cramped = Limits {
            max_step_tokens: 7,
            kv_blocks: (longest.expect("three") + 8).div_ceil(4) + 1,
            block_size: 4,
            feature_bytes: 0,
            ..Limits::default()
        };
        assert_eq!(ids(&checkpoint.run(&requests, cramped)), expected, "{family}");
    }
}

#[test]
fn a_group_that_is_too_large_for_the_pool_draws_the_same_tokens() {
    for family in FAMILIES {
        let checkpoint = Checkpoint::load(family);
        let request = checkpoint.request(&[1], "What is it?", 6);
        let expected = ids(&checkpoint.run(std::slice::from_ref(&request), Limits::default()));
        let cramped = Limits {
            kv_blocks: (request.prompt.row.ids.len() + 8).div_ceil(4) + 3,
            block_size: 4,
            ..Limits::default()
        };
        let mut engine = checkpoint.engine(std::slice::from_ref(&request), cramped);
        engine.submit(&request).expect("submits");
        let mut found = vec![Vec::new(); 6];
        while !engine.is_idle() {
            for event in engine.step().expect("steps").events {
                found[event.sample].push(event.token.id);
            }
        }
        assert!(engine.stats().preemptions.get() > 0, "{family}: not all fit");
        assert_eq!(found, expected, "{family}");
    }
}

#[test]
fn log_probabilities_of_a_prompt_in_chunks_are_those_of_the_whole_prompt() {
    for family in FAMILIES {
        let checkpoint = Checkpoint::load(family);
        let requests = [checkpoint.request(&[1, 2], "Compare them.", 1)];
        let whole = checkpoint.run(&requests, Limits::default());
        let chunks = Limits {
            max_step_tokens: 5,
            ..Limits::default()
        };
        let chunked = checkpoint.run(&requests, chunks);
        let pairs = whole[0].completions[0]
            .tokens
            .iter()
            .zip(&chunked[0].completions[0].tokens);
        for (a, b) in pairs {
            assert!(
                (a.log_probability - b.log_probability).abs() < 1e-4,
                "{family}: {a:?} {b:?}"
            );
        }
    }
}

#[test]
fn a_picture_is_encoded_once_however_many_requests_show_it() {
    for family in FAMILIES {
        let checkpoint = Checkpoint::load(family);
        let limits = Limits::default();
        let requests: Vec<_> = (0..4)
            .map(|i| checkpoint.request(&[1], &format!("Question {i}?"), 2))
            .collect();
        let mut engine = checkpoint.engine(&requests, limits);
        for request in &requests {
            engine.submit(request).expect("submits");
        }
        drain(&mut engine);
        let stats = engine.stats();
        assert_eq!(
            stats.visual_queries.get() - stats.visual_hits.get(),
            1,
            "{family}: one picture, one pass"
        );
        let prompts: Vec<_> = requests.iter().map(|request| request.prompt.row.ids.len()).collect();
        let computed = usize::try_from(stats.prefill_tokens.get()).expect("small");
        assert!(
            computed < prompts[0] + 3 * 40,
            "{family}: {computed} tokens were computed for prompts of {prompts:?}"
        );
    }
}

#[test]
fn pictures_that_differ_share_no_prefix() {
    for family in FAMILIES {
        let checkpoint = Checkpoint::load(family);
        let requests = [
            checkpoint.request(&[1], "What is it?", 1),
            checkpoint.request(&[2], "What is it?", 1),
        ];
        let together = ids(&checkpoint.run(&requests, Limits::default()));
        for (request, together) in requests.iter().zip(together) {
            let alone = ids(&checkpoint.run(std::slice::from_ref(request), Limits::default()));
            assert_eq!(alone[0], together, "{family}");
        }
    }
}
