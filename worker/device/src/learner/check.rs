//! Parity of the passes with the model in f64, determinism, a loss that falls.

use flotilla_grpo::policy::{Known, PolicyLoss, cross_entropy_slopes};
use flotilla_kernels::{
    Float, Gpu,
    check::{Check, CheckError, Distance, Draw, widen},
    optimizer::{AdamW, Rounding, StateKind},
};
use half::bf16;

pub(super) use super::specimen::{draw_slopes, draw_tensors, medium, settings, small_number, upload};
use super::{
    Batch, Keep, Learner, Picture, Sample, Settings, agreement,
    reference::Reference,
    specimen::{draw_batch, small},
    vision,
};
use crate::{error::DeviceError, shape::TextShape};

impl From<DeviceError> for CheckError {
    fn from(error: DeviceError) -> Self {
        match error {
            DeviceError::Gpu(error) => Self::Gpu(error),
            other => Self::Differs(other.to_string()),
        }
    }
}

pub(super) fn differs(error: impl std::fmt::Display) -> CheckError {
    CheckError::Differs(error.to_string())
}

pub(super) fn host(error: candle_core::Error) -> CheckError {
    DeviceError::Host(error).into()
}

/// Every check of the learner.
pub fn checks() -> Vec<Check> {
    let mut checks = of_text();
    checks.extend(vision::check::checks());
    checks
}

fn of_text() -> Vec<Check> {
    vec![
        Check {
            name: "learner f32 log-probabilities and gradients",
            run: |gpu, draw| gradients(gpu, draw, &small(false), 1.0),
        },
        Check {
            name: "learner f32 gradients, tied head, temperature",
            run: |gpu, draw| gradients(gpu, draw, &small(true), 0.7),
        },
        Check {
            name: "learner f32 gradients against the host's autograd",
            run: agreement::autograd,
        },
        Check {
            name: "learner bf16 scores what the engine drew",
            run: agreement::drawn,
        },
        Check {
            name: "learner bf16 rewards rise with one copy of the weights",
            run: agreement::reward_rises,
        },
        Check {
            name: "learner f32 gradient by features",
            run: feature_gradient,
        },
        Check {
            name: "learner bf16 gradients against f32",
            run: |gpu, draw| rounded(gpu, draw, &small(false)),
        },
        Check {
            name: "learner bf16 gradients against f32, heads of 128",
            run: |gpu, draw| rounded(gpu, draw, &medium()),
        },
        Check {
            name: "learner f32 what is kept changes no bit",
            run: |gpu, draw| kept::<f32>(gpu, draw, &small(false)),
        },
        Check {
            name: "learner bf16 what is kept changes no bit",
            run: |gpu, draw| kept::<bf16>(gpu, draw, &medium()),
        },
        Check {
            name: "learner f32 micro-batches sum to the batch",
            run: micro_batches_sum,
        },
        Check {
            name: "learner bf16 sums in bf16 over four micro-batches",
            run: rounded_sums,
        },
        Check {
            name: "learner f32 loss falls, moments in f32",
            run: |gpu, draw| falls::<f32>(gpu, draw, StateKind::F32),
        },
        Check {
            name: "learner bf16 loss falls, moments in bf16",
            run: |gpu, draw| falls::<bf16>(gpu, draw, StateKind::Bf16),
        },
        Check {
            name: "learner bf16 loss falls, moments of 8 bits",
            run: |gpu, draw| falls::<bf16>(gpu, draw, StateKind::Bit8),
        },
        Check {
            name: "learner f32 samples over micro-batches, frozen tables",
            run: samples_over_micro_batches,
        },
        Check {
            name: "learner bf16 goes on as if it had not ended",
            run: goes_on,
        },
    ]
}

pub(super) type Gradients = Vec<(String, Vec<f32>)>;

/// Log-probabilities and every gradient of one batch.
fn compute<T: Float>(
    gpu: &Gpu,
    shape: &TextShape,
    tensors: &[Vec<f32>],
    batch: &Batch,
    features: &[f32],
    slopes: &[f32],
    (temperature, keep): (f32, Keep),
) -> Result<(Vec<f32>, Gradients), CheckError> {
    let weights = upload::<T>(gpu, shape, tensors)?;
    let settings = Settings {
        keep,
        ..settings::<T>(batch.tokens())
    };
    let mut learner = Learner::<T, T>::new(gpu, weights, settings)?;
    let features = features.iter().map(|value| T::from_f32(*value)).collect::<Vec<_>>();
    let features = gpu.upload(&features)?;
    let scored = learner.score(batch, Some(&features), temperature)?;
    learner.backward(slopes, None)?;
    Ok((scored.log_probs, download(gpu, &learner)?))
}

pub(super) fn download<T: Float, G: Float>(gpu: &Gpu, learner: &Learner<T, G>) -> Result<Gradients, CheckError> {
    let gradients = learner.gradients();
    gradients
        .map(|(name, gradient)| Ok((name.to_owned(), gradient.download(gpu)?)))
        .collect()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

/// A distance with the name of the tensor where it does not hold.
pub(super) fn named(name: &str, distance: Distance) -> Result<Distance, CheckError> {
    if distance.holds() {
        return Ok(distance);
    }
    let Distance { relative, bound } = distance;
    Err(CheckError::Differs(format!("{name}: {relative:.2e} of {bound:.0e}")))
}

/// The worst of distances, of which there is one.
pub(super) fn worst(distances: impl IntoIterator<Item = Result<Distance, CheckError>>) -> Result<Distance, CheckError> {
    let mut distances = distances.into_iter();
    let first = distances.next().unwrap_or(Ok(Distance::EQUAL))?;
    distances.try_fold(first, |worst, next| Ok(worst.worst(next?)))
}

/// Log-probabilities against f64, and the gradient of every weight against differences of the loss in f64: along the gradient
/// itself, whose slope is its norm, and along random directions, where an error of any entry shows.
fn gradients(gpu: &Gpu, draw: &mut Draw, shape: &TextShape, temperature: f32) -> Result<Distance, CheckError> {
    let tensors = draw_tensors(draw, shape);
    let batch = draw_batch(draw, shape, &[23, 1, 37, 6])?;
    let features = draw.normal::<f32>(batch.placeholders.len() * shape.hidden, 1.0);
    let slopes = draw_slopes(draw, &batch);
    let how = (temperature, Keep::default());
    let (log_probs, gradients) = compute::<f32>(gpu, shape, &tensors, &batch, &features, &slopes, how)?;
    let mut model = Reference {
        shape: shape.clone(),
        tensors: tensors.iter().map(|values| wide(values)).collect(),
    };
    let (features, slopes) = (wide(&features), wide(&slopes));
    let temperature = f64::from(temperature);
    let expected = model.log_probs(&batch, &features, temperature);
    #[allow(clippy::cast_possible_truncation, reason = "distances are of f32 numbers")]
    let narrow = |values: &[f64]| values.iter().map(|value| *value as f32).collect::<Vec<_>>();
    let mut worst = named(
        "log-probabilities",
        Distance::within(&log_probs, &narrow(&expected), 1e-5)?,
    )?;
    let step = 1e-4;
    for (index, (name, gradient)) in gradients.iter().enumerate() {
        let gradient = wide(gradient);
        let mut along = |direction: &[f64]| {
            let length = direction.iter().map(|d| d * d).sum::<f64>().sqrt();
            let unit = direction.iter().map(|d| d / length).collect::<Vec<_>>();
            let kept = model.tensors[index].clone();
            let mut at = |step: f64| {
                let moved = kept.iter().zip(&unit).map(|(weight, d)| weight + step * d);
                model.tensors[index] = moved.collect();
                let log_probs = model.log_probs(&batch, &features, temperature);
                log_probs
                    .iter()
                    .zip(&slopes)
                    .map(|(log_prob, slope)| log_prob * slope)
                    .sum::<f64>()
            };
            let difference = (at(step) - at(-step)) / (2.0 * step);
            model.tensors[index] = kept;
            let product = unit
                .iter()
                .zip(&gradient)
                .map(|(d, gradient)| d * gradient)
                .sum::<f64>();
            (product, difference)
        };
        let own = along(&gradient);
        let random = (0..4).map(|_| along(&wide(&draw.normal::<f32>(gradient.len(), 1.0))));
        let (products, differences): (Vec<_>, Vec<_>) = random.unzip();
        let random = Distance::within(&narrow(&products), &narrow(&differences), 1e-3)?;
        let own = Distance::within(&narrow(&[own.0]), &narrow(&[own.1]), 1e-4)?;
        worst = worst.worst(named(name, own)?).worst(named(name, random)?);
    }
    Ok(worst)
}

/// The gradient that flows into a vision tower.
fn feature_gradient(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let shape = small(false);
    let tensors = draw_tensors(draw, &shape);
    let batch = draw_batch(draw, &shape, &[23, 37])?;
    let features = draw.normal::<f32>(batch.placeholders.len() * shape.hidden, 1.0);
    let slopes = draw_slopes(draw, &batch);
    let weights = upload::<f32>(gpu, &shape, &tensors)?;
    let mut learner = Learner::<f32, f32>::new(gpu, weights, settings::<f32>(batch.tokens()))?;
    let gradient = gpu.poisoned::<f32>(features.len())?;
    learner.score(&batch, Some(&gpu.upload(&features)?), 1.0)?;
    learner.backward(&slopes, Some(&gradient))?;
    let gradient = gpu.download(&gradient)?;
    let model = Reference {
        shape,
        tensors: tensors.iter().map(|values| wide(values)).collect(),
    };
    let loss = |features: &[f64]| {
        let log_probs = model.log_probs(&batch, features, 1.0);
        let terms = log_probs.iter().zip(&slopes);
        terms.map(|(log_prob, slope)| log_prob * f64::from(*slope)).sum::<f64>()
    };
    let (step, center) = (1e-4, wide(&features));
    let differences = (0..features.len()).step_by(7).map(|index| {
        let at = |step: f64| {
            let mut features = center.clone();
            features[index] += step;
            loss(&features)
        };
        #[allow(clippy::cast_possible_truncation, reason = "distances are of f32 numbers")]
        let difference = ((at(step) - at(-step)) / (2.0 * step)) as f32;
        difference
    });
    let found = gradient.iter().step_by(7).copied().collect::<Vec<_>>();
    Distance::within(&found, &differences.collect::<Vec<_>>(), 1e-4)
}

/// Gradients in bf16 against those in f32 of the same weights.
fn rounded(gpu: &Gpu, draw: &mut Draw, shape: &TextShape) -> Result<Distance, CheckError> {
    let tensors = draw_tensors(draw, shape);
    let batch = draw_batch(draw, shape, &[150, 1, 333, 64, 65])?;
    let features = widen(&draw.normal::<bf16>(batch.placeholders.len() * shape.hidden, 1.0));
    let slopes = draw_slopes(draw, &batch);
    let how = (1.0, Keep::default());
    let (exact, expected) = compute::<f32>(gpu, shape, &tensors, &batch, &features, &slopes, how)?;
    let (log_probs, gradients) = compute::<bf16>(gpu, shape, &tensors, &batch, &features, &slopes, how)?;
    let mut worst = named("log-probabilities", Distance::within(&log_probs, &exact, 1e-2)?)?;
    for ((name, gradient), (_, expected)) in gradients.iter().zip(&expected) {
        worst = worst.worst(named(name, Distance::within(gradient, expected, 4e-2)?)?);
    }
    Ok(worst)
}

/// What is kept is what would be computed again.
fn kept<T: Float>(gpu: &Gpu, draw: &mut Draw, shape: &TextShape) -> Result<Distance, CheckError> {
    let tensors = draw_tensors(draw, shape);
    let batch = draw_batch(draw, shape, &[150, 80])?;
    let features = draw.normal::<f32>(batch.placeholders.len() * shape.hidden, 1.0);
    let slopes = draw_slopes(draw, &batch);
    let with = |keep| compute::<T>(gpu, shape, &tensors, &batch, &features, &slopes, (1.0, keep));
    let nothing = with(Keep::default())?;
    let some = Keep { attention: 1, mlp: 0 };
    for keep in [some, Keep::all(shape)] {
        for ((name, gradient), (_, expected)) in with(keep)?.1.iter().zip(&nothing.1) {
            let equal = Distance::equal(gradient, expected);
            equal.map_err(|error| CheckError::Differs(format!("{name}, {keep:?}: {error}")))?;
        }
    }
    Ok(Distance::EQUAL)
}

/// A batch in parts against the whole, by a learner that has seen another batch before.
fn micro_batches_sum(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let shape = small(true);
    let tensors = draw_tensors(draw, &shape);
    let parts = [
        draw_batch(draw, &shape, &[50, 20])?,
        draw_batch(draw, &shape, &[31, 40])?,
    ];
    let slopes = parts.each_ref().map(|part| draw_slopes(draw, part));
    let features = parts.iter().map(|part| {
        let numbers = draw.normal::<f32>(part.placeholders.len() * shape.hidden, 1.0);
        gpu.upload(&numbers)
    });
    let features = features.collect::<Result<Vec<_>, _>>()?;
    let mut learner = Learner::<f32, f32>::new(gpu, upload(gpu, &shape, &tensors)?, settings::<f32>(256))?;
    let mut sums: Vec<Gradients> = Vec::new();
    for wanted in [&[0_usize][..], &[1], &[0, 1]] {
        learner.discard();
        for index in wanted {
            learner.score(&parts[*index], Some(&features[*index]), 1.0)?;
            learner.backward(&slopes[*index], None)?;
        }
        sums.push(download(gpu, &learner)?);
    }
    let distances = sums[2].iter().enumerate().map(|(index, (name, both))| {
        let parts = sums[0][index].1.iter().zip(&sums[1][index].1);
        let sum = parts.map(|(one, other)| one + other).collect::<Vec<_>>();
        named(name, Distance::within(both, &sum, 1e-5)?)
    });
    worst(distances)
}

/// Samples whose micro-batches are small against all of them in one, with and without the tables trained: equal sums, and a
/// policy's slopes where they belong.
fn samples_over_micro_batches(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let shape = small(true);
    let tensors = draw_tensors(draw, &shape);
    let hidden = shape.hidden;
    let picture = gpu.upload(&draw.normal::<f32>(4 * hidden, 1.0))?;
    let placed = [Picture {
        start: 1,
        features: picture,
        gradient: None,
    }];
    // The last has no completion.
    let rows = [9, 30, 77, 14, 52, 7].map(|length| {
        let ids = (0..length)
            .map(|_| small_number(draw.below(shape.vocabulary)))
            .collect::<Vec<_>>();
        let positions = (0..small_number(length)).map(|at| [at; 3]).collect::<Vec<_>>();
        (ids, positions)
    });
    let samples = rows.iter().enumerate().map(|(index, (ids, positions))| Sample {
        ids,
        positions,
        prompt: 6 + index % 2,
        pictures: if index % 2 == 0 { &placed } else { &[] },
    });
    let samples = samples.collect::<Vec<_>>();
    let policy = PolicyLoss {
        clip_low: 0.2,
        clip_high: 0.3,
        dual_clip: Some(3.0),
        kl_coefficient: 0.01,
    };
    let with = |tokens: usize, tables: bool| -> Result<Gradients, CheckError> {
        let settings = Settings {
            tables,
            ..settings::<f32>(tokens)
        };
        let mut learner = Learner::<f32, f32>::new(gpu, upload(gpu, &shape, &tensors)?, settings)?;
        let old = learner.log_probs(None, &samples, 0.9)?;
        learner.learn(&samples, 0.9, |index, log_probs| {
            let mut slopes = Vec::new();
            let known = Known {
                old: &old[index],
                reference: Some(&vec![-4.0; log_probs.len()]),
                advantage: &vec![index as f32 - 1.5; log_probs.len()],
                weight: &vec![0.01; log_probs.len()],
            };
            policy.gradient(log_probs, known, &mut slopes);
            slopes
        })?;
        download(gpu, &learner)
    };
    let (whole, parts, frozen) = (with(256, true)?, with(80, true)?, with(256, false)?);
    if frozen.len() + 1 != whole.len() {
        return Err(CheckError::Differs(format!(
            "{} gradients with frozen tables",
            frozen.len()
        )));
    }
    for ((name, frozen), (_, whole)) in frozen.iter().zip(&whole[1..]) {
        Distance::equal(frozen, whole).map_err(|error| CheckError::Differs(format!("{name}: {error}")))?;
    }
    let pairs = parts.iter().zip(&whole);
    worst(pairs.map(|((name, parts), (_, whole))| named(name, Distance::within(parts, whole, 1e-5)?)))
}

/// What summing over micro-batches in bf16 loses against summing in f32: a rounding per micro-batch.
fn rounded_sums(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let shape = medium();
    let tensors = draw_tensors(draw, &shape);
    let weights = upload::<bf16>(gpu, &shape, &tensors)?;
    let wide_sums = Settings {
        gradients: flotilla_kernels::Dtype::F32,
        ..settings::<bf16>(512)
    };
    let mut narrow = Learner::<bf16, bf16>::new(gpu, weights.clone(), settings::<bf16>(512))?;
    let mut wide = Learner::<bf16, f32>::new(gpu, weights, wide_sums)?;
    for _ in 0..4 {
        let batch = draw_batch(draw, &shape, &[120, 300])?;
        let features = draw.normal::<bf16>(batch.placeholders.len() * shape.hidden, 1.0);
        let features = gpu.upload(&features)?;
        let slopes = draw_slopes(draw, &batch);
        narrow.score(&batch, Some(&features), 1.0)?;
        narrow.backward(&slopes, None)?;
        wide.score(&batch, Some(&features), 1.0)?;
        wide.backward(&slopes, None)?;
    }
    let (narrow, wide) = (download(gpu, &narrow)?, download(gpu, &wide)?);
    let pairs = narrow.iter().zip(&wide);
    worst(pairs.map(|((name, narrow), (_, wide))| named(name, Distance::within(narrow, wide, 6e-3)?)))
}

/// Trains a share of four micro-batches per update, of as many as there are members, for five updates. Returns the weights, and
/// how far they are from those of one GPU with all micro-batches.
#[cfg(feature = "nccl")]
pub fn share_of_a_group(
    gpu: &Gpu,
    group: &flotilla_kernels::gpu::nccl::Communicator,
) -> Result<(Vec<Vec<f32>>, f64), CheckError> {
    let mut draw = Draw::new(11);
    let shape = small(false);
    let tensors = draw_tensors(&mut draw, &shape);
    let mut batches = Vec::new();
    for index in 0..4 {
        let batch = draw_batch(&mut draw, &shape, &[40 + index, 70])?;
        let features = draw.normal::<f32>(batch.placeholders.len() * shape.hidden, 1.0);
        batches.push((draw_slopes(&mut draw, &batch), gpu.upload(&features)?, batch));
    }
    let train = |(rank, size): (usize, usize), alone: bool| -> Result<Vec<Vec<f32>>, CheckError> {
        let mut learner = Learner::<f32, f32>::new(gpu, upload(gpu, &shape, &tensors)?, settings::<f32>(256))?;
        for _ in 0..5 {
            for (slopes, features, batch) in batches.iter().skip(rank).step_by(size) {
                learner.score(batch, Some(features), 1.0)?;
                learner.backward(slopes, None)?;
            }
            if !alone {
                learner.reduce(group)?;
            }
            learner.update(&ADAMW, 1.0)?;
        }
        let weights = learner.weights().named().into_iter();
        weights.map(|(_, buffer)| Ok(gpu.download(&buffer)?)).collect()
    };
    let shared = train((group.rank(), group.size()), false)?;
    let alone = train((0, 1), true)?;
    let distance = Distance::within(&shared.concat(), &alone.concat(), 1e-3)?;
    Ok((shared, distance.relative))
}

pub(super) const ADAMW: AdamW = AdamW {
    learning_rate: 3e-3,
    beta1: 0.9,
    beta2: 0.95,
    epsilon: 1e-8,
    weight_decay: 0.01,
    step: 1,
    seed: 7,
    rounding: Rounding::Stochastic,
};

/// Six updates, and three with three more of another learner that was given what the first had saved.
fn goes_on(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let shape = small(false);
    let tensors = draw_tensors(draw, &shape);
    let batch = draw_batch(draw, &shape, &[40, 90, 25])?;
    let features = gpu.upload(&draw.normal::<bf16>(batch.placeholders.len() * shape.hidden, 1.0))?;
    let slopes = draw_slopes(draw, &batch);
    for states in [StateKind::F32, StateKind::Bf16, StateKind::Bit8] {
        let settings = Settings {
            states,
            ..settings::<bf16>(batch.tokens())
        };
        let start = |tensors: &[Vec<f32>]| -> Result<Learner<bf16, bf16>, CheckError> {
            Ok(Learner::new(gpu, upload(gpu, &shape, tensors)?, settings)?)
        };
        let train = |learner: &mut Learner<bf16, bf16>, updates: usize| -> Result<Vec<Vec<f32>>, CheckError> {
            for _ in 0..updates {
                learner.score(&batch, Some(&features), 1.0)?;
                learner.backward(&slopes, None)?;
                learner.update(&ADAMW, 1.0)?;
            }
            let weights = learner.weights().named().into_iter();
            weights.map(|(_, buffer)| Ok(widen(&gpu.download(&buffer)?))).collect()
        };
        let expected = train(&mut start(&tensors)?, 6)?;
        let mut first = start(&tensors)?;
        let half_way = train(&mut first, 3)?;
        let mut saved = std::collections::HashMap::new();
        let updates = first.save(|name, bytes| {
            saved.insert(name.to_owned(), bytes);
            Ok(())
        })?;
        let mut second = start(&half_way)?;
        second.restore(updates, |name| {
            let found = saved.get(name).cloned();
            found.ok_or_else(|| DeviceError::Missing(name.to_owned()))
        })?;
        for (found, expected) in train(&mut second, 3)?.iter().zip(&expected) {
            Distance::equal(found, expected)?;
        }
    }
    Ok(Distance::EQUAL)
}

/// Thirty updates on one batch: the loss falls below two thirds, a second run gives the same bits, and nothing is allocated
/// after the first update.
fn falls<T: Float>(gpu: &Gpu, draw: &mut Draw, states: StateKind) -> Result<Distance, CheckError> {
    let shape = small(false);
    let tensors = draw_tensors(draw, &shape);
    let batch = draw_batch(draw, &shape, &[40, 90, 25])?;
    let features = draw.normal::<f32>(batch.placeholders.len() * shape.hidden, 1.0);
    let features = features.iter().map(|value| T::from_f32(*value)).collect::<Vec<_>>();
    let features = gpu.upload(&features)?;
    let weight = vec![(batch.scored.len() as f32).recip(); batch.scored.len()];
    let run = || -> Result<(Vec<f64>, Gradients), CheckError> {
        let settings = Settings {
            states,
            ..settings::<T>(batch.tokens())
        };
        let mut learner = Learner::<T, T>::new(gpu, upload(gpu, &shape, &tensors)?, settings)?;
        let (mut losses, mut slopes, mut allocated) = (Vec::new(), Vec::new(), 0);
        for update in 0..30 {
            let scored = learner.score(&batch, Some(&features), 1.0)?;
            losses.push(cross_entropy_slopes(&scored.log_probs, &weight, &mut slopes));
            learner.backward(&slopes, None)?;
            learner.update(&ADAMW, 1.0)?;
            if update == 0 {
                allocated = gpu.allocations();
            }
        }
        if gpu.allocations() != allocated {
            let more = gpu.allocations() - allocated;
            return Err(CheckError::Differs(format!(
                "{more} allocations after the first update"
            )));
        }
        let updated = learner.updated()?;
        if !updated.is_some_and(|updated| updated.applied && updated.grad_norm > 0.0) {
            return Err(CheckError::Differs(format!("{updated:?}")));
        }
        let weights = learner.weights().named().into_iter();
        let weights = weights.map(|(name, buffer)| Ok((name, widen(&gpu.download(&buffer)?))));
        Ok((losses, weights.collect::<Result<_, CheckError>>()?))
    };
    let (losses, weights) = run()?;
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    if last.is_nan() || last > first * 2.0 / 3.0 {
        return Err(CheckError::Differs(format!("the loss went from {first} to {last}")));
    }
    let (again, weights_again) = run()?;
    Distance::equal(&losses, &again)?;
    for ((name, one), (_, other)) in weights.iter().zip(&weights_again) {
        Distance::equal(one, other).map_err(|error| CheckError::Differs(format!("{name}: {error}")))?;
    }
    Ok(Distance::EQUAL)
}
