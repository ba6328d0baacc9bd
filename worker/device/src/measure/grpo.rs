//! One step of GRPO with all parameters trained, in one process over one copy of the weights: pictures, samples, rewards,
//! log-probabilities, updates.

use flotilla_engine::{Group, Limits, Prompt, Request, generate};
use flotilla_grpo::policy::{Known, PolicyLoss};
use flotilla_kernels::{
    Float,
    optimizer::{AdamW, Rounding},
};
use flotilla_model::{Row, rope::Position};
use half::bf16;

use super::{
    Bench, Grpo, GrpoStep, Lengths, Memory, Stage,
    bench::{Watch, failed, sampling},
    memory::{BLOCK, STEP_TOKENS},
    picture,
    question::divide,
};
use crate::{
    error::DeviceError,
    learner::{Learner, Picture, Sample},
    runner::DeviceRunner,
    shape::QwenVision,
    vision::QwenTower,
    weights::TextWeights,
};

/// Temperature of the samples.
const TEMPERATURE: f32 = 1.0;

/// Seconds of the stages that learn.
type Seconds = [(&'static str, f64); 3];

/// Features in the places of a prompt.
type Placed = Vec<Picture<bf16>>;

/// Everything that a step needs.
struct Trainer<'a> {
    bench: &'a Bench,
    step: Grpo,
    memory: Memory,
    tower: Option<QwenTower<bf16>>,
    reference: Option<TextWeights<bf16>>,
    learner: Learner<bf16, bf16>,
}

impl Bench {
    /// A step after another one that warms up. The weights change. Where `tower` is there, the step wants pictures and its
    /// prompts have room, each prompt has one.
    pub fn grpo(&self, step: &Grpo, tower: Option<&QwenVision>) -> Result<GrpoStep, DeviceError> {
        let gpu = &self.gpu;
        gpu.reset_peak();
        let tower = tower.filter(|tower| step.pictures && picture::fits(tower, step.lengths.prompt_tokens));
        let (_, card) = gpu.memory()?;
        let memory = Memory::plan(self.shape(), tower, step, card)
            .ok_or_else(|| DeviceError::Input(format!("a step {} does not fit into {card} bytes", step.lengths)))?;
        let reference = memory.reference.then(|| TextWeights::random(gpu, self.shape(), 2));
        let mut trainer = Trainer {
            bench: self,
            step: *step,
            tower: tower
                .map(|tower| QwenTower::random(gpu, tower.clone(), 3))
                .transpose()?,
            reference: reference.transpose()?,
            learner: Learner::new(gpu, self.weights.clone(), memory.rest)?,
            memory,
        };
        trainer.warm_up()?;
        trainer.run(&step.lengths, 1, usize::MAX)
    }
}

impl Trainer<'_> {
    /// As many samples as are drawn at once, and a few micro-batches of each update: after it everything is compiled and
    /// planned.
    fn warm_up(&mut self) -> Result<(), DeviceError> {
        let lengths = self.step.lengths;
        let few = Lengths {
            prompts: lengths.prompts.min(self.memory.rows.div_ceil(lengths.group)),
            ..lengths
        };
        let together = self.memory.settings.tokens / lengths.sequence();
        self.run(&few, 0, 2 * together * lengths.mini_batches)?;
        Ok(())
    }

    /// A step whose prompts no other `round` has, of which `most` samples are learned from.
    fn run(&mut self, lengths: &Lengths, round: usize, most: usize) -> Result<GrpoStep, DeviceError> {
        let gpu = &self.bench.gpu;
        let asked = self.asked(lengths, round)?;
        let mut watch = Watch::new(gpu)?;
        self.learner.resize(self.memory.rest)?;
        let moved = watch.lap()?;
        let placed = self.encode(&asked)?;
        let vision = watch.lap()?;
        let groups = self.sample(&asked, &placed)?;
        let sample = watch.lap()?;
        let advantages = groups.iter().flat_map(advantages).collect::<Vec<_>>();
        let reward = watch.lap()?;
        self.learner.resize(self.memory.settings)?;
        let moved = moved + watch.lap()?;
        let rows = rows(&asked, &groups);
        let samples = rows.iter().map(|(prompt, ids, positions)| Sample {
            ids,
            positions,
            prompt: lengths.prompt_tokens,
            pictures: placed.get(*prompt).map_or(&[], Vec::as_slice),
        });
        let samples = samples.take(most).collect::<Vec<_>>();
        let (learned, old) = self.learn(&samples, &advantages, lengths, &mut watch)?;
        let before = [
            ("vision", vision),
            ("sample", sample),
            ("reward", reward),
            ("memory", moved),
        ];
        let stages = before.into_iter().chain(learned);
        Ok(GrpoStep {
            step: self.step,
            stages: stages.map(|(name, seconds)| Stage { name, seconds }).collect(),
            tokens: samples.iter().map(|sample| sample.ids.len()).sum(),
            drawn: samples.len() * lengths.new_tokens,
            pictures: self.tower.is_some(),
            apart: apart(&groups, &old),
            peak_bytes: gpu.peak_bytes(),
            memory: self.memory.clone(),
        })
    }

    /// Log-probabilities and updates: seconds of each, and the log-probabilities under the weights that sampled.
    fn learn(
        &mut self,
        samples: &[Sample<'_, bf16>],
        advantages: &[f32],
        lengths: &Lengths,
        watch: &mut Watch,
    ) -> Result<(Seconds, Vec<Vec<f32>>), DeviceError> {
        let reference = self.reference.as_ref();
        let frozen = reference.map(|weights| self.learner.log_probs(Some(weights), samples, TEMPERATURE));
        let frozen = frozen.transpose()?;
        let by_reference = watch.lap()?;
        let updates = divide(samples.len(), lengths.mini_batches);
        let first = updates.first().map_or(0, |first| first.end);
        // Those of the first mini-batch come with its gradients, under the weights that sampled it.
        let later = self.learner.log_probs(None, &samples[first..], TEMPERATURE)?;
        let mut old = vec![Vec::new(); first];
        old.extend(later);
        let ahead = watch.lap()?;
        let policy = PolicyLoss {
            clip_low: 0.2,
            clip_high: 0.3,
            dual_clip: Some(3.0),
            kl_coefficient: if frozen.is_some() { 1e-2 } else { 0.0 },
        };
        for part in updates {
            let weight = ((part.len() * lengths.new_tokens) as f32).recip();
            self.learner
                .learn(&samples[part.clone()], TEMPERATURE, |index, log_probs| {
                    let index = part.start + index;
                    let mut slopes = Vec::new();
                    if part.start == 0 {
                        old[index] = log_probs.to_vec();
                    }
                    let known = Known {
                        old: &old[index],
                        reference: frozen.as_ref().map(|frozen| frozen[index].as_slice()),
                        advantage: &vec![advantages[index]; log_probs.len()],
                        weight: &vec![weight; log_probs.len()],
                    };
                    policy.gradient(log_probs, known, &mut slopes);
                    slopes
                })?;
            self.learner.update(&adamw(), 1.0)?;
        }
        let update = watch.lap()?;
        let stages = [("reference", by_reference), ("old", ahead), ("update", update)];
        Ok((stages, old))
    }

    /// Prompts with their pictures, digested already: as a loader has them ready.
    fn asked(&self, lengths: &Lengths, round: usize) -> Result<Vec<Request<Prompt>>, DeviceError> {
        let requests = (0..lengths.prompts).map(|index| {
            let index = index + 1000 * round;
            let ids = self.bench.ids(index, lengths.prompt_tokens);
            let prompt = match &self.tower {
                Some(tower) => {
                    let seed = u32::try_from(index).unwrap_or(u32::MAX);
                    let visual = picture::visual(tower.shape(), seed);
                    Prompt::new(picture::row(tower.shape(), ids)?, vec![(picture::start(), visual)])
                }
                None => Prompt::new(Row::text(ids), Vec::new()),
            };
            prompt
                .identity()
                .map_err(|cause| DeviceError::Input(cause.to_string()))?;
            Ok(Request::new(prompt, lengths.group, sampling(index, lengths.new_tokens)))
        });
        requests.collect()
    }

    /// Features of the pictures of each prompt, once for engine and learner.
    fn encode(&self, asked: &[Request<Prompt>]) -> Result<Vec<Placed>, DeviceError> {
        let Some(tower) = &self.tower else {
            return Ok(Vec::new());
        };
        let pictures = asked.iter().flat_map(|request| &request.prompt.visuals);
        let (starts, visuals): (Vec<_>, Vec<_>) = pictures.map(|(start, visual)| (*start, visual)).unzip();
        let features = tower.encode(&visuals)?;
        let picture = |(start, features)| {
            vec![Picture {
                start,
                features,
                // The tower is not trained here.
                gradient: None,
            }]
        };
        Ok(starts.into_iter().zip(features).map(picture).collect())
    }

    /// Samples of an engine that is there for them alone.
    fn sample(&self, asked: &[Request<Prompt>], placed: &[Placed]) -> Result<Vec<Group>, DeviceError> {
        let numbers = placed.iter().flatten().map(|picture| picture.features.len());
        let limits = Limits {
            max_rows: self.memory.rows,
            max_step_tokens: STEP_TOKENS,
            kv_blocks: self.memory.kv_blocks,
            block_size: BLOCK,
            feature_bytes: numbers.sum::<usize>() * bf16::DTYPE.bytes(),
        };
        let longest = self.step.lengths.sequence() + BLOCK;
        let mut runner = DeviceRunner::of_text(&self.bench.gpu, self.bench.weights.clone(), &limits, longest)?;
        for (request, placed) in asked.iter().zip(placed) {
            let identity = request.prompt.identity();
            let identity = identity.map_err(|cause| DeviceError::Input(cause.to_string()))?;
            for ((_, digest), picture) in identity.visuals.iter().zip(placed) {
                runner.remember(*digest, picture.features.clone());
            }
        }
        generate(runner, asked, limits, &|| false).map_err(failed)
    }
}

fn adamw() -> AdamW {
    AdamW {
        learning_rate: 1e-6,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        step: 1,
        seed: 1,
        rounding: Rounding::Stochastic,
    }
}

/// Advantages within a group, by a rule that any completion meets sometimes: an even last token.
fn advantages(group: &Group) -> Vec<f32> {
    let rewards = group.completions.iter().map(|completion| {
        let even = completion.tokens.last().is_some_and(|token| token.id.is_multiple_of(2));
        f32::from(u8::from(even))
    });
    let rewards = rewards.collect::<Vec<_>>();
    let mean = rewards.iter().sum::<f32>() / rewards.len().max(1) as f32;
    let variance = rewards.iter().map(|reward| (reward - mean).powi(2)).sum::<f32>() / rewards.len().max(1) as f32;
    rewards
        .iter()
        .map(|reward| (reward - mean) / (variance.sqrt() + 1e-6))
        .collect()
}

/// The index of every prompt, with ids and positions of it and each of its samples.
fn rows(requests: &[Request<Prompt>], groups: &[Group]) -> Vec<(usize, Vec<u32>, Vec<Position>)> {
    let of = |(index, (request, group)): (usize, (&Request<Prompt>, &Group))| {
        let prompt = &request.prompt.row;
        let rows = group.completions.iter().map(|completion| {
            let row = prompt.followed_by(&completion.ids());
            (index, row.ids, row.positions)
        });
        rows.collect::<Vec<_>>()
    };
    requests.iter().zip(groups).enumerate().flat_map(of).collect()
}

/// Mean of `|d|` of the sampler's and the learner's log-probabilities.
fn apart(groups: &[Group], learned: &[Vec<f32>]) -> f64 {
    let completions = groups.iter().flat_map(|group| &group.completions).zip(learned);
    let differences = completions.flat_map(|(completion, learned)| {
        let tokens = completion.tokens.iter().zip(learned);
        tokens.map(|(token, learned)| f64::from((token.log_probability - learned).abs()))
    });
    let (sum, count) = differences.fold((0.0, 0usize), |(sum, count), one| (sum + one, count + 1));
    sum / count.max(1) as f64
}
