//! Tokens per second of processor time of the composed and the fused operations on this machine's CPU, one thread.
//!
//! `RAYON_NUM_THREADS=1 cargo run -p flotilla-model --example speed [ROWS] [WIDTH]`
//!
//! The model is the one of the digits demo (3 layers x 128, vocabulary 319); each figure is the best of five rounds.

#![allow(clippy::unwrap_used, reason = "a measurement, not a service")]

use std::{sync::OnceLock, time::Instant};

use candle_core::Tensor;
use flotilla_model::{Config, Layout, LoadOptions, Pass, Row, Span, TextBatch, Visual, Vlm, ops::Kernels};
use serde_json::json;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROUNDS: usize = 5;
const NEW_TOKENS: usize = 12;

fn config() -> Config {
    Config::from_json(&json!({
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 319, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "image_token_id": 315, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "vision_config": {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2,
            "out_hidden_size": 128, "fullatt_block_indexes": [1]}
    }))
    .unwrap()
}

/// Seconds that this thread has computed; the time of the day where the system does not tell.
fn clock() -> f64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let start = START.get_or_init(Instant::now);
    let computed = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let computed = computed.and_then(|text| text.split(' ').next()?.parse::<f64>().ok());
    computed.map_or_else(|| start.elapsed().as_secs_f64(), |nanoseconds| nanoseconds * 1e-9)
}

/// Seconds of the fastest round.
fn best(mut work: impl FnMut()) -> f64 {
    work();
    let round = |_| {
        let start = clock();
        work();
        clock() - start
    };
    (0..ROUNDS).map(round).fold(f64::INFINITY, f64::min)
}

/// Log-probabilities of the last tokens of each row, and the gradients of their sum.
fn train(model: &Vlm, batch: &TextBatch) {
    let hidden = model.forward(batch, Pass::Train).unwrap().flatten(0, 1).unwrap();
    let (rows, width) = (batch.rows(), batch.width());
    let picked = (0..rows).flat_map(|row| ((row + 1) * width - NEW_TOKENS) as u32..((row + 1) * width) as u32);
    let picked = picked.collect::<Vec<_>>();
    let count = picked.len();
    let picked = Tensor::from_vec(picked, count, model.device()).unwrap();
    let logits = model
        .logits(&hidden.index_select(&picked, 0).unwrap(), Pass::Train)
        .unwrap();
    let targets = (0..count as u32).map(|i| i % 300).collect::<Vec<_>>();
    let loss = model
        .kernels()
        .log_probs(&logits, &targets, 1.0)
        .unwrap()
        .sum_all()
        .unwrap();
    loss.backward().unwrap();
}

/// `group` samples of `NEW_TOKENS` tokens after each prompt; they share the prompt's blocks.
fn decode(model: &Vlm, prompts: &[Row], group: usize) {
    let length = prompts[0].ids.len();
    let shared = length.div_ceil(NEW_TOKENS) as u32;
    // Blocks as long as a completion: a sample has the prompt's and two of its own.
    let samples = (prompts.len() * group) as u32;
    let first = prompts.len() as u32 * shared;
    let mut pool = model.pool((first + 2 * samples) as usize, NEW_TOKENS).unwrap();
    let own = (0..prompts.len() as u32)
        .map(|prompt| (prompt * shared..(prompt + 1) * shared).collect::<Vec<_>>())
        .collect::<Vec<_>>();
    let spans = prompts.iter().zip(&own).map(|(row, blocks)| Span {
        ids: &row.ids,
        positions: &row.positions,
        features: Vec::new(),
        stored: 0,
        blocks,
        wanted: true,
    });
    model.extend(&mut pool, &spans.collect::<Vec<_>>()).unwrap();
    let full = length / NEW_TOKENS;
    let tables = (0..samples).map(|sample| {
        let prompt = &own[sample as usize / group];
        let mut blocks = prompt[..full].to_vec();
        blocks.extend([first + 2 * sample, first + 2 * sample + 1]);
        blocks
    });
    let tables = tables.collect::<Vec<_>>();
    if !length.is_multiple_of(NEW_TOKENS) {
        let pair = |sample: u32| (own[sample as usize / group][full], first + 2 * sample);
        model
            .copy(&mut pool, &(0..samples).map(pair).collect::<Vec<_>>())
            .unwrap();
    }
    for step in 0..NEW_TOKENS {
        let ids = (0..samples).map(|row| (row + step as u32) % 300).collect::<Vec<_>>();
        let position = [[(length + step) as u32; 3]];
        let spans = tables.iter().enumerate().map(|(index, blocks)| Span {
            ids: &ids[index..=index],
            positions: &position,
            features: Vec::new(),
            stored: length + step,
            blocks,
            wanted: true,
        });
        let hidden = model.extend(&mut pool, &spans.collect::<Vec<_>>()).unwrap();
        model.logits(&hidden, Pass::Infer).unwrap();
    }
}

fn vision(model: &Vlm, images: &[Visual]) {
    let features = model.encode(&images.iter().collect::<Vec<_>>(), Pass::Train).unwrap();
    Tensor::cat(&features, 0)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
}

fn main() {
    let argument = |index: usize, default: usize| {
        std::env::args()
            .nth(index)
            .map_or(default, |text| text.parse().unwrap())
    };
    let (rows, width) = (argument(1, 64), argument(2, 48));
    let row = |length: usize| Row::text((0..length as u32).map(|i| (i * 7) % 300).collect());
    let batch = TextBatch::new(&vec![row(width); rows]).unwrap();
    let prompts = vec![row(width - NEW_TOKENS); rows.div_ceil(8)];
    let images = vec![
        Visual {
            values: (0..16 * 1176).map(|i| (i % 17) as f32 / 8.0 - 1.0).collect(),
            layout: Layout::Patches {
                grid: [1, 4, 4],
                time_step: 0.0,
                video: false,
            },
        };
        rows
    ];
    let mut model = Vlm::random(config(), 1, &LoadOptions::default()).unwrap();
    let measure = |model: &Vlm| {
        [
            (rows * width) as f64 / best(|| train(model, &batch)),
            (rows * width) as f64 / best(|| drop(model.forward(&batch, Pass::Infer).unwrap())),
            (prompts.len() * 8 * NEW_TOKENS) as f64 / best(|| decode(model, &prompts, 8)),
            rows as f64 / best(|| vision(model, &images)),
        ]
    };
    let fused = measure(&model);
    model.set_kernels(Kernels::Composed);
    let composed = measure(&model);
    println!("{rows} rows x {width} tokens, {NEW_TOKENS} new tokens, groups of 8");
    let names = [
        "train tokens/s",
        "forward tokens/s",
        "decode tokens/s (with prefill)",
        "vision train images/s",
    ];
    for ((name, fused), composed) in names.iter().zip(fused).zip(composed) {
        println!(
            "{name:32} composed {composed:9.0}  fused {fused:9.0}  ratio {:.2}",
            fused / composed
        );
    }
}
