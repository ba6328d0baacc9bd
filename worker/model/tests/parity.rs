//! The model against `transformers`: fixtures/ holds what `parity/make_fixtures.py` computed there.
//!
//! Weights, pixels and pictures come from a formula that both sides repeat; the files hold results only.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail as tests do")]

use std::{collections::HashMap, path::PathBuf};

use candle_core::{DType, Device, Tensor};
use flotilla_model::{
    Config, LoadOptions, Pass, Picture, ProcessedImage, Qwen25Vl, Row, TextBatch,
    ops::Kernels,
    qwen2_5_vl::positions::{VisualSpan, positions},
};
use serde_json::{Value, json};

/// Largest difference of a logit in f32.
const LOGITS: f32 = 1e-4;
/// Largest relative difference of a gradient in f32.
const GRADIENTS: f64 = 1e-3;
/// Positions between two slices of the video: one second per slice, two positions per second.
const TIME_STEP: f64 = 2.0;

struct Fixtures {
    tensors: HashMap<String, Tensor>,
    document: Value,
}

fn fixtures() -> Fixtures {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/parity/fixtures");
    let document = std::fs::read(dir.join("qwen2_5_vl.json")).unwrap();
    Fixtures {
        tensors: candle_core::safetensors::load(dir.join("qwen2_5_vl.safetensors"), &Device::Cpu).unwrap(),
        document: serde_json::from_slice(&document).unwrap(),
    }
}

/// Numbers in [-0.5, 0.5), multiples of 2^-24, from a hash of the name and the index.
fn draw(name: &str, count: usize) -> Vec<f32> {
    let seed = name.bytes().fold(0x811C_9DC5u32, |seed, byte| {
        (seed ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    let number = |i: usize| {
        let mut x = (i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed);
        x = (x ^ (x >> 16)).wrapping_mul(0x85EB_CA6B);
        x = (x ^ (x >> 13)).wrapping_mul(0xC2B2_AE35);
        x ^= x >> 16;
        (f64::from(x >> 8) / f64::from(1 << 24) - 0.5) as f32
    };
    (0..count).map(number).collect()
}

fn parameter(name: &str, shape: &[usize]) -> Vec<f32> {
    let mut values = draw(name, shape.iter().product());
    if shape.len() == 1 {
        let base = if name.ends_with("weight") { 1.0 } else { 0.0 };
        values.iter_mut().for_each(|v| *v = *v * 0.5 + base);
        return values;
    }
    let fan_in = shape[1..].iter().product::<usize>() as f64;
    let scale = (3.4 / fan_in.sqrt()).log2().round_ties_even().exp2() as f32;
    values.iter_mut().for_each(|v| *v *= scale);
    values
}

impl Fixtures {
    fn model(&self) -> Qwen25Vl {
        let mut config = self.document["text"].clone();
        config["vision_config"] = self.document["vision"].clone();
        for key in ["image_token_id", "video_token_id", "vision_start_token_id"] {
            config[key] = self.document[key].clone();
        }
        config["tie_word_embeddings"] = json!(false);
        let model = Qwen25Vl::random(Config::from_json(&config).unwrap(), 0, &LoadOptions::default()).unwrap();
        for (name, var) in model.named_vars() {
            let values = Tensor::from_vec(parameter(&name, var.dims()), var.shape(), &Device::Cpu).unwrap();
            var.set(&values).unwrap();
        }
        model
    }

    fn cases(&self) -> Vec<&Value> {
        self.document["cases"].as_array().unwrap().iter().collect()
    }

    fn tensor(&self, case: &Value, what: &str) -> &Tensor {
        &self.tensors[&format!("{}.{what}", case["name"].as_str().unwrap())]
    }
}

/// The images of a case and the row that they stand in.
fn images(case: &Value) -> Vec<ProcessedImage> {
    let grids = case["parts"].as_array().unwrap().iter().filter_map(Value::as_array);
    let image = |(index, grid): (usize, &Vec<Value>)| {
        let side = |axis: usize| grid[axis].as_u64().unwrap() as usize;
        let grid = [side(0), side(1), side(2)];
        let name = format!("{}/pixels/{index}", case["name"].as_str().unwrap());
        let mut patches = draw(&name, grid.iter().product::<usize>() * 1176);
        patches.iter_mut().for_each(|v| *v *= 4.0);
        ProcessedImage { patches, grid }
    };
    grids.enumerate().map(image).collect()
}

fn row(model: &Qwen25Vl, case: &Value, pass: Pass) -> Row {
    let images = images(case);
    let features = model.encode_images(&images.iter().collect::<Vec<_>>(), pass).unwrap();
    let ids = case["ids"]
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect::<Vec<_>>();
    let config = model.config();
    let starts = ids
        .iter()
        .enumerate()
        .filter(|(_, id)| **id == config.vision_start_token_id);
    let spans = starts.zip(&images).map(|((at, _), image)| VisualSpan {
        start: at + 1,
        grid: image.grid,
        time_step: if image.grid[0] > 1 { TIME_STEP } else { 0.0 },
    });
    let spans = spans.collect::<Vec<_>>();
    Row {
        positions: positions(ids.len(), &spans, config.vision.spatial_merge_size).unwrap(),
        features: spans.iter().map(|span| span.start).zip(features).collect(),
        ids,
    }
}

fn worst(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    (a - b)
        .unwrap()
        .abs()
        .unwrap()
        .flatten_all()
        .unwrap()
        .max(0)
        .unwrap()
        .to_scalar()
        .unwrap()
}

#[test]
fn positions_are_exactly_those_of_the_reference() {
    let fixtures = fixtures();
    let model = fixtures.model();
    for case in fixtures.cases() {
        let expected: Vec<Vec<i32>> = fixtures
            .tensor(case, "positions")
            .to_dtype(DType::I32)
            .unwrap()
            .to_vec2()
            .unwrap();
        let row = row(&model, case, Pass::Infer);
        for (axis, expected) in expected.iter().enumerate() {
            let got = row.positions.iter().map(|p| p[axis] as i32).collect::<Vec<_>>();
            assert_eq!(&got, expected, "{} axis {axis}", case["name"]);
        }
    }
}

#[test]
fn vision_features_equal_the_reference() {
    let fixtures = fixtures();
    let mut model = fixtures.model();
    for kernels in [Kernels::Auto, Kernels::Composed] {
        model.set_kernels(kernels);
        for case in fixtures.cases().into_iter().filter(|case| case["name"] != "text") {
            let images = images(case);
            let features = model
                .encode_images(&images.iter().collect::<Vec<_>>(), Pass::Infer)
                .unwrap();
            let difference = worst(&Tensor::cat(&features, 0).unwrap(), fixtures.tensor(case, "features"));
            assert!(difference < LOGITS, "{}: {difference}", case["name"]);
        }
    }
}

#[test]
fn logits_of_all_cases_in_one_ragged_batch_equal_the_reference() {
    let fixtures = fixtures();
    let mut model = fixtures.model();
    for kernels in [Kernels::Auto, Kernels::Composed] {
        model.set_kernels(kernels);
        let rows = fixtures
            .cases()
            .into_iter()
            .map(|case| row(&model, case, Pass::Infer))
            .collect::<Vec<_>>();
        let hidden = model.forward(&TextBatch::new(&rows).unwrap(), Pass::Infer).unwrap();
        let logits = model.logits(&hidden, Pass::Infer).unwrap();
        for (index, case) in fixtures.cases().into_iter().enumerate() {
            let logits = logits.get(index).unwrap().narrow(0, 0, rows[index].ids.len()).unwrap();
            let difference = worst(&logits, fixtures.tensor(case, "logits"));
            assert!(difference < LOGITS, "{}: {difference}", case["name"]);
        }
    }
}

#[test]
fn decoding_over_a_cache_equals_the_reference() {
    const DECODED: usize = 3;
    let fixtures = fixtures();
    let model = fixtures.model();
    let whole = fixtures
        .cases()
        .into_iter()
        .map(|case| row(&model, case, Pass::Infer))
        .collect::<Vec<_>>();
    let mut prompts = whole.clone();
    for prompt in &mut prompts {
        prompt.ids.truncate(prompt.ids.len() - DECODED);
        prompt.positions.truncate(prompt.ids.len());
    }
    let batch = TextBatch::new(&prompts).unwrap();
    let (mut cache, mut hidden) = model.prefill(&batch, &vec![1; prompts.len()], DECODED).unwrap();
    for step in 0..=DECODED {
        let logits = model.logits(&hidden, Pass::Infer).unwrap();
        for (index, case) in fixtures.cases().into_iter().enumerate() {
            let at = prompts[index].ids.len() - 1 + step;
            let expected = fixtures.tensor(case, "logits").narrow(0, at, 1).unwrap();
            let difference = worst(&logits.narrow(0, index, 1).unwrap(), &expected);
            assert!(difference < LOGITS, "{} step {step}: {difference}", case["name"]);
        }
        if step < DECODED {
            let next = whole
                .iter()
                .zip(&prompts)
                .map(|(row, prompt)| row.ids[prompt.ids.len() + step]);
            hidden = model.decode(&mut cache, &next.collect::<Vec<_>>()).unwrap();
        }
    }
}

#[test]
fn the_gradient_of_every_parameter_equals_the_reference() {
    let fixtures = fixtures();
    let mut model = fixtures.model();
    let case = fixtures
        .cases()
        .into_iter()
        .find(|case| case["name"] == fixtures.document["gradient_case"])
        .unwrap();
    for kernels in [Kernels::Auto, Kernels::Composed] {
        model.set_kernels(kernels);
        let row = row(&model, case, Pass::Train);
        let targets = row.ids[1..].to_vec();
        let hidden = model.forward(&TextBatch::new(&[row]).unwrap(), Pass::Train).unwrap();
        let hidden = hidden.get(0).unwrap().narrow(0, 0, targets.len()).unwrap();
        let logits = model.logits(&hidden, Pass::Train).unwrap();
        let loss = kernels
            .log_probs(&logits, &targets, 1.0)
            .unwrap()
            .mean_all()
            .unwrap()
            .neg()
            .unwrap();
        let expected = case["loss"].as_f64().unwrap();
        assert!((f64::from(loss.to_scalar::<f32>().unwrap()) - expected).abs() < 1e-5 * expected);
        let gradients = loss.backward().unwrap();
        for (name, var) in model.named_vars() {
            let expected = &fixtures.document["gradients"][&name];
            let (norm, product) = (expected[0].as_f64().unwrap(), expected[1].as_f64().unwrap());
            let gradient = gradients.get(&var).unwrap_or_else(|| panic!("{name}: no gradient"));
            let gradient: Vec<f32> = gradient.flatten_all().unwrap().to_vec1().unwrap();
            let probe = draw(&format!("{name}/probe"), gradient.len());
            let got_norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            let got = gradient
                .iter()
                .zip(&probe)
                .map(|(g, p)| f64::from(*g) * f64::from(*p))
                .sum::<f64>();
            let allowed = GRADIENTS * norm + 1e-6;
            assert!(
                (got_norm - norm).abs() < allowed,
                "{name}: norm {got_norm}, expected {norm}"
            );
            assert!(
                (got - product).abs() < allowed,
                "{name}: product {got}, expected {product}"
            );
        }
    }
}

#[test]
fn resized_pictures_have_the_bytes_of_pillow() {
    let fixtures = fixtures();
    let resizes = fixtures
        .tensors
        .keys()
        .filter(|name| name.starts_with("resize."))
        .collect::<Vec<_>>();
    assert_eq!(resizes.len(), 4);
    for name in resizes {
        let sides = name
            .split(['.', 'x'])
            .filter_map(|part| part.parse().ok())
            .collect::<Vec<usize>>();
        let [height, width, to_height, to_width] = sides[..] else {
            panic!("{name}")
        };
        let rgb = draw(name, height * width * 3)
            .iter()
            .map(|v| ((v + 0.5) * 256.0) as u8)
            .collect();
        let picture = Picture { width, height, rgb }.resize(to_width, to_height);
        let expected: Vec<u8> = fixtures.tensors[name].flatten_all().unwrap().to_vec1().unwrap();
        let differing = picture.rgb.iter().zip(&expected).filter(|(a, b)| a != b).count();
        assert_eq!((differing, picture.rgb.len()), (0, expected.len()), "{name}");
    }
}
