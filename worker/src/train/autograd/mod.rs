//! Training by candle's tensors and autograd, on the CPU or a GPU: every family, every module.
//!
//! | file | what |
//! |---|---|
//! | `learner.rs` | variables and their optimiser: one update from the shards of a mini-batch |
//! | `scoring.rs` | log-probabilities of completions, with or without gradient |
//! | `features.rs` | features of pictures, computed once while the vision tower is frozen |

mod features;
mod learner;
mod scoring;

use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
};

use candle_core::{Device, Tensor};
use flotilla_api::algorithm::{Module, Optimizer};
use flotilla_engine::{Completion, Group, Limits, Prompt, VlmRunner, generate};
use flotilla_grpo::{
    adamw::Update,
    batch::shards_by_length,
    loss::{TokenTargets, cross_entropy},
    policy::PolicyStatistics,
};
use flotilla_model::{Pass, Vlm};

use self::{
    features::{FeatureSource, Features, encode},
    learner::{Learner, ROWS_PER_SHARD},
    scoring::{Scorer, completion_log_probs, head},
};
use super::{
    actor::{Actor, Apart, Draw, Learned, Moments, PolicyObjective, PolicyRow, Saved, Scored, Turn},
    checkpoint::MAX_SHARD_BYTES,
    error::TrainError,
    examples::Example,
    gallery::{Gallery, Shown},
    parallel::map_parts,
    rollout::{Asked, ask, requests},
};
use crate::rollout::ROWS_PER_PIECE;

/// Features of a frozen vision tower are kept for the whole run up to this size.
const MAX_KEPT_FEATURE_BYTES: usize = 1 << 30;
/// Moments of the optimiser, by variable.
const OPTIMIZER: &str = "optimizer.safetensors";

/// A model as tensors.
#[derive(Debug)]
pub struct Autograd<'a> {
    learner: Learner,
    reference: Option<Vlm>,
    gallery: &'a Gallery,
    /// Features of every picture, while the vision tower is frozen and they are not too large.
    known: Option<Features>,
}

impl<'a> Autograd<'a> {
    /// Trains `model`, whose optimiser has seen nothing, beside a frozen `reference`.
    pub fn new(
        model: Vlm,
        reference: Option<Vlm>,
        (gallery, shown): (&'a Gallery, &Shown),
        (freeze, optimizer): (&[Module], &Optimizer),
        threads: usize,
    ) -> Result<Self, TrainError> {
        let learner = Learner::new(model, freeze, optimizer, threads)?;
        let known = if freeze.contains(&Module::Vision) {
            known_features(&learner, gallery, shown)?
        } else {
            None
        };
        Ok(Self {
            learner,
            reference,
            gallery,
            known,
        })
    }

    /// Goes on with moments that [`Actor::save`] wrote into `trainer`.
    pub fn restore(&mut self, trainer: &Path, updates: u64) -> Result<(), TrainError> {
        let moments = candle_core::safetensors::load(trainer.join(OPTIMIZER), &Device::Cpu)?;
        self.learner
            .restore_optimizer(updates, |name| moments.get(name).cloned())
    }

    /// Features of these pictures by a model, without gradient; none where all are known.
    fn fresh(&self, model: &Vlm, names: &BTreeSet<String>) -> Result<Features, TrainError> {
        match self.known {
            Some(_) => Ok(Features::new()),
            None => encode(model, self.gallery, names, Pass::Infer, self.learner.threads),
        }
    }

    /// By the engine, in fixed pieces on several threads.
    fn generate(&self, asked: &Asked<'_>, features: &Features, turn: Turn<'_>) -> Result<Vec<Group>, TrainError> {
        let limits = Limits {
            max_rows: ROWS_PER_PIECE,
            ..Limits::default()
        };
        let stop_ids = self.gallery.processor.tokenizer().stop_ids();
        let parts = map_parts(self.learner.threads, &asked.pieces(), |piece| {
            let prompt = |example: &Example| Ok(Prompt::from(example.row(features)?));
            let requests = requests(piece, asked.draw, stop_ids, prompt)?;
            let runner = VlmRunner::new(&self.learner.model, &limits);
            Ok::<_, TrainError>(generate(runner, &requests, limits, &|| (turn.cancelled)())?)
        })?;
        Ok(parts.into_iter().flatten().collect())
    }

    /// Log-probabilities of each row by a model, without gradient.
    fn score_by(&self, model: &Vlm, rows: &[Scored<'_>], temperature: f64) -> Result<Vec<Vec<f32>>, TrainError> {
        let own = self.fresh(model, &names(rows.iter().map(|row| row.example)))?;
        let source = FeatureSource::Known(self.known.as_ref().unwrap_or(&own));
        let head = head(model, false)?;
        let scorer = Scorer {
            model,
            head: &head,
            pass: Pass::Infer,
        };
        let shards = shards(rows);
        let parts = map_parts(self.learner.threads, &shards, |shard| {
            let rows: Vec<Scored<'_>> = shard.iter().map(|index| rows[*index]).collect();
            let scores = completion_log_probs(scorer, &rows, source, temperature)?;
            Ok::<_, TrainError>(scores.to_vec1::<f32>()?)
        })?;
        let mut scores = vec![Vec::new(); rows.len()];
        for (shard, values) in shards.iter().zip(parts) {
            let mut rest = values.as_slice();
            for index in shard {
                let (own, after) = rest.split_at(rows[*index].completion.len());
                scores[*index] = own.to_vec();
                rest = after;
            }
        }
        Ok(scores)
    }
}

/// Rows in shards of about equal lengths, by their places.
fn shards(rows: &[Scored<'_>]) -> Vec<Vec<usize>> {
    let lengths: Vec<usize> = rows.iter().map(Scored::tokens).collect();
    shards_by_length(&lengths, ROWS_PER_SHARD)
}

fn names<'a>(examples: impl Iterator<Item = &'a Example>) -> BTreeSet<String> {
    examples.flat_map(|example| example.images.iter().cloned()).collect()
}

/// Features of every picture of the run, unless they are too large to keep.
fn known_features(learner: &Learner, gallery: &Gallery, shown: &Shown) -> Result<Option<Features>, TrainError> {
    let width = learner.model.config().text.hidden_size;
    let bytes = shown.names.len() * shown.largest * width * 4;
    if bytes > MAX_KEPT_FEATURE_BYTES {
        tracing::info!(bytes, "image features are computed with each step: too large to keep");
        return Ok(None);
    }
    let features = encode(&learner.model, gallery, &shown.names, Pass::Infer, learner.threads)?;
    Ok(Some(features))
}

/// A number for each token of a shard's completions, as a column.
fn column(
    rows: &[PolicyRow<'_>],
    device: &Device,
    value: impl Fn(&PolicyRow<'_>) -> Vec<f32>,
) -> Result<Tensor, TrainError> {
    let values: Vec<f32> = rows.iter().flat_map(value).collect();
    let count = values.len();
    Ok(Tensor::from_vec(values, count, device)?)
}

fn spread(row: &PolicyRow<'_>, value: f32) -> Vec<f32> {
    vec![value; row.scored.completion.len()]
}

/// A shard's part of the policy loss, and what metrics show of it.
fn policy_loss(
    scorer: Scorer<'_>,
    rows: &[PolicyRow<'_>],
    source: FeatureSource<'_>,
    objective: &PolicyObjective,
) -> Result<(Tensor, (PolicyStatistics, Apart)), TrainError> {
    let scored: Vec<Scored<'_>> = rows.iter().map(|row| row.scored).collect();
    let log_probs = completion_log_probs(scorer, &scored, source, objective.temperature)?;
    let (device, now) = (scorer.model.device(), log_probs.detach());
    let all_old = rows.iter().all(|row| row.old.is_some());
    let all_referred = rows.iter().all(|row| row.reference.is_some());
    let targets = TokenTargets {
        old: if all_old {
            column(rows, device, |row| row.old.unwrap_or_default().to_vec())?
        } else {
            now.clone()
        },
        reference: match all_referred {
            true => Some(column(rows, device, |row| row.reference.unwrap_or_default().to_vec())?),
            false => None,
        },
        advantage: column(rows, device, |row| spread(row, row.advantage))?,
        weight: column(rows, device, |row| spread(row, row.weight))?,
    };
    let drawn: Vec<f32> = rows.iter().flat_map(|row| row.drawn.iter().copied()).collect();
    let apart = Apart::new(&drawn, &now.to_vec1::<f32>()?);
    let statistics = objective.loss.statistics(&now, &targets)?;
    Ok((objective.loss.loss(&log_probs, &targets)?, (statistics, apart)))
}

impl Actor for Autograd<'_> {
    fn sample(
        &mut self,
        prompts: &[&Example],
        draw: Draw,
        seeds: &[u64],
        turn: Turn<'_>,
    ) -> Result<Vec<Vec<Completion>>, TrainError> {
        let model = &self.learner.model;
        let fresh = self.fresh(model, &names(prompts.iter().copied()))?;
        let features = self.known.as_ref().unwrap_or(&fresh);
        let asked = Asked::new(prompts, draw, seeds);
        let groups = match turn.fleet {
            Some(fleet) => {
                let values = |name: &str| {
                    let features = features.get(name);
                    let features =
                        features.ok_or_else(|| TrainError::Invalid(format!("no features of image {name}")))?;
                    Ok(features.flatten_all()?.to_vec1::<f32>()?)
                };
                ask(fleet, &asked, turn, &|| Ok(model.weights().to_bytes()?), &values)?
            }
            None => self.generate(&asked, features, turn)?,
        };
        Ok(groups.into_iter().map(|group| group.completions).collect())
    }

    fn score_by_reference(&mut self, rows: &[Scored<'_>], temperature: f64) -> Result<Vec<Vec<f32>>, TrainError> {
        let Some(reference) = &self.reference else {
            return Err(TrainError::Invalid("this run has no reference model".into()));
        };
        self.score_by(reference, rows, temperature)
    }

    fn rescores(&self) -> bool {
        false
    }

    fn score(&mut self, rows: &[Scored<'_>], temperature: f64) -> Result<Vec<Vec<f32>>, TrainError> {
        self.score_by(&self.learner.model, rows, temperature)
    }

    fn learn(&mut self, rows: &[PolicyRow<'_>], objective: PolicyObjective, rate: f64) -> Result<Learned, TrainError> {
        let scored: Vec<Scored<'_>> = rows.iter().map(|row| row.scored).collect();
        let source = FeatureSource::new(self.known.as_ref(), self.gallery);
        let (update, told) = self.learner.update(&shards(&scored), rate, |scorer, shard| {
            let own: Vec<PolicyRow<'_>> = shard.iter().map(|index| rows[*index]).collect();
            policy_loss(scorer, &own, source, &objective)
        })?;
        let (mut statistics, mut apart) = (PolicyStatistics::default(), Apart::default());
        for (own, difference) in told {
            statistics += own;
            apart += difference;
        }
        Ok(Learned {
            update,
            statistics,
            apart,
        })
    }

    fn imitate(&mut self, rows: &[(Scored<'_>, f32)], rate: f64) -> Result<(Update, f64), TrainError> {
        let scored: Vec<Scored<'_>> = rows.iter().map(|(row, _)| *row).collect();
        let source = FeatureSource::new(self.known.as_ref(), self.gallery);
        let (update, losses) = self.learner.update(&shards(&scored), rate, |scorer, shard| {
            let own: Vec<Scored<'_>> = shard.iter().map(|index| scored[*index]).collect();
            let log_probs = completion_log_probs(scorer, &own, source, 1.0)?;
            let spread: Vec<f32> = shard
                .iter()
                .flat_map(|index| std::iter::repeat_n(rows[*index].1, scored[*index].completion.len()))
                .collect();
            let count = spread.len();
            let weights = Tensor::from_vec(spread, count, scorer.model.device())?;
            let loss = cross_entropy(&log_probs, &weights)?;
            let value = f64::from(loss.to_scalar::<f32>()?);
            Ok((loss, value))
        })?;
        Ok((update, losses.iter().sum()))
    }

    fn save(&mut self, weights: &Path, trainer: &Path) -> Result<Saved, TrainError> {
        self.learner
            .model
            .weights()
            .save_sharded(weights, MAX_SHARD_BYTES, None)?;
        let (moments, updates) = self.learner.optimizer_state();
        let moments: HashMap<String, Tensor> = moments.into_iter().collect();
        candle_core::safetensors::save(&moments, trainer.join(OPTIMIZER))?;
        Ok(Saved {
            updates,
            moments: Moments::ByParameter,
        })
    }
}
