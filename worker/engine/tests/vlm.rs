//! The loop over a real, tiny, random Qwen2.5-VL on the CPU.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{path::Path, sync::Arc};

use candle_core::{D, Tensor};
use candle_nn::ops::log_softmax;
use flotilla_engine::{Group, Limits, Prompt, Request, Sampling, VlmRunner, generate};
use flotilla_model::{Config, Layout, LoadOptions, Pass, Row, TextBatch, Visual, Vlm};

fn model() -> Vlm {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../manifests/samples/critic-digits/base");
    let config = Config::load(&base).expect("a config");
    Vlm::random(config, 7, &LoadOptions::default()).expect("a model")
}

fn request(ids: &[u32], n: usize, seed: u64, temperature: f32) -> Request<Prompt> {
    let sampling = Sampling {
        max_tokens: 12,
        seed,
        temperature,
        stop_ids: vec![3],
        ..Sampling::default()
    };
    Request::new(Prompt::from(Row::text(ids.to_vec())), n, sampling)
}

fn run(model: &Vlm, requests: &[Request<Prompt>], limits: Limits) -> Vec<Group> {
    generate(VlmRunner::new(model, &limits), requests, limits, &|| false).expect("generates")
}

#[test]
fn a_sample_has_the_same_tokens_alone_and_in_a_crowd() {
    let model = model();
    let requests: Vec<_> = (0..9u32)
        .map(|i| {
            request(
                &(10..14 + 3 * i).collect::<Vec<_>>(),
                1 + i as usize % 3,
                u64::from(i),
                1.0,
            )
        })
        .collect();
    let small = Limits {
        max_rows: 4,
        ..Limits::default()
    };
    let crowd = run(&model, &requests, Limits::default());
    let crowded_out = run(&model, &requests, small);
    for ((request, group), other) in requests.iter().zip(&crowd).zip(&crowded_out) {
        let alone = run(&model, std::slice::from_ref(request), Limits::default());
        for ((a, b), c) in alone[0]
            .completions
            .iter()
            .zip(&group.completions)
            .zip(&other.completions)
        {
            assert_eq!(a.ids(), b.ids());
            assert_eq!(a.ids(), c.ids());
            for (x, y) in a.log_probabilities().iter().zip(b.log_probabilities()) {
                // Only the order of summation of the matrix products may differ.
                assert!((x - y).abs() < 1e-4, "{x} {y}");
            }
        }
    }
}

#[test]
fn log_probabilities_are_those_of_a_forward_over_prompt_and_completion() {
    let model = model();
    let temperature = 0.7;
    let request = request(&[20, 30, 40, 50], 3, 5, temperature);
    let groups = run(&model, std::slice::from_ref(&request), Limits::default());
    for completion in &groups[0].completions {
        let row = request.prompt.row.followed_by(&completion.ids());
        let batch = TextBatch::new(&[row]).expect("a batch");
        let hidden = model.forward(&batch, Pass::Infer).expect("hidden states");
        let logits = (model.logits(&hidden, Pass::Infer).expect("logits") / f64::from(temperature)).expect("scales");
        let all: Vec<Vec<f32>> = log_softmax(&logits, D::Minus1)
            .and_then(|all| all.squeeze(0))
            .and_then(|all| all.to_vec2())
            .expect("log-probabilities");
        for (index, token) in completion.tokens.iter().enumerate() {
            let expected = all[4 + index - 1][token.id as usize];
            assert!((token.log_probability - expected).abs() < 1e-4, "{token:?} {expected}");
        }
    }
}

#[test]
fn pixels_and_features_of_an_image_give_the_same_tokens() {
    let model = model();
    let grid = [1, 4, 4];
    let values = 16 * 3 * 2 * 14 * 14;
    let image = Visual {
        values: (0..values).map(|i| ((i * 37 % 101) as f32) / 50.0 - 1.0).collect(),
        layout: Layout::Patches {
            grid,
            time_step: 0.0,
            video: false,
        },
    };
    let features: Vec<Tensor> = model.encode(&[&image], Pass::Infer).expect("features");
    let tokens = features[0].dim(0).expect("tokens");
    let pad = model.config().image_token_id;
    let mut ids = vec![5];
    ids.extend(std::iter::repeat_n(pad, tokens));
    ids.push(6);
    let pixels = Prompt::new(Row::text(ids), vec![(1, image)]);
    let mut row = pixels.row.clone();
    row.features.push((1, features[0].clone()));
    let ids_of = |prompt: Prompt| {
        let request = Request {
            prompt: Arc::new(prompt),
            ..request(&[1], 2, 9, 1.0)
        };
        let groups = run(&model, &[request], Limits::default());
        groups[0]
            .completions
            .iter()
            .map(flotilla_engine::Completion::ids)
            .collect::<Vec<_>>()
    };
    let blind = ids_of(Row::text(pixels.row.ids.clone()).into());
    let seen = ids_of(pixels);
    assert_eq!(seen, ids_of(row.into()));
    assert_ne!(seen, blind, "the image matters");
}
