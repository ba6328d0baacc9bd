//! Parity of the passes with the model of the host, whose gradients are those of autograd, and with the engine.

use candle_core::Tensor;
use flotilla_engine::{Limits, Prompt, Request, Sampling, generate};
use flotilla_kernels::{
    Gpu,
    check::{CheckError, Distance, Draw},
};
use flotilla_model::{Config, LoadOptions, Pass, Row, TextBatch, Vlm, weights::Weights};
use half::bf16;
use serde_json::json;

use super::{
    Batch, Learner, Sequence,
    check::{self, small_number},
};
use crate::{error::DeviceError, runner::DeviceRunner, shape::TextShape, weights::TextWeights};

fn differs(error: impl std::fmt::Display) -> CheckError {
    CheckError::Differs(error.to_string())
}

fn host(error: candle_core::Error) -> CheckError {
    DeviceError::Host(error).into()
}

/// Log-probabilities and the gradient of every weight against those that autograd gives for the same weights on the CPU.
pub(super) fn autograd(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let config = Config::from_json(&json!({
        "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 131, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "image_token_id": 130,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
            "window_size": 16, "out_hidden_size": 64, "fullatt_block_indexes": [0]}
    }));
    let seed = draw.below(1000) as u64;
    let model = Vlm::random(config.map_err(differs)?, seed, &LoadOptions::default()).map_err(differs)?;
    let rows = [29, 2, 41].map(|length| Row {
        ids: (0..length).map(|_| small_number(draw.below(130))).collect(),
        positions: (0..small_number(length)).map(|at| [at, at / 2 + 1, at % 7]).collect(),
        features: Vec::new(),
    });
    let scored = rows.each_ref().map(|row| 1..row.ids.len());
    let sequences = rows.iter().zip(&scored).map(|(row, scored)| Sequence {
        ids: &row.ids,
        positions: &row.positions,
        scored,
        placeholders: &[],
    });
    let batch = Batch::pack(sequences).map_err(differs)?;
    let slopes = check::draw_slopes(draw, &batch);
    let text = &model.config().text;
    let weights = TextWeights::<f32>::load(gpu, text, model.weights())?;
    let mut learner = Learner::<f32, f32>::new(gpu, weights, check::settings::<f32>(batch.tokens()))?;
    let log_probs = learner.score(&batch, None, 1.0)?.log_probs;
    learner.backward(&slopes, None)?;
    let (expected, gradients) = by_autograd(&model, &rows, &slopes)?;
    let mut worst = check::named("log-probabilities", Distance::within(&log_probs, &expected, 1e-5)?)?;
    back_to_the_host(gpu, &model, learner.weights())?;
    let gradients = TextWeights::<f32>::load(gpu, text, &gradients)?.named();
    for ((name, found), (_, expected)) in check::download(gpu, &learner)?.iter().zip(&gradients) {
        let distance = Distance::within(found, &gpu.download(expected)?, 1e-4)?;
        worst = worst.worst(check::named(name, distance)?);
    }
    Ok(worst)
}

/// Weights that were loaded come back as they were.
fn back_to_the_host(gpu: &Gpu, model: &Vlm, weights: &TextWeights<f32>) -> Result<(), CheckError> {
    let text = &model.config().text;
    let other = model.weights().deep_copy().map_err(differs)?;
    for (name, variable) in other.iter().filter(|(name, _)| !name.contains("visual")) {
        let zeros = variable.zeros_like().and_then(|zeros| variable.set(&zeros));
        zeros.map_err(|error| differs(format!("{name}: {error}")))?;
    }
    weights.store(gpu, text, &other)?;
    for (name, variable) in model.weights().iter() {
        let values = |variable: &Tensor| variable.flatten_all().and_then(|flat| flat.to_vec1::<f32>());
        let stored = other.get(name).ok_or_else(|| differs(name))?;
        Distance::equal(
            &values(stored.as_tensor()).map_err(host)?,
            &values(variable.as_tensor()).map_err(host)?,
        )
        .map_err(|error| differs(format!("{name} came back otherwise: {error}")))?;
    }
    Ok(())
}

/// Log-probabilities of all tokens but the first of each row, and weights that are their gradients.
fn by_autograd(model: &Vlm, rows: &[Row], slopes: &[f32]) -> Result<(Vec<f32>, Weights), CheckError> {
    let batch = TextBatch::new(rows).map_err(differs)?;
    let hidden = model.forward(&batch, Pass::Train).map_err(differs)?;
    let logits = model.logits(&hidden, Pass::Train).map_err(differs)?;
    let (mut picked, mut used) = (Vec::new(), 0);
    for (index, row) in rows.iter().enumerate() {
        let count = row.ids.len() - 1;
        let own = logits
            .get(index)
            .and_then(|own| own.narrow(0, 0, count))
            .map_err(host)?;
        let targets = Tensor::from_slice(&row.ids[1..], (count, 1), model.device()).map_err(host)?;
        let log_probs = own.gather(&targets, 1).and_then(|chosen| {
            let sums = own.log_sum_exp(1)?;
            chosen.squeeze(1)? - sums
        });
        let slopes = Tensor::from_slice(&slopes[used..used + count], count, model.device()).map_err(host)?;
        used += count;
        picked.push((log_probs.map_err(host)?, slopes));
    }
    let columns = |pick: fn(&(Tensor, Tensor)) -> &Tensor| Tensor::cat(&picked.iter().map(pick).collect::<Vec<_>>(), 0);
    let log_probs = columns(|pair| &pair.0).map_err(host)?;
    let slopes = columns(|pair| &pair.1).map_err(host)?;
    let store = (&log_probs * slopes)
        .and_then(|terms| terms.sum_all())
        .and_then(|loss| loss.backward());
    let store = store.map_err(host)?;
    let gradients = model.weights().deep_copy().map_err(differs)?;
    for (name, variable) in gradients.iter() {
        let gradient = model.weights().get(name).and_then(|original| store.get(original));
        let gradient = gradient.map_or_else(|| variable.zeros_like(), |gradient| Ok(gradient.clone()));
        gradient.and_then(|gradient| variable.set(&gradient)).map_err(host)?;
    }
    Ok((log_probs.to_vec1().map_err(host)?, gradients))
}

/// Mean difference between the log-probabilities that the engine tells of the tokens it draws, one by one over its cache, and
/// those that the learner finds for whole sequences, with one copy of the weights.
pub(super) fn drawn(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let shape: TextShape = check::medium();
    let tensors = check::draw_tensors(draw, &shape);
    let weights = check::upload::<bf16>(gpu, &shape, &tensors)?;
    let limits = Limits {
        max_rows: 16,
        max_step_tokens: 512,
        kv_blocks: 512,
        ..Limits::default()
    };
    let runner = DeviceRunner::of_text(gpu, weights.clone(), &limits, 256)?;
    let prompts = [5, 37, 64, 130].map(|length| {
        let ids = (0..length).map(|_| small_number(draw.below(shape.vocabulary)));
        Row::text(ids.collect())
    });
    let sampling = Sampling {
        temperature: 1.0,
        max_tokens: 40,
        seed: 3,
        ..Sampling::default()
    };
    let requests = prompts
        .each_ref()
        .map(|prompt| Request::new(Prompt::from(prompt.clone()), 3, sampling.clone()));
    let groups = generate(runner, &requests, limits, &|| false).map_err(differs)?;
    let mut whole = Vec::new();
    let mut told = Vec::new();
    for (prompt, group) in prompts.iter().zip(&groups) {
        for completion in &group.completions {
            let row = prompt.followed_by(&completion.ids());
            let scored = prompt.ids.len()..row.ids.len();
            told.extend(completion.log_probabilities());
            whole.push((row, scored));
        }
    }
    let sequences = whole.iter().map(|(row, scored)| Sequence {
        ids: &row.ids,
        positions: &row.positions,
        scored,
        placeholders: &[],
    });
    let batch = Batch::pack(sequences).map_err(differs)?;
    let mut learner = Learner::<bf16, bf16>::new(gpu, weights, check::settings::<bf16>(batch.tokens()))?;
    let found = learner.score(&batch, None, 1.0)?.log_probs;
    if told.len() != found.len() || told.is_empty() {
        return Err(differs(format!("{} tokens drawn, {} scored", told.len(), found.len())));
    }
    let apart = told
        .iter()
        .zip(&found)
        .map(|(told, found)| f64::from((told - found).abs()));
    Ok(Distance {
        relative: apart.sum::<f64>() / told.len() as f64,
        bound: 2e-2,
    })
}
