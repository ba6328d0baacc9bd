//! Parity of the passes with the model of the host, whose gradients are those of autograd, and with the engine.

use candle_core::{Tensor, backprop::GradStore};
use flotilla_engine::{Limits, Prompt, Request, Sampling, generate};
use flotilla_grpo::policy::{Known, PolicyLoss, PolicyStatistics};
use flotilla_kernels::{
    Gpu,
    check::{CheckError, Distance, Draw},
};
use flotilla_model::{Config, LoadOptions, Pass, Row, TextBatch, Vlm, weights::Weights};
use half::bf16;
use serde_json::json;

use super::{
    Batch, Learner, Sample, Sequence, Settings,
    check::{self, differs, host, small_number},
};
use crate::{runner::DeviceRunner, shape::TextShape, weights::TextWeights};

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
pub(super) fn by_autograd(model: &Vlm, rows: &[Row], slopes: &[f32]) -> Result<(Vec<f32>, Weights), CheckError> {
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
    let gradients = gradient_weights(model, &store.map_err(host)?)?;
    Ok((log_probs.to_vec1().map_err(host)?, gradients))
}

/// Gradients of a backward pass as weights, zeros where there are none.
pub(super) fn gradient_weights(model: &Vlm, store: &GradStore) -> Result<Weights, CheckError> {
    let gradients = model.weights().deep_copy().map_err(differs)?;
    for (name, variable) in gradients.iter() {
        let gradient = model.weights().get(name).and_then(|original| store.get(original));
        let gradient = gradient.map_or_else(|| variable.zeros_like(), |gradient| Ok(gradient.clone()));
        gradient.and_then(|gradient| variable.set(&gradient)).map_err(host)?;
    }
    Ok(gradients)
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

/// Reinforcement learning with one copy of the weights: what the engine draws after each update is drawn by what the learner has
/// made of them. A reward for tokens of the lower quarter of the vocabulary, a quarter of all at first, rises above two thirds.
pub(super) fn reward_rises(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let shape = TextShape {
        vocabulary: 128,
        ..check::medium()
    };
    let tensors = check::draw_tensors(draw, &shape);
    let weights = check::upload::<bf16>(gpu, &shape, &tensors)?;
    let settings = Settings {
        gradients: flotilla_kernels::Dtype::Bf16,
        ..Settings::new(1024)
    };
    let mut learner = Learner::<bf16, bf16>::new(gpu, weights.clone(), settings)?;
    let prompts = [3, 9, 14, 21, 6, 11].map(|length| {
        let ids = (0..length).map(|_| small_number(draw.below(shape.vocabulary)));
        Row::text(ids.collect())
    });
    let limits = Limits {
        max_rows: 48,
        max_step_tokens: 256,
        kv_blocks: 512,
        ..Limits::default()
    };
    let mut rewards = Vec::new();
    for round in 0..16 {
        let runner = DeviceRunner::of_text(gpu, weights.clone(), &limits, 64)?;
        let sampling = Sampling {
            temperature: 1.0,
            max_tokens: 16,
            seed: round,
            ..Sampling::default()
        };
        let requests = prompts
            .each_ref()
            .map(|prompt| Request::new(Prompt::from(prompt.clone()), 8, sampling.clone()));
        let groups = generate(runner, &requests, limits, &|| false).map_err(differs)?;
        let (mut rows, mut told) = (Vec::new(), Vec::new());
        let mut total = 0.0;
        for (prompt, group) in prompts.iter().zip(&groups) {
            let of = |ids: &[u32]| ids.iter().filter(|id| **id < 32).count() as f32 / ids.len() as f32;
            let own = group.completions.iter().map(|one| of(&one.ids())).collect::<Vec<_>>();
            let mean = own.iter().sum::<f32>() / own.len() as f32;
            let deviation = (own.iter().map(|one| (one - mean).powi(2)).sum::<f32>() / own.len() as f32).sqrt();
            total += mean / prompts.len() as f32;
            for (completion, own) in group.completions.iter().zip(own) {
                rows.push((prompt.followed_by(&completion.ids()), prompt.ids.len()));
                told.push((completion.log_probabilities(), (own - mean) / (deviation + 1e-4)));
            }
        }
        rewards.push(total);
        reinforce(&mut learner, &rows, &told)?;
    }
    let (first, last) = (rewards[0], rewards[rewards.len() - 1]);
    if !(0.15..0.4).contains(&first) || last < 0.66 {
        return Err(differs(format!("rewards of {rewards:.2?}")));
    }
    Ok(Distance::EQUAL)
}

/// One update from completions, with the log-probabilities that the engine told and their advantages.
fn reinforce(
    learner: &mut Learner<bf16, bf16>,
    rows: &[(Row, usize)],
    told: &[(Vec<f32>, f32)],
) -> Result<(), CheckError> {
    let policy = PolicyLoss {
        clip_low: 0.2,
        clip_high: 0.3,
        dual_clip: Some(3.0),
        kl_coefficient: 0.0,
    };
    let samples = rows.iter().map(|(row, prompt)| Sample {
        ids: &row.ids,
        positions: &row.positions,
        prompt: *prompt,
        pictures: &[],
    });
    let tokens = told.iter().map(|(old, _)| old.len()).sum::<usize>() as f32;
    let mut sums = PolicyStatistics::default();
    learner.learn(&samples.collect::<Vec<_>>(), 1.0, |index, log_probs| {
        let (old, advantage) = &told[index];
        let known = Known {
            old,
            reference: None,
            advantage: &vec![*advantage; old.len()],
            weight: &vec![tokens.recip(); old.len()],
        };
        let mut slopes = Vec::new();
        sums += policy.gradient(log_probs, known, &mut slopes);
        slopes
    })?;
    let adamw = flotilla_kernels::optimizer::AdamW {
        learning_rate: 1e-3,
        ..check::ADAMW
    };
    learner.update(&adamw, 1.0)?;
    // The engine and the learner share the weights: what was drawn is on policy.
    if sums.max_log_ratio > 0.5 {
        return Err(differs(format!("log-probabilities {} apart", sums.max_log_ratio)));
    }
    Ok(())
}
