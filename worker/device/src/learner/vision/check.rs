//! Parity of the tower's gradients with the host's autograd, determinism, what an update changes and what it does not.

use flotilla_grpo::policy::cross_entropy_slopes;
use flotilla_kernels::{
    Buffer, Float, Gpu,
    check::{Check, CheckError, Distance, Draw, widen},
    optimizer::StateKind,
};
use flotilla_model::{Config, Grid, Layout, LoadOptions, Pass, Row, Visual, Vlm, rope::Position};
use half::bf16;
use serde_json::json;

use crate::{
    error::DeviceError,
    learner::{
        Learner, Picture, Sample, Settings, agreement,
        check::{self, Gradients, differs, host, named, small_number, worst},
    },
    vision::QwenTower,
    weights::TextWeights,
};

/// Every check of the tower.
pub(in crate::learner) fn checks() -> Vec<Check> {
    vec![
        Check {
            name: "learner tower f32 gradients against the host's autograd",
            run: autograd,
        },
        Check {
            name: "learner tower f32 with the language model, shared pictures",
            run: together,
        },
        Check {
            name: "learner tower bf16 gradients against f32",
            run: rounded,
        },
        Check {
            name: "learner tower bf16 the same bits twice",
            run: same_bits,
        },
        Check {
            name: "learner tower bf16 an update moves it, zeros stay",
            run: moves,
        },
        Check {
            name: "learner tower bf16 goes on as if it had not ended",
            run: goes_on,
        },
        Check {
            name: "learner tower f32 lowers a loss alone",
            run: |gpu, draw| falls::<f32>(gpu, draw, StateKind::F32),
        },
        Check {
            name: "learner tower bf16 lowers a loss alone",
            run: |gpu, draw| falls::<bf16>(gpu, draw, StateKind::Bit8),
        },
    ]
}

/// Patches of a chunk, so few that the pictures of a scene need two.
const FEW: usize = 128;

/// A model of the host whose weights are those of bf16, with pictures of several sizes: windows are ragged, one is a video.
struct Scene {
    model: Vlm,
    visuals: Vec<Visual>,
    sequences: Vec<Sequence>,
}

/// Tokens that show pictures, each with the index of its first token and its own.
struct Sequence {
    ids: Vec<u32>,
    positions: Vec<Position>,
    pictures: Vec<(usize, usize)>,
}

impl Scene {
    fn draw(draw: &mut Draw) -> Result<Self, CheckError> {
        // Heads of 80 as in the released tower; 100 is filled up to 128.
        let config = Config::from_json(&json!({
            "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 131, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
            "tie_word_embeddings": false, "image_token_id": 130,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "vision_config": {"depth": 3, "hidden_size": 160, "intermediate_size": 100, "num_heads": 2, "patch_size": 4,
                "window_size": 16, "out_hidden_size": 64, "fullatt_block_indexes": [1]}
        }));
        let seed = draw.below(1000) as u64;
        let model = Vlm::random(config.map_err(differs)?, seed, &LoadOptions::default()).map_err(differs)?;
        for (_, variable) in model.weights().iter() {
            let flat = variable.flatten_all().and_then(|flat| flat.to_vec1::<f32>());
            let mut values = flat.map_err(host)?;
            if variable.dims().len() == 1 {
                // Biases and norms of a fresh model are zeros and ones.
                let noise = draw.normal::<f32>(values.len(), 0.2);
                values.iter_mut().zip(noise).for_each(|(value, noise)| *value += noise);
            }
            let values = values.into_iter().map(bf16::from_f32).collect::<Vec<_>>();
            crate::weights::assign(variable, &values)?;
        }
        let visuals = [[1, 6, 10], [2, 4, 6], [1, 14, 8]].map(|grid: Grid| Visual {
            values: widen(&draw.normal::<bf16>(grid.iter().product::<usize>() * 96, 1.0)),
            layout: Layout::Patches {
                grid,
                time_step: 0.0,
                video: false,
            },
        });
        let lengths = [15, 12, 28];
        let shown: [&[(usize, usize)]; 4] = [&[(3, 0), (22, 2)], &[(2, 2)], &[(1, 1)], &[]];
        let sequences = shown.into_iter().map(|pictures| {
            let last = pictures.last().map_or(0, |(start, picture)| start + lengths[*picture]);
            let ids = (0..last + 8).map(|_| small_number(draw.below(130))).collect::<Vec<_>>();
            Sequence {
                positions: (0..small_number(ids.len()))
                    .map(|at| [at, at / 2 + 1, at % 7])
                    .collect(),
                ids,
                pictures: pictures.to_vec(),
            }
        });
        Ok(Self {
            sequences: sequences.collect(),
            model,
            visuals: visuals.to_vec(),
        })
    }

    fn visuals(&self) -> Vec<&Visual> {
        self.visuals.iter().collect()
    }

    /// A learner of copies of all weights.
    fn learner<T: Float>(&self, gpu: &Gpu, states: StateKind, patches: usize) -> Result<Learner<T, T>, CheckError> {
        let settings = Settings {
            patches,
            states,
            ..check::settings::<T>(64)
        };
        let (config, weights) = (self.model.config(), self.model.weights());
        let mut learner = Learner::new(gpu, TextWeights::load(gpu, &config.text, weights)?, settings)?;
        learner.train_vision(self.tower(gpu, weights)?)?;
        Ok(learner)
    }

    fn tower<T: Float>(
        &self,
        gpu: &Gpu,
        weights: &flotilla_model::weights::Weights,
    ) -> Result<QwenTower<T>, CheckError> {
        let tower = QwenTower::load(gpu, self.model.config(), weights)?;
        tower.ok_or_else(|| differs("another tower"))
    }

    /// Slopes of a random loss at the features of each picture.
    fn slopes(&self, gpu: &Gpu, draw: &mut Draw) -> Result<Vec<Buffer<f32>>, CheckError> {
        let shape = crate::shape::QwenVision::from(match &self.model.config().vision {
            flotilla_model::Vision::Qwen25Vl(vision) => vision,
            flotilla_model::Vision::LlavaOneVision(_) => return Err(differs("another tower")),
        });
        let slopes = self.visuals.iter().map(|visual| {
            let tokens = crate::vision::tokens(&shape, &crate::vision::grid_of(visual)?);
            let numbers = widen(&draw.normal::<bf16>(tokens * shape.output, 0.1));
            Ok(gpu.upload(&numbers)?)
        });
        slopes.collect()
    }

    /// Adds the language model's gradients of a loss of the tokens from `scored` of each sequence on, and returns those by the
    /// features of each picture.
    fn learn<T: Float>(
        &self,
        gpu: &Gpu,
        learner: &mut Learner<T, T>,
        scored: impl Fn(&Sequence) -> usize,
        slopes: impl FnMut(usize, &[f32]) -> Vec<f32>,
    ) -> Result<Vec<Buffer<f32>>, CheckError> {
        let tower = learner.tower().ok_or_else(|| differs("no tower"))?;
        let features = tower.encode(&self.visuals())?;
        let gradients = features.iter().map(|features| gpu.zeros::<f32>(features.len()));
        let gradients = gradients.collect::<Result<Vec<_>, _>>()?;
        let pictures = self.sequences.iter().map(|sequence| {
            let pictures = sequence.pictures.iter().map(|(start, picture)| Picture {
                start: *start,
                features: features[*picture].clone(),
                gradient: Some(gradients[*picture].clone()),
            });
            pictures.collect::<Vec<_>>()
        });
        let pictures = pictures.collect::<Vec<_>>();
        let samples = self.sequences.iter().zip(&pictures).map(|(sequence, pictures)| Sample {
            ids: &sequence.ids,
            positions: &sequence.positions,
            prompt: scored(sequence),
            pictures,
        });
        learner.learn(&samples.collect::<Vec<_>>(), 1.0, slopes)?;
        Ok(gradients)
    }

    /// One update of everything from a fixed loss of the last tokens of each sequence; without pictures, of the sequence
    /// that shows none.
    fn update<T: Float>(&self, gpu: &Gpu, learner: &mut Learner<T, T>, pictures: bool) -> Result<(), CheckError> {
        let scored = |sequence: &Sequence| {
            let shown = pictures || sequence.pictures.is_empty();
            sequence.ids.len() - if shown { 6 } else { 0 }
        };
        let gradients = self.learn(gpu, learner, scored, |index, log_probs| {
            let sign = |at: usize| if (at + index).is_multiple_of(3) { 0.05 } else { -0.1 };
            (0..log_probs.len()).map(sign).collect()
        })?;
        if pictures {
            learner.vision_backward(&self.visuals(), &gradients)?;
        }
        Ok(learner.update(&check::ADAMW, 1.0)?)
    }
}

/// The tower's own gradients of a learner.
fn of_tower(gradients: Gradients) -> Gradients {
    gradients
        .into_iter()
        .filter(|(name, _)| name.starts_with("visual."))
        .collect()
}

/// Found gradients against those of the host, which are packed as weights are.
fn compare<T: Float>(
    gpu: &Gpu,
    found: &[(String, Vec<f32>)],
    expected: &[(String, Buffer<T>)],
    bound: f64,
) -> Result<Distance, CheckError> {
    let (count, wanted) = (found.len(), expected.len());
    if count != wanted {
        return Err(differs(format!("{count} gradients, {wanted} expected")));
    }
    worst(found.iter().zip(expected).map(|((name, found), (other, expected))| {
        if name != other {
            return Err(differs(format!("{name} in the place of {other}")));
        }
        named(name, Distance::within(found, &widen(&gpu.download(expected)?), bound)?)
    }))
}

/// Gradients of a random loss of the features, for pictures in one chunk, in two, and in two calls.
fn autograd(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let scene = Scene::draw(draw)?;
    let slopes = scene.slopes(gpu, draw)?;
    let features = scene.model.encode(&scene.visuals(), Pass::Train).map_err(differs)?;
    let mut loss = candle_core::Tensor::new(0f32, scene.model.device()).map_err(host)?;
    for (features, slopes) in features.iter().zip(&slopes) {
        let slopes = candle_core::Tensor::from_vec(gpu.download(slopes)?, features.dims(), features.device());
        let terms = slopes.and_then(|slopes| (features * slopes)?.sum_all());
        loss = terms.and_then(|terms| loss + terms).map_err(host)?;
    }
    let store = loss.backward().map_err(host)?;
    let expected = scene
        .tower::<f32>(gpu, &agreement::gradient_weights(&scene.model, &store)?)?
        .named();
    let visuals = scene.visuals();
    let mut distances = Vec::new();
    for (patches, calls) in [(1024, 1), (FEW, 1), (1024, 2)] {
        let mut learner = scene.learner::<f32>(gpu, StateKind::F32, patches)?;
        if calls == 1 {
            learner.vision_backward(&visuals, &slopes)?;
        } else {
            learner.vision_backward(&visuals[1..], &slopes[1..])?;
            learner.vision_backward(&visuals[..1], &slopes[..1])?;
        }
        let found = of_tower(check::download(gpu, &learner)?);
        distances.push(compare(gpu, &found, &expected, 1e-4));
    }
    worst(distances)
}

/// A loss of log-probabilities: gradients of the language model and of the tower, with a picture in two samples of
/// different micro-batches, and the norm of all of them.
fn together(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let scene = Scene::draw(draw)?;
    let counts = scene
        .sequences
        .iter()
        .map(|sequence| sequence.ids.len() - 1)
        .collect::<Vec<_>>();
    let slopes = draw.normal::<f32>(counts.iter().sum(), 0.02);
    let features = scene.model.encode(&scene.visuals(), Pass::Train).map_err(differs)?;
    let rows = scene.sequences.iter().map(|sequence| Row {
        ids: sequence.ids.clone(),
        positions: sequence.positions.clone(),
        features: sequence
            .pictures
            .iter()
            .map(|(start, picture)| (*start, features[*picture].clone()))
            .collect(),
    });
    let (_, expected) = agreement::by_autograd(&scene.model, &rows.collect::<Vec<_>>(), &slopes)?;
    let mut learner = scene.learner::<f32>(gpu, StateKind::F32, FEW)?;
    let gradients = scene.learn(
        gpu,
        &mut learner,
        |_| 1,
        |index, _| {
            let begin = counts[..index].iter().sum::<usize>();
            slopes[begin..begin + counts[index]].to_vec()
        },
    )?;
    learner.vision_backward(&scene.visuals(), &gradients)?;
    let found = check::download(gpu, &learner)?;
    let text = TextWeights::<f32>::load(gpu, &scene.model.config().text, &expected)?;
    let tower = scene.tower::<f32>(gpu, &expected)?;
    let all = [text.named(), tower.named()].concat();
    let gradients = compare(gpu, &found, &all, 1e-4)?;
    let squares = found
        .iter()
        .flat_map(|(_, values)| values)
        .map(|value| f64::from(*value).powi(2));
    let norm = squares.sum::<f64>().sqrt();
    learner.update(&check::ADAMW, 1.0)?;
    let updated = learner.updated()?.ok_or_else(|| differs("no update"))?;
    #[allow(clippy::cast_possible_truncation, reason = "distances are of f32 numbers")]
    let norm = Distance::within(&[updated.grad_norm], &[norm as f32], 1e-5)?;
    Ok(gradients.worst(named("norm of all gradients", norm)?))
}

/// The tower's gradients of given slopes by a learner of `T`.
fn compute<T: Float>(gpu: &Gpu, scene: &Scene, slopes: &[Buffer<f32>]) -> Result<Gradients, CheckError> {
    let mut learner = scene.learner::<T>(gpu, StateKind::Bf16, FEW)?;
    learner.vision_backward(&scene.visuals(), slopes)?;
    Ok(of_tower(check::download(gpu, &learner)?))
}

fn rounded(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let scene = Scene::draw(draw)?;
    let slopes = scene.slopes(gpu, draw)?;
    let (found, expected) = (
        compute::<bf16>(gpu, &scene, &slopes)?,
        compute::<f32>(gpu, &scene, &slopes)?,
    );
    let pairs = found.iter().zip(&expected);
    worst(pairs.map(|((name, found), (_, expected))| named(name, Distance::within(found, expected, 4e-2)?)))
}

fn same_bits(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let scene = Scene::draw(draw)?;
    let slopes = scene.slopes(gpu, draw)?;
    let (one, other) = (
        compute::<bf16>(gpu, &scene, &slopes)?,
        compute::<bf16>(gpu, &scene, &slopes)?,
    );
    for ((name, one), (_, other)) in one.iter().zip(&other) {
        Distance::equal(one, other).map_err(|error| differs(format!("{name}: {error}")))?;
    }
    Ok(Distance::EQUAL)
}

/// Weights of the tower on the host.
fn weights<T: Float>(gpu: &Gpu, tower: &QwenTower<T>) -> Result<Gradients, CheckError> {
    let named = tower.named().into_iter();
    named
        .map(|(name, buffer)| Ok((name, widen(&gpu.download(&buffer)?))))
        .collect()
}

/// Five updates change every weight of the tower but the zeros that fill it up; one without pictures changes none; and what
/// is stored on the host is loaded again.
fn moves(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let scene = Scene::draw(draw)?;
    for states in [StateKind::F32, StateKind::Bf16, StateKind::Bit8] {
        let mut learner = scene.learner::<bf16>(gpu, states, FEW)?;
        let tower = learner.tower().ok_or_else(|| differs("no tower"))?.clone();
        let before = weights(gpu, &tower)?;
        for _ in 0..5 {
            scene.update(gpu, &mut learner, true)?;
        }
        let after = weights(gpu, &tower)?;
        for ((name, before), (_, after)) in before.iter().zip(&after) {
            let moved = before
                .iter()
                .zip(after)
                .filter(|(before, after)| before != after)
                .count();
            let zeros = zeros_of(&tower, name);
            if let Some(at) = zeros.iter().find(|at| after[**at].to_bits() != 0) {
                return Err(differs(format!(
                    "{name}, {states:?}: {} at {at}, a zero before",
                    after[*at]
                )));
            }
            if moved * 2 < before.len() - zeros.len() {
                return Err(differs(format!(
                    "{name}, {states:?}: {moved} of {} moved",
                    before.len()
                )));
            }
        }
        scene.update(gpu, &mut learner, false)?;
        for ((name, still), (_, after)) in weights(gpu, &tower)?.iter().zip(&after) {
            Distance::equal(still, after).map_err(|error| differs(format!("{name} without pictures: {error}")))?;
        }
        if learner.vision_updates()? != Some(5) || learner.states()?.1 != 6 {
            return Err(differs(format!("{:?} updates of the tower", learner.vision_updates()?)));
        }
        let copy = scene.model.weights().deep_copy().map_err(differs)?;
        tower.store(gpu, &copy)?;
        for ((name, found), (_, after)) in weights(gpu, &scene.tower::<bf16>(gpu, &copy)?)?.iter().zip(&after) {
            Distance::equal(found, after).map_err(|error| differs(format!("{name} came back otherwise: {error}")))?;
        }
    }
    Ok(Distance::EQUAL)
}

/// Indices of the zeros that fill up a weight of a block.
fn zeros_of<T: Float>(tower: &QwenTower<T>, name: &str) -> Vec<usize> {
    let shape = tower.shape();
    let (inner, padded) = (shape.intermediate, shape.padded());
    let rows = |width: usize| {
        let filling = (inner..padded).chain(padded + inner..2 * padded);
        filling.flat_map(|row| row * width..(row + 1) * width).collect()
    };
    match name.rsplit('.').next() {
        Some("gate_up") => rows(shape.hidden),
        Some("gate_up_bias") => rows(1),
        Some("down") => (0..shape.hidden)
            .flat_map(|row| row * padded + inner..(row + 1) * padded)
            .collect(),
        _ => Vec::new(),
    }
}

/// Six updates, the second and the fifth without pictures, and three with three more of another learner that was given what
/// the first had saved.
fn goes_on(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let scene = Scene::draw(draw)?;
    let train = |scene: &Scene, learner: &mut Learner<bf16, bf16>, updates: std::ops::Range<usize>| {
        for index in updates {
            scene.update(gpu, learner, index % 3 != 1)?;
        }
        let text = learner.weights().named().into_iter();
        let text = text.map(|(name, buffer)| Ok((name, widen(&gpu.download(&buffer)?))));
        let mut all = text.collect::<Result<Gradients, CheckError>>()?;
        all.extend(weights(gpu, learner.tower().ok_or_else(|| differs("no tower"))?)?);
        Ok::<_, CheckError>(all)
    };
    for states in [StateKind::F32, StateKind::Bf16, StateKind::Bit8] {
        let expected = train(&scene, &mut scene.learner(gpu, states, FEW)?, 0..6)?;
        let mut first = scene.learner(gpu, states, FEW)?;
        train(&scene, &mut first, 0..3)?;
        let mut saved = std::collections::HashMap::new();
        let updates = first.save(|name, bytes| {
            saved.insert(name.to_owned(), bytes);
            Ok(())
        })?;
        let half_way = Scene {
            model: scene.model.deep_copy().map_err(differs)?,
            visuals: scene.visuals.clone(),
            sequences: Vec::new(),
        };
        let (text, host_weights) = (&half_way.model.config().text, half_way.model.weights());
        first.weights().store(gpu, text, host_weights)?;
        first
            .tower()
            .ok_or_else(|| differs("no tower"))?
            .store(gpu, host_weights)?;
        let mut second = half_way.learner(gpu, states, FEW)?;
        second.restore(updates, |name| {
            let found = saved.get(name).cloned();
            found.ok_or_else(|| DeviceError::Missing(name.to_owned()))
        })?;
        for ((name, found), (_, expected)) in train(&scene, &mut second, 3..6)?.iter().zip(&expected) {
            Distance::equal(found, expected).map_err(|error| differs(format!("{name}, {states:?}: {error}")))?;
        }
    }
    Ok(Distance::EQUAL)
}

/// Updates of the tower alone, by what flows through a language model that stands still: the loss of the tokens after the
/// pictures falls below two thirds.
fn falls<T: Float>(gpu: &Gpu, draw: &mut Draw, states: StateKind) -> Result<Distance, CheckError> {
    const SCORED: usize = 5;
    let scene = Scene::draw(draw)?;
    let mut learner = scene.learner::<T>(gpu, states, FEW)?;
    let text = learner.weights().named();
    let text = text
        .iter()
        .map(|(_, buffer)| gpu.download(buffer))
        .collect::<Result<Vec<_>, _>>()?;
    let scored = |sequence: &Sequence| {
        let shown = !sequence.pictures.is_empty();
        sequence.ids.len() - if shown { SCORED } else { 0 }
    };
    let mut losses = Vec::new();
    for _ in 0..40 {
        let mut loss = 0.0;
        let gradients = scene.learn(gpu, &mut learner, scored, |_, log_probs| {
            let mut slopes = Vec::new();
            let weight = vec![(3.0 * SCORED as f32).recip(); log_probs.len()];
            loss += cross_entropy_slopes(log_probs, &weight, &mut slopes);
            slopes
        })?;
        learner.discard();
        learner.vision_backward(&scene.visuals(), &gradients)?;
        learner.update(&check::ADAMW, 1.0)?;
        losses.push(loss);
    }
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    if last.is_nan() || last > first * 2.0 / 3.0 {
        return Err(differs(format!("the loss went from {first} to {last}")));
    }
    for ((name, buffer), before) in learner.weights().named().iter().zip(&text) {
        let still = Distance::equal(&gpu.download(buffer)?, before);
        still.map_err(|error| differs(format!("{name} of the language model: {error}")))?;
    }
    Ok(Distance::EQUAL)
}
