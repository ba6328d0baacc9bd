//! A checkpoint on the chosen device beside the same checkpoint on the CPU in f32.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use flotilla_engine::{Completion, Limits, Request, Sampling, VlmRunner, generate};
use flotilla_grpo::logprob::token_log_probs;
use flotilla_model::{
    LoadOptions, Medium, Message, Pass, Picture, Processor, Prompt, Row, TextBatch, Vlm, ops::Kernels,
};

use super::CheckReport;
use crate::error::{Cause, WorkerError};

/// Side of the picture that is asked about.
const SIDE: usize = 112;
/// What is asked.
const QUESTION: &str = "What is in this picture?";
/// Tokens of the greedy answer.
const TOKENS: usize = 24;
/// Relative Frobenius distance of logits in f32.
const F32: f64 = 1e-4;
/// The same in bf16, or as much more than the CPU has in bf16 as [`HALF_OF_CPU`] says.
const BF16: f64 = 2e-2;
/// How much farther than the CPU in bf16.
const HALF_OF_CPU: f64 = 1.5;
/// Relative distance of the gradient of every parameter in f32.
const GRADIENT: f64 = 1e-3;
/// Mean difference of a token's log-probability between the engine that draws and the pass that trains.
const LOG_PROBABILITY: f64 = 2e-2;
/// Models beyond have no room for gradients beside two copies of their weights.
const GRADIENT_BYTES: usize = 4 << 30;

type Result<T> = std::result::Result<T, Cause>;

/// Compares; on the CPU itself, the operations composed of candle's with the fused ones.
pub(super) fn check(directory: &Path, device: &Device) -> std::result::Result<Vec<CheckReport>, WorkerError> {
    compare(directory, device)
        .map_err(|error| WorkerError::permanent(format!("failed to check the model in {}", directory.display()), error))
}

fn compare(directory: &Path, device: &Device) -> Result<Vec<CheckReport>> {
    let processor = Processor::load(directory)?;
    let load = |device: &Device, dtype: DType| -> Result<Vlm> {
        let options = LoadOptions {
            device: device.clone(),
            dtype,
        };
        Ok(Vlm::load(directory, &options)?)
    };
    let examined = |dtype: DType| -> Result<Vlm> {
        let mut model = load(device, dtype)?;
        if device.is_cpu() {
            model.set_kernels(Kernels::Composed);
        }
        Ok(model)
    };
    let reference = load(&Device::Cpu, DType::F32)?;
    let room = reference.config().text.max_position_embeddings;
    let prompt = processor.prepare(&[Message::user(1, QUESTION)], &[Medium::Picture(picture())], room)?;
    let expected = logits(&reference, &prompt)?;

    let full = examined(DType::F32)?;
    let mut checks = vec![within(
        "logits f32",
        distance(&logits(&full, &prompt)?, &expected)?,
        F32,
    )];
    let (ours, theirs) = (greedy(&full, &prompt)?, greedy(&reference, &prompt)?);
    checks.push(equal("greedy tokens f32", &ours.ids(), &theirs.ids()));
    checks.push(within(
        "drawn and trained log-probabilities f32",
        apart(&full, &prompt, &ours)?,
        LOG_PROBABILITY,
    ));
    if reference.weights().size_in_bytes() <= GRADIENT_BYTES {
        checks.push(within(
            "gradients f32",
            gradients(&full, &reference, &prompt)?,
            GRADIENT,
        ));
    }
    drop(full);

    let half = examined(DType::BF16)?;
    let of_cpu = distance(&logits(&load(&Device::Cpu, DType::BF16)?, &prompt)?, &expected)?;
    let bound = BF16.max(HALF_OF_CPU * of_cpu);
    checks.push(within(
        "logits bf16",
        distance(&logits(&half, &prompt)?, &expected)?,
        bound,
    ));
    let ours = greedy(&half, &prompt)?;
    checks.push(within(
        "drawn and scored log-probabilities bf16",
        apart(&half, &prompt, &ours)?,
        LOG_PROBABILITY,
    ));
    Ok(checks)
}

fn within(name: &str, distance: f64, bound: f64) -> CheckReport {
    CheckReport {
        name: name.to_owned(),
        ok: distance <= bound,
        detail: format!("{distance:.2e} of {bound:.0e}"),
    }
}

fn equal(name: &str, ours: &[u32], theirs: &[u32]) -> CheckReport {
    let differs = ours.iter().zip(theirs).position(|(ours, theirs)| ours != theirs);
    CheckReport {
        name: name.to_owned(),
        ok: differs.is_none() && ours.len() == theirs.len(),
        detail: match differs {
            None => format!("{} tokens", ours.len()),
            Some(at) => format!("token {at} is {}, {} on the CPU", ours[at], theirs[at]),
        },
    }
}

/// A picture of which every row and column is different.
fn picture() -> Picture {
    let pixel = |at: usize| {
        let (row, column) = (at / SIDE, at % SIDE);
        [row * 2, column * 2, row ^ column].map(|value| value as u8)
    };
    Picture {
        width: SIDE,
        height: SIDE,
        rgb: (0..SIDE * SIDE).flat_map(pixel).collect(),
    }
}

fn row(model: &Vlm, prompt: &Prompt, pass: Pass) -> Result<Row> {
    let features = model.encode(&prompt.visuals.iter().collect::<Vec<_>>(), pass)?;
    Ok(prompt.row(&features)?)
}

/// Logits of every token, `[tokens, vocabulary]`, where the model is.
fn forward(model: &Vlm, row: Row, pass: Pass) -> Result<Tensor> {
    let hidden = model.forward(&TextBatch::new(&[row])?, pass)?.squeeze(0)?;
    Ok(model.logits(&hidden, pass)?)
}

fn logits(model: &Vlm, prompt: &Prompt) -> Result<Tensor> {
    let logits = forward(model, row(model, prompt, Pass::Infer)?, Pass::Infer)?;
    Ok(logits.to_device(&Device::Cpu)?.to_dtype(DType::F64)?)
}

/// Sums of squares of a difference and of what it is measured by.
fn squares(ours: &Tensor, theirs: &Tensor) -> Result<(f64, f64)> {
    let sum = |tensor: &Tensor| tensor.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>();
    let ours = ours.to_device(&Device::Cpu)?.to_dtype(theirs.dtype())?;
    Ok((sum(&(ours - theirs)?)?, sum(theirs)?))
}

fn distance(ours: &Tensor, theirs: &Tensor) -> Result<f64> {
    let (apart, size) = squares(ours, theirs)?;
    Ok((apart / size).sqrt())
}

fn greedy(model: &Vlm, prompt: &Prompt) -> Result<Completion> {
    let sampling = Sampling {
        temperature: 0.0,
        max_tokens: TOKENS,
        ..Sampling::default()
    };
    let limits = Limits::default();
    let requests = [Request::new(flotilla_engine::Prompt::from(prompt.clone()), 1, sampling)];
    let groups = generate(VlmRunner::new(model, &limits), &requests, limits, &|| false)?;
    let completion = groups
        .into_iter()
        .next()
        .and_then(|group| group.completions.into_iter().next());
    completion.ok_or_else(|| "the engine has not answered".into())
}

/// Mean difference between the log-probabilities that the engine told for its tokens and those of the pass that a trainer
/// makes over all of them. The engine tells those of the distribution before temperature.
fn apart(model: &Vlm, prompt: &Prompt, completion: &Completion) -> Result<f64> {
    let ids = completion.ids();
    let Some((_, seen)) = ids.split_last() else {
        return Err("the engine has drawn nothing".into());
    };
    let row = row(model, prompt, Pass::Train)?.followed_by(seen);
    let hidden = model.forward(&TextBatch::new(&[row])?, Pass::Train)?.squeeze(0)?;
    let hidden = hidden.narrow(0, prompt.ids.len() - 1, ids.len())?;
    let scored = if model.dtype() == DType::F32 {
        let name = model.config().text.head_name();
        let head = model.weights().get(&name).ok_or("the model has no head")?;
        let targets = Tensor::new(ids.as_slice(), model.device())?;
        token_log_probs(&hidden, head.as_tensor(), &targets, 1.0)?
    } else {
        let logits = model.logits(&hidden, Pass::Train)?;
        model.kernels().log_probs(&logits, &ids, 1.0)?
    };
    let drawn = completion.log_probabilities();
    let pairs = drawn.iter().zip(scored.to_vec1::<f32>()?);
    let sum = pairs
        .map(|(drawn, scored)| f64::from((drawn - scored).abs()))
        .sum::<f64>();
    Ok(sum / drawn.len() as f64)
}

/// Distance of the gradients of all parameters together, of the mean log-probability of the prompt's own tokens.
fn gradients(ours: &Vlm, theirs: &Vlm, prompt: &Prompt) -> Result<f64> {
    let backward = |model: &Vlm| {
        let logits = forward(model, row(model, prompt, Pass::Train)?, Pass::Train)?;
        let targets = &prompt.ids[1..];
        let scores = model
            .kernels()
            .log_probs(&logits.narrow(0, 0, targets.len())?, targets, 1.0)?;
        Ok::<_, Cause>(scores.mean_all()?.backward()?)
    };
    let (ours_of, theirs_of) = (backward(ours)?, backward(theirs)?);
    let (mut apart, mut size) = (0.0, 0.0);
    for ((name, own), (_, other)) in ours.named_vars().iter().zip(theirs.named_vars()) {
        match (ours_of.get(own), theirs_of.get(&other)) {
            (Some(own), Some(other)) => {
                let (more, of) = squares(own, other)?;
                apart += more;
                size += of;
            }
            (None, None) => {}
            _ => return Err(format!("{name} has a gradient on one device and none on the other").into()),
        }
    }
    Ok((apart / size).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn composed_operations_agree_with_the_fused_ones_on_both_families() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/parity/fixtures");
        for family in ["tiny-qwen2.5-vl", "tiny-llava-onevision"] {
            let checks = check(&fixtures.join(family), &Device::Cpu).expect("runs");
            assert_eq!(checks.len(), 6);
            assert!(checks.iter().all(|check| check.ok), "{family}: {checks:?}");
        }
    }

    #[test]
    fn a_token_that_differs_is_named() {
        let report = equal("greedy", &[1, 2, 3], &[1, 5, 3]);
        assert!(!report.ok);
        assert_eq!(report.detail, "token 1 is 2, 5 on the CPU");
        assert!(!equal("greedy", &[1, 2], &[1, 2, 3]).ok);
    }
}
