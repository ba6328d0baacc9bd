//! One step of GRPO: rollouts, rewards, reference log-probabilities, advantages, updates (stages `gen`, `reward`, `adv`, `ref`,
//! `old`, `update` of metrics and spans).
//!
//! Where sampler and learner share the weights and compute in f32 over the full tempered softmax, the sampler's log-probabilities
//! serve as the old ones of the loss: recomputing them would give the same numbers up to rounding. Where they do not, those of the first
//! mini-batch are what its own update computes, and those of the others are computed before it (`old`). The first mini-batch of
//! every step measures how far the two are apart (`rollout/max_log_prob_difference`, `rollout/mean_log_prob_difference`).

use std::collections::{BTreeMap, BTreeSet};

use flotilla_api::{
    algorithm::{Grpo, LossAggregation, RewardScaling},
    reward::{Reward, Rule as ApiRule},
};
use flotilla_engine::Completion;
use flotilla_grpo::{
    advantage::{Scaling, group_advantages},
    batch::{Aggregation, Sample, deduplicate, split_evenly, token_weights},
    policy::{PolicyLoss, PolicyStatistics},
    reward::{Graded, Rule, Term, grade},
    schedule::Schedule,
};

use super::{
    actor::{Actor, Draw, PolicyObjective, PolicyRow, Scored, Turn, tell_skipped},
    error::TrainError,
    examples::{Example, ExampleSet},
    gallery::Gallery,
    journal::Stopwatch,
    order::{derive_seed, permutation, units_of_step},
};

/// GRPO on rows with a verifiable answer.
#[derive(Debug)]
pub struct GrpoSteps<'a> {
    /// Parameters.
    pub spec: Grpo,
    /// Terms of the reward.
    pub terms: Vec<Term>,
    /// Training rows, each with a target.
    pub rows: &'a ExampleSet,
    /// Makes text of completions.
    pub gallery: &'a Gallery,
    /// Learning rate by step.
    pub schedule: Schedule,
    /// Seed of the run.
    pub seed: u64,
}

/// The terms that a job names.
pub fn terms(rewards: &[Reward]) -> Result<Vec<Term>, TrainError> {
    if rewards.is_empty() {
        return Err(TrainError::Invalid("grpo needs at least one reward".into()));
    }
    let term = |reward: &Reward| Term {
        rule: match reward.rule {
            ApiRule::Preference => Rule::Preference,
            ApiRule::Format => Rule::Format,
            ApiRule::ExactMatch => Rule::ExactMatch,
        },
        weight: reward.weight,
    };
    Ok(rewards.iter().map(term).collect())
}

/// The prompts of a step and what was sampled for them.
struct Batch<'a> {
    prompts: Vec<&'a Example>,
    /// Places in `prompts` of each unit.
    units: Vec<Vec<usize>>,
    samples: Vec<Sample>,
    /// Log-probabilities of each sample's tokens under the reference.
    reference: Option<Vec<Vec<f32>>>,
}

/// Places in [`Batch::samples`] and the weight of each one's tokens.
type MiniBatch = Vec<(usize, f32)>;

impl GrpoSteps<'_> {
    /// Takes the step of `turn`, counted from 0. Ends with [`TrainError::Cancelled`] only before the first update.
    pub fn step(&self, actor: &mut dyn Actor, turn: Turn<'_>) -> Result<BTreeMap<String, f64>, TrainError> {
        let mut watch = Stopwatch::start();
        let mut metrics = BTreeMap::new();
        let mut batch = self.prompts_of(turn.step);
        let groups = self.sample(actor, &batch.prompts, turn)?;
        watch.lap("gen");
        let graded = self.grade(&batch.prompts, &groups)?;
        self.count_rewards(&graded, &groups, &mut metrics);
        watch.lap("reward");
        batch.samples = self.advantages(&graded, &groups, &mut metrics);
        watch.lap("adv");
        if self.has_reference() {
            let rows: Vec<Scored<'_>> = (0..batch.samples.len()).map(|index| batch.scored(index)).collect();
            batch.reference = Some(actor.score_by_reference(&rows, self.spec.temperature)?);
        }
        watch.lap("ref");
        if (turn.cancelled)() {
            return Err(TrainError::Cancelled);
        }
        let updates = self.mini_batches(&batch, turn.step);
        let old = self.old(actor, &batch, &updates)?;
        watch.lap("old");
        if (turn.cancelled)() {
            return Err(TrainError::Cancelled);
        }
        self.learn(actor, &batch, &updates, &old, turn.step, &mut metrics)?;
        watch.lap("update");
        let trained: usize = batch.samples.iter().map(|sample| batch.tokens(sample)).sum();
        metrics.extend(watch.finish());
        let seconds = metrics.get("timing_s/step").copied().unwrap_or_default();
        metrics.insert("perf/tokens_per_second".into(), trained as f64 / seconds.max(1e-9));
        metrics.insert("perf/trained_tokens".into(), trained as f64);
        Ok(metrics)
    }

    /// Whether log-probabilities of the frozen initial model are needed.
    fn has_reference(&self) -> bool {
        self.spec.kl_coefficient > 0.0
    }

    fn prompts_of(&self, step: u32) -> Batch<'_> {
        let chosen = units_of_step(self.rows.units.len(), self.spec.rows_per_step as usize, self.seed, step);
        let mut prompts = Vec::new();
        let mut units = Vec::new();
        for unit in chosen {
            let indices = &self.rows.units[unit];
            units.push((prompts.len()..prompts.len() + indices.len()).collect());
            prompts.extend(indices.iter().map(|index| &self.rows.examples[*index]));
        }
        Batch {
            prompts,
            units,
            samples: Vec::new(),
            reference: None,
        }
    }

    fn sample(
        &self,
        actor: &mut dyn Actor,
        prompts: &[&Example],
        turn: Turn<'_>,
    ) -> Result<Vec<Vec<Completion>>, TrainError> {
        let draw = Draw {
            n: self.spec.group_size as usize,
            temperature: self.spec.temperature,
            top_p: self.spec.top_p,
            max_tokens: self.spec.max_completion_tokens as usize,
        };
        let seed = derive_seed(self.seed, "rollout", u64::from(turn.step));
        let seeds: Vec<u64> = (0..prompts.len())
            .map(|index| derive_seed(seed, "prompt", index as u64))
            .collect();
        actor.sample(prompts, draw, &seeds, turn)
    }

    fn grade(&self, prompts: &[&Example], groups: &[Vec<Completion>]) -> Result<Vec<Vec<Graded>>, TrainError> {
        let mut graded = Vec::with_capacity(groups.len());
        for (example, group) in prompts.iter().zip(groups) {
            let Some(target) = &example.target else {
                let what = format!("row {} has no answer that a reward could check", example.id);
                return Err(TrainError::Invalid(what));
            };
            let own = group
                .iter()
                .map(|completion| Ok(grade(&self.gallery.text(&completion.ids())?, target)));
            graded.push(own.collect::<Result<Vec<_>, TrainError>>()?);
        }
        Ok(graded)
    }

    fn count_rewards(&self, graded: &[Vec<Graded>], groups: &[Vec<Completion>], metrics: &mut BTreeMap<String, f64>) {
        let all: Vec<&Graded> = graded.iter().flatten().collect();
        let mean = |value: &dyn Fn(&Graded) -> f64| -> f64 {
            all.iter().map(|graded| value(graded)).sum::<f64>() / all.len().max(1) as f64
        };
        metrics.insert("reward/overall".into(), mean(&|graded| graded.overall(&self.terms)));
        for term in &self.terms {
            metrics.insert(
                format!("reward/{}", term.rule.name()),
                mean(&|graded| graded.value(term.rule)),
            );
        }
        let flat = graded.iter().filter(|group| {
            let first = group.first().map(|graded| graded.overall(&self.terms));
            group.iter().all(|graded| Some(graded.overall(&self.terms)) == first)
        });
        metrics.insert(
            "reward/zero_variance_groups".into(),
            flat.count() as f64 / graded.len().max(1) as f64,
        );
        let lengths: Vec<f64> = groups
            .iter()
            .flatten()
            .map(|completion| completion.tokens.len() as f64)
            .collect();
        let longest = lengths.iter().copied().fold(0.0, f64::max);
        metrics.insert(
            "response_length/mean".into(),
            lengths.iter().sum::<f64>() / lengths.len().max(1) as f64,
        );
        metrics.insert("response_length/max".into(), longest);
    }

    /// Samples with their advantages; those that can change nothing are left out.
    fn advantages(
        &self,
        graded: &[Vec<Graded>],
        groups: &[Vec<Completion>],
        metrics: &mut BTreeMap<String, f64>,
    ) -> Vec<Sample> {
        let scaling = match self.spec.reward_scaling {
            RewardScaling::Group => Scaling::Group,
            RewardScaling::None => Scaling::None,
        };
        let mut samples = Vec::new();
        for (prompt, (graded, group)) in graded.iter().zip(groups).enumerate() {
            let rewards: Vec<f64> = graded.iter().map(|graded| graded.overall(&self.terms)).collect();
            for (completion, advantage) in group.iter().zip(group_advantages(&rewards, scaling)) {
                samples.push(Sample {
                    prompt,
                    tokens: completion.ids(),
                    old: completion.log_probabilities(),
                    advantage,
                    count: 1,
                });
            }
        }
        let sampled = samples.len();
        if self.spec.deduplicate {
            samples = deduplicate(samples);
        }
        metrics.insert("rollout/samples".into(), sampled as f64);
        metrics.insert("rollout/distinct".into(), samples.len() as f64);
        samples
    }

    /// The samples of each update of the step, with the weight of each one's tokens; updates without any are left out.
    fn mini_batches(&self, batch: &Batch<'_>, step: u32) -> Vec<MiniBatch> {
        let mut all = Vec::new();
        for epoch in 0..self.spec.epochs {
            let seed = derive_seed(self.seed, "mini-batches", u64::from(step) << 8 | u64::from(epoch));
            let order = permutation(batch.units.len(), seed);
            let parts = split_evenly(&order, self.spec.mini_batches as usize);
            let parts = parts.iter().map(|units| self.mini_batch(batch, units));
            all.extend(parts.filter(|part| !part.is_empty()));
        }
        all
    }

    /// Log-probabilities under the weights that the step begins with, where neither the sampler's nor those of the first
    /// update serve.
    fn old(
        &self,
        actor: &mut dyn Actor,
        batch: &Batch<'_>,
        updates: &[MiniBatch],
    ) -> Result<BTreeMap<usize, Vec<f32>>, TrainError> {
        let later: BTreeSet<usize> = updates.iter().skip(1).flatten().map(|(index, _)| *index).collect();
        if !actor.rescores() || later.is_empty() {
            return Ok(BTreeMap::new());
        }
        let rows: Vec<Scored<'_>> = later.iter().map(|index| batch.scored(*index)).collect();
        let scores = actor.score(&rows, self.spec.temperature)?;
        Ok(later.into_iter().zip(scores).collect())
    }

    fn learn(
        &self,
        actor: &mut dyn Actor,
        batch: &Batch<'_>,
        mini_batches: &[MiniBatch],
        old: &BTreeMap<usize, Vec<f32>>,
        step: u32,
        metrics: &mut BTreeMap<String, f64>,
    ) -> Result<(), TrainError> {
        let objective = PolicyObjective {
            loss: self.policy_loss(),
            temperature: self.spec.temperature,
        };
        let rate = self.schedule.rate(step);
        let mut sum = PolicyStatistics::default();
        let mut norms = 0.0;
        for (number, mini_batch) in mini_batches.iter().enumerate() {
            let row = |(index, weight): &(usize, f32)| {
                let sample = &batch.samples[*index];
                PolicyRow {
                    scored: batch.scored(*index),
                    drawn: &sample.old,
                    old: match old.get(index) {
                        _ if !actor.rescores() => Some(sample.old.as_slice()),
                        Some(scored) if number > 0 => Some(scored.as_slice()),
                        _ => None,
                    },
                    reference: batch.reference.as_ref().map(|reference| reference[*index].as_slice()),
                    advantage: sample.advantage,
                    weight: *weight,
                }
            };
            let rows: Vec<PolicyRow<'_>> = mini_batch.iter().map(row).collect();
            let learned = actor.learn(&rows, objective, rate)?;
            tell_skipped(&learned.update);
            if number == 0 {
                metrics.insert("rollout/max_log_prob_difference".into(), learned.apart.largest);
                metrics.insert("rollout/mean_log_prob_difference".into(), learned.apart.mean());
            }
            sum += learned.statistics;
            norms += learned.update.grad_norm;
        }
        let count = mini_batches.len().max(1) as f64;
        metrics.extend([
            ("actor/pg_loss".to_owned(), sum.policy_loss / count),
            ("actor/kl_loss".to_owned(), sum.kl / count),
            ("actor/ppo_kl".to_owned(), sum.ppo_kl / count),
            ("actor/clip_fraction".to_owned(), sum.clipped / count),
            ("actor/dual_clip_fraction".to_owned(), sum.dual_clipped / count),
            ("actor/grad_norm".to_owned(), norms / count),
            ("actor/lr".to_owned(), rate),
        ]);
        Ok(())
    }

    fn policy_loss(&self) -> PolicyLoss {
        PolicyLoss {
            clip_low: self.spec.clip_low,
            clip_high: self.spec.clip_high,
            dual_clip: (self.spec.dual_clip > 0.0).then_some(self.spec.dual_clip),
            kl_coefficient: self.spec.kl_coefficient,
        }
    }

    /// The samples of an update. Token weights are those of the whole mini-batch, samples included that are then left out
    /// because they have neither advantage nor KL term.
    fn mini_batch(&self, batch: &Batch<'_>, units: &[usize]) -> MiniBatch {
        let prompts: BTreeSet<usize> = units
            .iter()
            .flat_map(|unit| batch.units[*unit].iter().copied())
            .collect();
        let members: Vec<usize> = (0..batch.samples.len())
            .filter(|index| prompts.contains(&batch.samples[*index].prompt))
            .collect();
        let sizes: Vec<(usize, u32)> = members
            .iter()
            .map(|index| (batch.samples[*index].tokens.len(), batch.samples[*index].count))
            .collect();
        let aggregation = match self.spec.loss_aggregation {
            LossAggregation::TokenMean => Aggregation::TokenMean,
            LossAggregation::SequenceMean => Aggregation::SequenceMean,
        };
        members
            .into_iter()
            .zip(token_weights(&sizes, aggregation))
            .filter(|(index, _)| self.has_reference() || batch.samples[*index].advantage != 0.0)
            .collect()
    }
}

impl Batch<'_> {
    /// Tokens of a sample with its prompt.
    fn tokens(&self, sample: &Sample) -> usize {
        self.prompts[sample.prompt].prompt.ids.len() + sample.tokens.len()
    }

    fn scored(&self, index: usize) -> Scored<'_> {
        let sample = &self.samples[index];
        Scored {
            example: self.prompts[sample.prompt],
            completion: &sample.tokens,
        }
    }
}
