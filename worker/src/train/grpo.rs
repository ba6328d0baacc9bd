//! One step of GRPO: rollouts, rewards, reference log-probabilities, advantages, updates (stages `gen`, `reward`, `ref`,
//! `adv`, `update` of metrics and spans).
//!
//! The sampler's log-probabilities serve as the old ones of the loss: learner and sampler share the weights and compute in
//! f32 over the full tempered softmax, so recomputing them would give the same numbers up to rounding. The first mini-batch
//! of every step measures that rounding (`rollout/max_log_prob_difference`).

use std::collections::{BTreeMap, BTreeSet};

use candle_core::Tensor;
use flotilla_api::{
    algorithm::{Grpo, LossAggregation, RewardScaling},
    reward::{Reward, Rule as ApiRule},
};
use flotilla_engine::Completion;
use flotilla_grpo::{
    advantage::{Scaling, group_advantages},
    batch::{Aggregation, Sample, deduplicate, shards_by_length, split_evenly, token_weights},
    loss::{PolicyLoss, PolicyStatistics, TokenTargets},
    reward::{Graded, Rule, Term, grade},
};
use flotilla_model::{Pass, Vlm};

use super::{
    error::TrainError,
    examples::{Example, ExampleSet},
    features::{FeatureSource, Features, Gallery, encode},
    fleet::Fleet,
    journal::Stopwatch,
    learner::{Learner, ROWS_PER_SHARD},
    order::{derive_seed, permutation, units_of_step},
    parallel::map_parts,
    rollout::{Draw, Remote, Rollout},
    scoring::{Scored, Scorer, completion_log_probs, head},
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
    /// Pictures of the rows.
    pub gallery: &'a Gallery,
    /// The frozen initial model, None where the KL coefficient is 0.
    pub reference: Option<&'a Vlm>,
    /// Seed of the run.
    pub seed: u64,
    /// Pods that sample; None: this process does.
    pub fleet: Option<&'a Fleet>,
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

/// A shard of a mini-batch: places in [`Batch::samples`] and the weight of each one's tokens.
struct Shard {
    samples: Vec<(usize, f32)>,
}

impl GrpoSteps<'_> {
    /// Takes one step, counted from 0. `known` holds features while the vision tower is frozen.
    /// Ends with [`TrainError::Cancelled`] only before the first update.
    pub fn step(
        &self,
        learner: &mut Learner,
        known: Option<&Features>,
        step: u32,
        cancelled: &(dyn Fn() -> bool + Sync),
    ) -> Result<BTreeMap<String, f64>, TrainError> {
        let mut watch = Stopwatch::start();
        let mut metrics = BTreeMap::new();
        let mut batch = self.prompts_of(step);
        let names: BTreeSet<String> = batch
            .prompts
            .iter()
            .flat_map(|example| example.images.iter().cloned())
            .collect();
        let fresh = match known {
            Some(_) => Features::new(),
            None => encode(&learner.model, self.gallery, &names, Pass::Infer, learner.threads)?,
        };
        let rollout = Rollout {
            model: &learner.model,
            features: known.unwrap_or(&fresh),
            tokenizer: self.gallery.processor.tokenizer(),
            threads: learner.threads,
            remote: self.fleet.map(|fleet| Remote { fleet, step }),
            cancelled,
        };
        let groups = self.sample(rollout, &batch.prompts, step)?;
        watch.lap("gen");
        let graded = self.grade(rollout, &batch.prompts, &groups)?;
        self.count_rewards(&graded, &groups, &mut metrics);
        watch.lap("reward");
        batch.samples = self.advantages(&graded, &groups, &mut metrics);
        watch.lap("adv");
        if let Some(reference) = self.reference {
            batch.reference = Some(self.score_by_reference(reference, &batch, &names, known, learner.threads)?);
        }
        watch.lap("ref");
        if cancelled() {
            return Err(TrainError::Cancelled);
        }
        let source = known.map_or(FeatureSource::Trained(self.gallery), FeatureSource::Known);
        self.learn(learner, &batch, source, step, &mut metrics)?;
        watch.lap("update");
        let trained: usize = batch.samples.iter().map(|sample| batch.tokens(sample)).sum();
        metrics.extend(watch.finish());
        let seconds = metrics.get("timing_s/step").copied().unwrap_or_default();
        metrics.insert("perf/tokens_per_second".into(), trained as f64 / seconds.max(1e-9));
        metrics.insert("perf/trained_tokens".into(), trained as f64);
        Ok(metrics)
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
        rollout: Rollout<'_>,
        prompts: &[&Example],
        step: u32,
    ) -> Result<Vec<Vec<Completion>>, TrainError> {
        let draw = Draw {
            n: self.spec.group_size as usize,
            temperature: self.spec.temperature,
            top_p: self.spec.top_p,
            max_tokens: self.spec.max_completion_tokens as usize,
        };
        let seed = derive_seed(self.seed, "rollout", u64::from(step));
        rollout.complete(prompts, draw, |index| derive_seed(seed, "prompt", index as u64))
    }

    fn grade(
        &self,
        rollout: Rollout<'_>,
        prompts: &[&Example],
        groups: &[Vec<Completion>],
    ) -> Result<Vec<Vec<Graded>>, TrainError> {
        let mut graded = Vec::with_capacity(groups.len());
        for (example, group) in prompts.iter().zip(groups) {
            let Some(target) = &example.target else {
                let what = format!("row {} has no answer that a reward could check", example.id);
                return Err(TrainError::Invalid(what));
            };
            let own = group
                .iter()
                .map(|completion| Ok(grade(&rollout.text(&completion.ids())?, target)));
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

    fn score_by_reference(
        &self,
        reference: &Vlm,
        batch: &Batch<'_>,
        names: &BTreeSet<String>,
        known: Option<&Features>,
        threads: usize,
    ) -> Result<Vec<Vec<f32>>, TrainError> {
        // A frozen tower is the reference's own; a trained one has moved away from it.
        let own = match known {
            Some(_) => Features::new(),
            None => encode(reference, self.gallery, names, Pass::Infer, threads)?,
        };
        let source = FeatureSource::Known(known.unwrap_or(&own));
        let lengths: Vec<usize> = batch.samples.iter().map(|sample| batch.tokens(sample)).collect();
        let shards = shards_by_length(&lengths, ROWS_PER_SHARD);
        let head = head(reference, false)?;
        let scorer = Scorer {
            model: reference,
            head: &head,
            pass: Pass::Infer,
        };
        let parts = map_parts(threads, &shards, |shard| {
            let rows: Vec<Scored<'_>> = shard.iter().map(|index| batch.scored(*index)).collect();
            let scores = completion_log_probs(scorer, &rows, source, self.spec.temperature)?;
            Ok::<_, TrainError>(scores.to_vec1::<f32>()?)
        })?;
        let mut scores = vec![Vec::new(); batch.samples.len()];
        for (shard, values) in shards.iter().zip(parts) {
            let mut rest = values.as_slice();
            for index in shard {
                let (own, after) = rest.split_at(batch.samples[*index].tokens.len());
                scores[*index] = own.to_vec();
                rest = after;
            }
        }
        Ok(scores)
    }

    fn learn(
        &self,
        learner: &mut Learner,
        batch: &Batch<'_>,
        source: FeatureSource<'_>,
        step: u32,
        metrics: &mut BTreeMap<String, f64>,
    ) -> Result<(), TrainError> {
        let policy = self.policy_loss();
        let rate = learner.rate(step);
        let mut sum = PolicyStatistics::default();
        let (mut norms, mut updates) = (0.0, 0.0_f64);
        for epoch in 0..self.spec.epochs {
            let seed = derive_seed(self.seed, "mini-batches", u64::from(step) << 8 | u64::from(epoch));
            let order = permutation(batch.units.len(), seed);
            for units in split_evenly(&order, self.spec.mini_batches as usize) {
                let shards = self.shards_of(batch, &units);
                if shards.is_empty() {
                    continue;
                }
                let (update, told) = learner.update(&shards, rate, |scorer, shard| {
                    self.loss_of(scorer, batch, shard, source, &policy)
                })?;
                let mut own = PolicyStatistics::default();
                told.into_iter().for_each(|told| own += told);
                if updates == 0.0 {
                    metrics.insert("rollout/max_log_prob_difference".into(), own.max_log_ratio);
                }
                sum += own;
                norms += update.grad_norm;
                updates += 1.0;
            }
        }
        let count = updates.max(1.0);
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

    /// The samples of a mini-batch in shards. Token weights are those of the whole mini-batch, samples included that are
    /// then left out because they have neither advantage nor KL term.
    fn shards_of(&self, batch: &Batch<'_>, units: &[usize]) -> Vec<Shard> {
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
        let weighted: Vec<(usize, f32)> = members
            .into_iter()
            .zip(token_weights(&sizes, aggregation))
            .filter(|(index, _)| self.reference.is_some() || batch.samples[*index].advantage != 0.0)
            .collect();
        let lengths: Vec<usize> = weighted
            .iter()
            .map(|(index, _)| batch.tokens(&batch.samples[*index]))
            .collect();
        let shards = shards_by_length(&lengths, ROWS_PER_SHARD);
        shards
            .into_iter()
            .map(|shard| Shard {
                samples: shard.into_iter().map(|place| weighted[place]).collect(),
            })
            .collect()
    }

    fn loss_of(
        &self,
        scorer: Scorer<'_>,
        batch: &Batch<'_>,
        shard: &Shard,
        source: FeatureSource<'_>,
        policy: &PolicyLoss,
    ) -> Result<(Tensor, PolicyStatistics), TrainError> {
        let rows: Vec<Scored<'_>> = shard.samples.iter().map(|(index, _)| batch.scored(*index)).collect();
        let log_probs = completion_log_probs(scorer, &rows, source, self.spec.temperature)?;
        let column = |value: &dyn Fn(usize, f32) -> Vec<f32>| -> Result<Tensor, TrainError> {
            let values: Vec<f32> = shard
                .samples
                .iter()
                .flat_map(|(index, weight)| value(*index, *weight))
                .collect();
            let count = values.len();
            Ok(Tensor::from_vec(values, count, scorer.model.device())?)
        };
        let spread = |index: usize, value: f32| vec![value; batch.samples[index].tokens.len()];
        let targets = TokenTargets {
            old: column(&|index, _| batch.samples[index].old.clone())?,
            reference: match &batch.reference {
                Some(reference) => Some(column(&|index, _| reference[index].clone())?),
                None => None,
            },
            advantage: column(&|index, _| spread(index, batch.samples[index].advantage))?,
            weight: column(&|index, weight| spread(index, weight))?,
        };
        let statistics = policy.statistics(&log_probs.detach(), &targets)?;
        Ok((policy.loss(&log_probs, &targets)?, statistics))
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
