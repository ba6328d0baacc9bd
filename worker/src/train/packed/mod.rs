//! Training on a GPU by its own kernels: one packed copy of the weights, which the engine reads and the learner changes in place.
//!
//! | file | what |
//! |---|---|
//! | `memory.rs` | what learner and engine get of the card |
//! | `moments.rs` | the optimiser's moments on disk |
//! | `pictures.rs` | pixels and digests of the pictures that are shown |
//! | `rows.rs` | prompts with their completions as the learner reads them |

mod memory;
mod moments;
mod pictures;
mod rows;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use candle_core::DType;
use flotilla_api::{
    algorithm::{Module, Optimizer},
    role::Train,
};
use flotilla_device::{
    DeviceError, DeviceRunner, TextShape, TextWeights, Vision,
    learner::{Learner, Part, Shapes, Updated, encoding_bytes},
    vision::QwenTower,
};
use flotilla_engine::{Completion, Engine, Group, Limits, Prompt, run_each};
use flotilla_grpo::{
    adamw::Update,
    policy::{Known, PolicyStatistics, cross_entropy_slopes},
};
use flotilla_kernels::{
    Buffer, Float, Gpu,
    optimizer::{AdamW, Rounding, StateKind},
};
use flotilla_model::{Row, Vlm};
use half::bf16;

use self::{
    memory::{Shows, Wanted, divide},
    moments::{Reader, Writer},
    pictures::Pictures,
    rows::{Features, Laid, lay, parts_by_pictures},
};
use super::{
    actor::{Actor, Apart, Draw, Learned, Moments, PolicyObjective, PolicyRow, Saved, Scored, Turn},
    checkpoint::{MAX_SHARD_BYTES, Position},
    choice::foreign,
    error::TrainError,
    examples::Example,
    gallery::Gallery,
    inputs::{Inputs, method},
    order::derive_seed,
    rollout::{Asked, ask, requests},
};

/// Tokens that a step of the engine computes: prompts run at full speed, and the arena stays small beside the learner.
const STEP_TOKENS: usize = 4096;
/// Tokens of a block of keys and values.
const BLOCK_SIZE: usize = 16;
/// Bytes of features that are kept on the card.
const FEATURE_BYTES: usize = 2 << 30;

/// The actor of a run on the GPU of this number, in f32 or bf16. `resumed` is the trainer's directory of a checkpoint, and where the
/// run stood.
pub fn actor<'a>(
    number: usize,
    dtype: DType,
    models: (Vlm, Option<Vlm>),
    resumed: Option<(PathBuf, &Position)>,
    spec: &Train,
    inputs: &'a Inputs,
) -> Result<Box<dyn Actor + 'a>, TrainError> {
    let gpu = Gpu::new(number).map_err(DeviceError::from)?;
    // A run that goes on must compute what it would have computed.
    gpu.fix_products();
    match dtype {
        DType::BF16 => Ok(Box::new(Packed::<bf16>::new(&gpu, models, resumed, spec, inputs)?)),
        _ => Ok(Box::new(Packed::<f32>::new(&gpu, models, resumed, spec, inputs)?)),
    }
}

/// A model on the card.
#[derive(Debug)]
struct Packed<'a, T: Float> {
    gpu: Gpu,
    /// The model on the host: its weights are what was written or sent last.
    host: Vlm,
    gallery: &'a Gallery,
    pictures: Pictures,
    engine: Engine<DeviceRunner<T>>,
    learner: Learner<T, T>,
    /// The vision tower that is trained; the engine encodes with the same buffers.
    tower: Option<QwenTower<T>>,
    reference: Option<Reference<T>>,
    adamw: AdamW,
    max_grad_norm: f32,
    /// Pictures of which features are held at once beside the engine's.
    at_once: usize,
    /// Changes of the weights since the process began: names them for the engine.
    changes: u64,
    planned: usize,
}

/// The frozen initial weights.
#[derive(Debug)]
struct Reference<T> {
    text: TextWeights<T>,
    /// None where the tower is not trained: it is the reference's own then.
    vision: Option<Vision<T>>,
}

impl<'a, T: Float> Packed<'a, T> {
    fn new(
        gpu: &Gpu,
        (model, reference): (Vlm, Option<Vlm>),
        resumed: Option<(PathBuf, &Position)>,
        spec: &Train,
        inputs: &'a Inputs,
    ) -> Result<Self, TrainError> {
        let (freeze, optimizer) = method(spec)?;
        let states = resumed
            .as_ref()
            .map(|(_, position)| states_of(position.moments))
            .transpose()?;
        gpu.reset_peak();
        let text = &model.config().text;
        let weights = TextWeights::<T>::load(gpu, text, model.weights())?;
        let vision = Vision::load(gpu, &model)?;
        let tower = match freeze.contains(&Module::Vision) {
            true => None,
            false => vision.trainable().cloned(),
        };
        let reference = match reference {
            Some(reference) => Some(Reference {
                text: TextWeights::load(gpu, text, reference.weights())?,
                vision: tower.as_ref().map(|_| Vision::load(gpu, &reference)).transpose()?,
            }),
            None => None,
        };
        let shown = inputs.shown();
        let of_token = vision.trainable().map_or(0, |tower| tower.shape().merge.pow(2));
        let wanted = wanted::<T>(spec, inputs, shown.largest * of_token, freeze, states);
        let shape = TextShape::from(text);
        let shows = Shows {
            pictures: shown.names.len(),
            of_update: inputs.pictures_of_update(spec),
            numbers: shown.largest * shape.hidden,
            bytes: T::DTYPE.bytes(),
            trained: tower.is_some(),
            reference: reference.as_ref().is_some_and(|reference| reference.vision.is_some()),
        };
        let limits = limits(&wanted, shows.features());
        let longest = wanted.longest() + BLOCK_SIZE;
        // The plan has it where the tower is trained.
        let frozen = vision.trainable().filter(|_| tower.is_none());
        let encoding = frozen.map_or(0, |tower| encoding_bytes(tower.shape(), shows.bytes, wanted.patches));
        let runner = DeviceRunner::shared(gpu, weights.clone(), vision, &limits, longest, tower.is_none())?;
        let shapes = Shapes {
            text: &shape,
            vision: tower.as_ref().map(QwenTower::shape),
        };
        let tower_bytes = shapes.vision.map_or(0, |vision| vision.parameters() * T::DTYPE.bytes());
        let (free, _) = gpu.memory().map_err(DeviceError::from)?;
        // The plan counts the weights, which are there already; features are still to come.
        let to_come = shows.to_come(limits.feature_bytes) + encoding;
        let card = (free + shape.parameters() * T::DTYPE.bytes() + tower_bytes).saturating_sub(to_come);
        let share = divide(shapes, &wanted, &limits, card)?;
        let counted = share.plan.part(Part::Weights) + tower_bytes;
        let besides = gpu.allocated_bytes().saturating_sub(counted) + to_come;
        tracing::info!(
            "memory of the GPU:\n{}\nreference, vision tower, steps of the engine and features take {:.2} GB besides",
            share.plan,
            besides as f64 / 1e9
        );
        let mut learner = Learner::new(gpu, weights, share.settings)?;
        if let Some(tower) = &tower {
            learner.train_vision(tower.clone())?;
        }
        let changes = match resumed {
            Some((trainer, position)) => restore(&mut learner, &trainer, position)?,
            None => 0,
        };
        let limits = Limits {
            kv_blocks: share.kv_blocks,
            ..limits
        };
        Ok(Self {
            gpu: gpu.clone(),
            gallery: &inputs.gallery,
            pictures: Pictures::default(),
            engine: Engine::new(runner, &changes.to_string(), limits)?,
            learner,
            tower,
            reference,
            adamw: adamw(optimizer, spec.seed),
            max_grad_norm: optimizer.max_grad_norm as f32,
            at_once: shows.at_once(),
            changes,
            planned: share.plan.bytes() + besides,
            host: model,
        })
    }

    /// What the engine is asked: tokens, and pictures that it encodes unless it has.
    fn prompt(pictures: &mut Pictures, gallery: &Gallery, example: &Example) -> Result<Prompt, TrainError> {
        let row = Row {
            ids: example.prompt.ids.clone(),
            positions: example.prompt.positions.clone(),
            features: Vec::new(),
        };
        let starts = example.prompt.spans.iter().map(|(start, _)| *start);
        let visuals = starts
            .zip(&example.images)
            .map(|(start, key)| Ok((start, pictures.get(gallery, key)?.visual.clone())));
        Ok(Prompt::new(row, visuals.collect::<Result<_, TrainError>>()?))
    }

    /// Features of a picture by the tower as it is.
    fn features(&mut self, key: &str) -> Result<Buffer<T>, TrainError> {
        let picture = self.pictures.get(self.gallery, key)?;
        Ok(self.engine.runner_mut().features_of(&picture.digest, &picture.visual)?)
    }

    /// Features of all pictures of some rows by the tower as it is, with gradients of zero where it is trained and `learns`.
    fn features_of(&mut self, rows: &[Scored<'_>], learns: bool) -> Result<Features<T>, TrainError> {
        let mut found = Features::new();
        for key in rows.iter().flat_map(|row| &row.example.images) {
            if found.contains_key(key) {
                continue;
            }
            let features = self.features(key)?;
            let gradient = match learns && self.tower.is_some() {
                true => Some(self.gpu.zeros(features.len()).map_err(DeviceError::from)?),
                false => None,
            };
            found.insert(key.clone(), (features, gradient));
        }
        Ok(found)
    }

    /// Features of all pictures of some rows by the tower of the reference.
    fn features_of_reference(&mut self, rows: &[Scored<'_>]) -> Result<Features<T>, TrainError> {
        let Some(Reference {
            vision: Some(vision), ..
        }) = &self.reference
        else {
            return self.features_of(rows, false);
        };
        let mut found = Features::new();
        for key in rows.iter().flat_map(|row| &row.example.images) {
            if !found.contains_key(key) {
                let picture = self.pictures.get(self.gallery, key)?;
                let made = vision.encode(&[&picture.visual])?;
                found.extend(made.into_iter().map(|features| (key.clone(), (features, None))));
            }
        }
        Ok(found)
    }

    /// Log-probabilities of the rows' completions by these weights, the trained ones where there are none.
    fn log_probs(
        learner: &mut Learner<T, T>,
        weights: Option<&TextWeights<T>>,
        rows: &[Scored<'_>],
        features: &Features<T>,
        temperature: f64,
    ) -> Result<Vec<Vec<f32>>, TrainError> {
        let laid = lay(rows, features)?;
        let samples = laid.iter().map(Laid::sample).collect::<Vec<_>>();
        Ok(learner.log_probs(weights, &samples, temperature as f32)?)
    }

    /// Adds a loss's gradients and takes one step of the optimiser.
    fn update(
        &mut self,
        rows: &[Scored<'_>],
        (temperature, rate): (f64, f64),
        slopes: impl FnMut(usize, &[f32]) -> Vec<f32>,
    ) -> Result<Update, TrainError> {
        let features = self.features_of(rows, true)?;
        if let Err(error) = self.add_gradients(rows, &features, temperature, slopes) {
            self.learner.discard();
            return Err(error);
        }
        let adamw = AdamW {
            learning_rate: rate,
            ..self.adamw
        };
        self.learner.update(&adamw, self.max_grad_norm)?;
        let Some(Updated { grad_norm, applied }) = self.learner.updated()? else {
            return Err(TrainError::Invalid("an update that nothing is known of".into()));
        };
        self.changes += 1;
        self.engine.load_weights(&self.changes.to_string(), |_| Ok(()))?;
        Ok(Update {
            grad_norm: f64::from(grad_norm),
            applied,
        })
    }

    /// Gradients of the language model, and from those by the features the tower's, once for each picture.
    fn add_gradients(
        &mut self,
        rows: &[Scored<'_>],
        features: &Features<T>,
        temperature: f64,
        slopes: impl FnMut(usize, &[f32]) -> Vec<f32>,
    ) -> Result<(), TrainError> {
        let laid = lay(rows, features)?;
        let samples = laid.iter().map(Laid::sample).collect::<Vec<_>>();
        self.learner.learn(&samples, temperature as f32, slopes)?;
        for (key, (_, gradient)) in features {
            if let Some(gradient) = gradient {
                let picture = self.pictures.get(self.gallery, key)?;
                self.learner
                    .vision_backward(&[&picture.visual], std::slice::from_ref(gradient))?;
            }
        }
        Ok(())
    }

    /// Brings the weights to the host.
    fn store(&self) -> Result<(), TrainError> {
        let (gpu, weights) = (&self.gpu, self.host.weights());
        self.learner.weights().store(gpu, &self.host.config().text, weights)?;
        if let Some(tower) = &self.tower {
            tower.store(gpu, weights)?;
        }
        Ok(())
    }

    fn generate(&mut self, asked: &Asked<'_>, turn: Turn<'_>) -> Result<Vec<Group>, TrainError> {
        // A run that is resumed here has nothing from before, as after an evaluation; bits depend on what is computed together.
        self.engine.forget()?;
        let gallery = self.gallery;
        let pictures = &mut self.pictures;
        let stop_ids = gallery.processor.tokenizer().stop_ids();
        let requests = requests(asked.prompts(), asked.draw, stop_ids, |example| {
            Self::prompt(pictures, gallery, example)
        })?;
        let mut groups = vec![Group::default(); requests.len()];
        run_each(
            &mut self.engine,
            &requests,
            &|| (turn.cancelled)(),
            &mut |index, group| {
                if let Some(place) = groups.get_mut(index) {
                    *place = group;
                }
            },
        )?;
        Ok(groups)
    }

    fn ask(
        &mut self,
        fleet: &super::fleet::Fleet,
        asked: &Asked<'_>,
        turn: Turn<'_>,
    ) -> Result<Vec<Group>, TrainError> {
        let mut features = BTreeMap::new();
        for key in asked.prompts().iter().flat_map(|(example, _)| &example.images) {
            if !features.contains_key(key) {
                let made = self.features(key)?;
                let values = self.gpu.download(&made).map_err(DeviceError::from)?;
                features.insert(
                    key.clone(),
                    values.iter().map(|value| value.to_f32()).collect::<Vec<_>>(),
                );
            }
        }
        let weights = || {
            self.store()?;
            Ok(self.host.weights().to_bytes()?)
        };
        let values = |key: &str| {
            let found = features.get(key).cloned();
            found.ok_or_else(|| TrainError::Invalid(format!("no features of image {key}")))
        };
        ask(fleet, asked, turn, &weights, &values)
    }
}

/// The form that a checkpoint's moments are restored in.
fn states_of(moments: Moments) -> Result<StateKind, TrainError> {
    match moments {
        Moments::PackedF32 => Ok(StateKind::F32),
        Moments::PackedBf16 => Ok(StateKind::Bf16),
        Moments::Packed8Bit => Ok(StateKind::Bit8),
        Moments::ByParameter => Err(foreign(moments, "the packed learner")),
    }
}

fn moments_of(states: StateKind) -> Moments {
    match states {
        StateKind::F32 => Moments::PackedF32,
        StateKind::Bf16 => Moments::PackedBf16,
        StateKind::Bit8 => Moments::Packed8Bit,
    }
}

fn wanted<T: Float>(
    spec: &Train,
    inputs: &Inputs,
    patches: usize,
    freeze: &[Module],
    states: Option<StateKind>,
) -> Wanted {
    let (prompt, completion) = inputs.longest(spec);
    let drawn = spec.algorithm.grpo.as_ref().map_or(0, |grpo| {
        let rows = (grpo.rows_per_step as usize).min(inputs.rows.units.len());
        let prompts = inputs.rows.units.iter().map(Vec::len).max().unwrap_or(1);
        rows * prompts * grpo.group_size as usize
    });
    let evaluated = inputs.sets.iter().map(|set| set.examples.examples.len()).max();
    Wanted {
        format: T::DTYPE,
        prompt,
        completion,
        samples: drawn.max(evaluated.unwrap_or_default()),
        tables: !freeze.contains(&Module::Embeddings),
        patches,
        states,
    }
}

/// Limits of the engine beside `features` bytes of features of all pictures.
fn limits(wanted: &Wanted, features: usize) -> Limits {
    Limits {
        max_rows: wanted.rows(),
        max_step_tokens: STEP_TOKENS,
        block_size: BLOCK_SIZE,
        feature_bytes: features.min(FEATURE_BYTES),
        ..Limits::default()
    }
}

/// Goes on with the moments of a checkpoint; how many updates they have seen.
fn restore<T: Float>(learner: &mut Learner<T, T>, trainer: &Path, position: &Position) -> Result<u64, TrainError> {
    let updates = u32::try_from(position.updates)
        .map_err(|_| TrainError::Invalid(format!("{} updates are too many", position.updates)))?;
    let mut reader = Reader::new(trainer);
    learner.restore(updates, |name| {
        reader.get(name).map_err(|error| DeviceError::Input(error.to_string()))
    })?;
    Ok(position.updates)
}

fn adamw(optimizer: &Optimizer, seed: u64) -> AdamW {
    AdamW {
        learning_rate: optimizer.learning_rate,
        beta1: optimizer.beta1,
        beta2: optimizer.beta2,
        epsilon: optimizer.epsilon,
        weight_decay: optimizer.weight_decay,
        step: 1,
        seed: derive_seed(seed, "rounding", 0),
        rounding: Rounding::Stochastic,
    }
}

impl<T: Float> Actor for Packed<'_, T> {
    fn sample(
        &mut self,
        prompts: &[&Example],
        draw: Draw,
        seeds: &[u64],
        turn: Turn<'_>,
    ) -> Result<Vec<Vec<Completion>>, TrainError> {
        let asked = Asked::new(prompts, draw, seeds);
        let groups = match turn.fleet {
            Some(fleet) => self.ask(fleet, &asked, turn)?,
            None => self.generate(&asked, turn)?,
        };
        Ok(groups.into_iter().map(|group| group.completions).collect())
    }

    fn score_by_reference(&mut self, rows: &[Scored<'_>], temperature: f64) -> Result<Vec<Vec<f32>>, TrainError> {
        let mut scored = Vec::with_capacity(rows.len());
        for rows in parts_by_pictures(rows, self.at_once) {
            let features = self.features_of_reference(rows)?;
            let Some(reference) = &self.reference else {
                return Err(TrainError::Invalid("this run has no reference model".into()));
            };
            let weights = Some(&reference.text);
            scored.extend(Self::log_probs(
                &mut self.learner,
                weights,
                rows,
                &features,
                temperature,
            )?);
        }
        Ok(scored)
    }

    fn rescores(&self) -> bool {
        T::DTYPE.bytes() < size_of::<f32>()
    }

    fn score(&mut self, rows: &[Scored<'_>], temperature: f64) -> Result<Vec<Vec<f32>>, TrainError> {
        let mut scored = Vec::with_capacity(rows.len());
        for rows in parts_by_pictures(rows, self.at_once) {
            let features = self.features_of(rows, false)?;
            scored.extend(Self::log_probs(&mut self.learner, None, rows, &features, temperature)?);
        }
        Ok(scored)
    }

    fn learn(&mut self, rows: &[PolicyRow<'_>], objective: PolicyObjective, rate: f64) -> Result<Learned, TrainError> {
        let scored: Vec<Scored<'_>> = rows.iter().map(|row| row.scored).collect();
        let (mut statistics, mut apart) = (PolicyStatistics::default(), Apart::default());
        let update = self.update(&scored, (objective.temperature, rate), |index, log_probs| {
            let (row, mut slopes) = (&rows[index], Vec::new());
            let spread = |value: f32| vec![value; log_probs.len()];
            let known = Known {
                old: row.old.unwrap_or(log_probs),
                reference: row.reference,
                advantage: &spread(row.advantage),
                weight: &spread(row.weight),
            };
            statistics += objective.loss.gradient(log_probs, known, &mut slopes);
            apart += Apart::new(row.drawn, log_probs);
            slopes
        })?;
        Ok(Learned {
            update,
            statistics,
            apart,
        })
    }

    fn imitate(&mut self, rows: &[(Scored<'_>, f32)], rate: f64) -> Result<(Update, f64), TrainError> {
        let scored: Vec<Scored<'_>> = rows.iter().map(|(row, _)| *row).collect();
        let mut loss = 0.0;
        let update = self.update(&scored, (1.0, rate), |index, log_probs| {
            let mut slopes = Vec::new();
            loss += cross_entropy_slopes(log_probs, &vec![rows[index].1; log_probs.len()], &mut slopes);
            slopes
        })?;
        Ok((update, loss))
    }

    fn save(&mut self, weights: &Path, trainer: &Path) -> Result<Saved, TrainError> {
        self.store()?;
        self.host.weights().save_sharded(weights, MAX_SHARD_BYTES, None)?;
        let mut writer = Writer::new(trainer);
        let updates = self.learner.save(|name, values| {
            writer
                .put(name, values)
                .map_err(|error| DeviceError::Input(error.to_string()))
        })?;
        writer.flush()?;
        Ok(Saved {
            updates: u64::from(updates),
            moments: moments_of(self.learner.settings().states),
        })
    }

    fn gauges(&self) -> Vec<(&'static str, f64)> {
        let gigabytes = |bytes: usize| bytes as f64 / 1e9;
        vec![
            ("memory/gpu_planned_gb", gigabytes(self.planned)),
            ("memory/gpu_peak_gb", gigabytes(self.gpu.peak_bytes())),
        ]
    }
}
