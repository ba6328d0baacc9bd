//! One step of GRPO with all parameters trained, in one process over one copy of the weights: pictures, samples, rewards,
//! log-probabilities, updates.

use std::ops::Range;

use flotilla_engine::{Group, Limits, Prompt, Request, generate};
use flotilla_grpo::policy::{Known, PolicyLoss};
use flotilla_kernels::{
    Buffer, Float,
    optimizer::{AdamW, Rounding},
};
use flotilla_model::{Visual, rope::Position};
use half::bf16;

use super::{
    Bench, Grpo, GrpoStep, Lengths, Memory, Stage, Tower,
    bench::{Shown, Watch, failed, sampling},
    memory::{BLOCK, STEP_TOKENS},
    picture,
    question::divide,
    stages::Work,
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

/// Tokens that samples of the step before have at most: after a few every size of a decode step has been there.
const WARM_TOKENS: usize = 32;

/// Everything that a step needs.
struct Trainer<'a> {
    bench: &'a Bench,
    step: Grpo,
    memory: Memory,
    shown: Option<Shown>,
    reference: Option<Reference>,
    learner: Learner<bf16, bf16>,
}

/// The frozen model.
struct Reference {
    text: TextWeights<bf16>,
    /// None where the tower is not trained: the reference has the same features then.
    tower: Option<QwenTower<bf16>>,
}

/// Features in the place of a prompt's picture; none where it has no picture, or they are not wanted now.
type Placed = Option<Picture<bf16>>;

/// A prompt with one of its samples.
struct Drawn {
    prompt: usize,
    ids: Vec<u32>,
    positions: Vec<Position>,
}

/// What is learned from.
struct Lesson<'a> {
    asked: &'a [Request<Prompt>],
    drawn: Vec<Drawn>,
    advantages: Vec<f32>,
    prompt_tokens: usize,
    new_tokens: usize,
    /// Samples of each update.
    updates: Vec<Range<usize>>,
}

/// Seconds of what learns, and log-probabilities under the weights that sampled.
#[derive(Default)]
struct Learned {
    vision: f64,
    reference: f64,
    old: f64,
    update: f64,
    tower: f64,
    log_probs: Vec<Vec<f32>>,
}

impl Bench {
    /// A step after another one that warms up. The weights change. Prompts have the pictures that [`Grpo::picture`] says,
    /// where `tower` is there.
    pub fn grpo(&self, step: &Grpo, tower: Option<&QwenVision>) -> Result<GrpoStep, DeviceError> {
        let gpu = &self.gpu;
        gpu.reset_peak();
        let (_, card) = gpu.memory()?;
        let memory = Memory::plan(self.shape(), tower, step, card)
            .ok_or_else(|| DeviceError::Input(format!("a step {} does not fit into {card} bytes", step.lengths)))?;
        let shown = tower.and_then(|tower| Some(Shown::new(gpu, tower, step.picture(tower)?)));
        let shown = shown.transpose()?;
        let trained = shown.as_ref().filter(|_| step.tower == Tower::Trained);
        let mut learner = Learner::new(gpu, self.weights.clone(), memory.rest)?;
        if let Some(Shown { tower, .. }) = trained {
            learner.train_vision(tower.clone())?;
        }
        let reference = memory.reference.then(|| {
            let tower = trained.map(|shown| QwenTower::random(gpu, shown.tower.shape().clone(), 4));
            Ok::<_, DeviceError>(Reference {
                text: TextWeights::random(gpu, self.shape(), 2)?,
                tower: tower.transpose()?,
            })
        });
        let mut trainer = Trainer {
            bench: self,
            step: *step,
            reference: reference.transpose()?,
            shown,
            learner,
            memory,
        };
        trainer.warm_up()?;
        trainer.run(&step.lengths, 1, step.lengths.new_tokens, usize::MAX)
    }
}

impl Trainer<'_> {
    fn trains_tower(&self) -> bool {
        self.shown.is_some() && self.step.tower == Tower::Trained
    }

    /// As many samples as are drawn at once, of a few tokens, and a few micro-batches of each update: after it everything is
    /// compiled and planned.
    fn warm_up(&mut self) -> Result<(), DeviceError> {
        let lengths = self.step.lengths;
        let few = Lengths {
            prompts: lengths.prompts.min(self.memory.rows.div_ceil(lengths.group)),
            ..lengths
        };
        let together = self.memory.settings.tokens / lengths.sequence();
        let tokens = lengths.new_tokens.min(WARM_TOKENS);
        self.run(&few, 0, tokens, 2 * together * lengths.mini_batches)?;
        Ok(())
    }

    /// A step whose prompts no other `round` has. Samples of `tokens` tokens are drawn; `most` of them are learned from, each
    /// repeated to its whole length where it is shorter.
    fn run(&mut self, lengths: &Lengths, round: usize, tokens: usize, most: usize) -> Result<GrpoStep, DeviceError> {
        let gpu = &self.bench.gpu;
        let asked = self.asked(lengths, round, tokens)?;
        let mut watch = Watch::new(gpu)?;
        self.learner.resize(self.memory.rest)?;
        let moved = watch.lap()?;
        let placed = self.encode(None, &asked, 0..asked.len())?;
        let vision = watch.lap()?;
        let groups = self.sample(&asked, &placed)?;
        let sample = watch.lap()?;
        let advantages = groups.iter().flat_map(advantages).collect::<Vec<_>>();
        let reward = watch.lap()?;
        self.learner.resize(self.memory.settings)?;
        let moved = moved + watch.lap()?;
        let mut drawn = drawn(&asked, &groups, lengths.new_tokens);
        drawn.truncate(most);
        let (samples, tokens) = (drawn.len(), drawn.iter().map(|sample| sample.ids.len()).sum());
        let lesson = Lesson {
            asked: &asked,
            advantages,
            prompt_tokens: lengths.prompt_tokens,
            new_tokens: lengths.new_tokens,
            updates: divide(samples, lengths.mini_batches),
            drawn,
        };
        let learned = self.learn(&lesson, placed, &mut watch)?;
        let stages = [
            ("vision", vision + learned.vision),
            ("sample", sample),
            ("reward", reward),
            ("memory", moved),
            ("reference", learned.reference),
            ("old", learned.old),
            ("update", learned.update),
            ("tower", learned.tower),
        ];
        // Stages of what a step has not.
        let absent = |name: &str| match name {
            "vision" => self.shown.is_none(),
            "reference" => self.reference.is_none(),
            "tower" => !self.trains_tower(),
            _ => false,
        };
        let stages = stages.into_iter().filter(|(name, _)| !absent(name));
        let work = Work {
            shape: self.bench.shape(),
            step: &Grpo {
                lengths: *lengths,
                ..self.step
            },
            rows: self.memory.rows,
            picture: self
                .shown
                .as_ref()
                .map(|shown| (shown.tower.shape(), shown.size.patches())),
        };
        let stage = |(name, seconds)| Stage {
            name,
            seconds,
            floor: work.floor(&self.bench.ceiling, name),
        };
        Ok(GrpoStep {
            step: self.step,
            stages: stages.map(stage).collect(),
            tokens,
            drawn: samples * lengths.new_tokens,
            picture: self.shown.as_ref().map(|shown| shown.size),
            apart: apart(&groups, &learned.log_probs),
            peak_bytes: gpu.peak_bytes(),
            memory: self.memory.clone(),
        })
    }

    /// Log-probabilities and updates, from the features by which was sampled.
    fn learn(
        &mut self,
        lesson: &Lesson<'_>,
        mut placed: Vec<Placed>,
        watch: &mut Watch,
    ) -> Result<Learned, DeviceError> {
        let mut learned = Learned::default();
        let frozen = self.score_by_reference(lesson, &placed)?;
        learned.reference = watch.lap()?;
        let first = lesson.updates.first().cloned().unwrap_or_default();
        // Those of the first mini-batch come with its gradients, under the weights that sampled it.
        let later = lesson.samples(first.end..lesson.drawn.len(), &placed);
        let later = self.learner.log_probs(None, &later, TEMPERATURE)?;
        learned.log_probs = vec![Vec::new(); first.end];
        learned.log_probs.extend(later);
        let trained = self.trains_tower();
        if trained {
            let kept = lesson.prompts(&first);
            let of_later = placed.iter_mut().enumerate();
            of_later
                .filter(|(prompt, _)| !kept.contains(prompt))
                .for_each(|(_, picture)| *picture = None);
        }
        learned.old = watch.lap()?;
        for (number, update) in lesson.updates.iter().enumerate() {
            if trained {
                if number > 0 {
                    // What the update before has changed makes other features. The old ones go first.
                    placed.clear();
                    placed = self.encode(None, lesson.asked, lesson.prompts(update))?;
                }
                self.add_gradients_by_features(&mut placed)?;
                learned.vision += watch.lap()?;
            }
            self.add_gradients(lesson, update, &placed, frozen.as_deref(), &mut learned.log_probs)?;
            learned.update += watch.lap()?;
            if trained {
                self.add_gradients_of_tower(lesson.asked, &placed)?;
                learned.tower += watch.lap()?;
            }
            self.learner.update(&adamw(), 1.0)?;
            learned.update += watch.lap()?;
        }
        Ok(learned)
    }

    /// Log-probabilities under the frozen model, for one update after the other: so few features of its tower are there at once.
    fn score_by_reference(
        &mut self,
        lesson: &Lesson<'_>,
        placed: &[Placed],
    ) -> Result<Option<Vec<Vec<f32>>>, DeviceError> {
        let Some(reference) = &self.reference else {
            return Ok(None);
        };
        let mut found = Vec::with_capacity(lesson.drawn.len());
        for update in &lesson.updates {
            let own = reference
                .tower
                .as_ref()
                .map(|tower| self.encode(Some(tower), lesson.asked, lesson.prompts(update)));
            let own = own.transpose()?;
            let samples = lesson.samples(update.clone(), own.as_deref().unwrap_or(placed));
            let scored = self.learner.log_probs(Some(&reference.text), &samples, TEMPERATURE)?;
            found.extend(scored);
        }
        Ok(Some(found))
    }

    /// Zeros, to which samples add their gradients by the features of each picture.
    fn add_gradients_by_features(&self, placed: &mut [Placed]) -> Result<(), DeviceError> {
        for picture in placed.iter_mut().flatten() {
            picture.gradient = Some(self.bench.gpu.zeros(picture.features.len())?);
        }
        Ok(())
    }

    /// Gradients of an update's samples.
    fn add_gradients(
        &mut self,
        lesson: &Lesson<'_>,
        update: &Range<usize>,
        placed: &[Placed],
        frozen: Option<&[Vec<f32>]>,
        old: &mut [Vec<f32>],
    ) -> Result<(), DeviceError> {
        let policy = PolicyLoss {
            clip_low: 0.2,
            clip_high: 0.3,
            dual_clip: Some(3.0),
            kl_coefficient: if frozen.is_some() { 1e-2 } else { 0.0 },
        };
        let weight = ((update.len() * lesson.new_tokens) as f32).recip();
        let samples = lesson.samples(update.clone(), placed);
        self.learner.learn(&samples, TEMPERATURE, |index, log_probs| {
            let index = update.start + index;
            let mut slopes = Vec::new();
            if update.start == 0 {
                old[index] = log_probs.to_vec();
            }
            let known = Known {
                old: &old[index],
                reference: frozen.map(|frozen| frozen[index].as_slice()),
                advantage: &vec![lesson.advantages[index]; log_probs.len()],
                weight: &vec![weight; log_probs.len()],
            };
            policy.gradient(log_probs, known, &mut slopes);
            slopes
        })
    }

    /// Gradients of the tower, once for each picture, from the sums of those by its features.
    fn add_gradients_of_tower(&mut self, asked: &[Request<Prompt>], placed: &[Placed]) -> Result<(), DeviceError> {
        let learned = asked.iter().zip(placed).filter_map(|(request, picture)| {
            let gradient = picture.as_ref()?.gradient.clone()?;
            Some((visual(request)?, gradient))
        });
        let (visuals, gradients): (Vec<&Visual>, Vec<Buffer<f32>>) = learned.unzip();
        self.learner.vision_backward(&visuals, &gradients)
    }

    /// Prompts with their pictures, digested already: as a loader has them ready.
    fn asked(&self, lengths: &Lengths, round: usize, tokens: usize) -> Result<Vec<Request<Prompt>>, DeviceError> {
        let requests = (0..lengths.prompts).map(|index| {
            let index = index + 1000 * round;
            let prompt = self.bench.prompt(index, lengths.prompt_tokens, self.shown.as_ref())?;
            Ok(Request::new(prompt, lengths.group, sampling(index, tokens)))
        });
        requests.collect()
    }

    /// Features of the pictures of some prompts, by the tower of the model unless another is given; a few at a time, as the
    /// memory is planned for.
    fn encode(
        &self,
        tower: Option<&QwenTower<bf16>>,
        asked: &[Request<Prompt>],
        prompts: Range<usize>,
    ) -> Result<Vec<Placed>, DeviceError> {
        let mut placed = Vec::new();
        let Some(shown) = &self.shown else {
            return Ok(placed);
        };
        let tower = tower.unwrap_or(&shown.tower);
        placed.resize_with(asked.len(), || None);
        let prompts = prompts.collect::<Vec<_>>();
        for together in prompts.chunks(shown.size.together()) {
            let visuals = together.iter().filter_map(|prompt| visual(asked.get(*prompt)?));
            let visuals = visuals.collect::<Vec<_>>();
            for (prompt, features) in together.iter().zip(tower.encode(&visuals)?) {
                placed[*prompt] = Some(Picture {
                    start: picture::START,
                    features,
                    gradient: None,
                });
            }
        }
        Ok(placed)
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
        for (request, picture) in asked.iter().zip(placed) {
            let identity = request.prompt.identity();
            let identity = identity.map_err(|cause| DeviceError::Input(cause.to_string()))?;
            for ((_, digest), picture) in identity.visuals.iter().zip(picture) {
                runner.remember(*digest, picture.features.clone());
            }
        }
        generate(runner, asked, limits, &|| false).map_err(failed)
    }
}

impl Lesson<'_> {
    /// Some of the samples, with features.
    fn samples<'a>(&'a self, range: Range<usize>, placed: &'a [Placed]) -> Vec<Sample<'a, bf16>> {
        let samples = self.drawn[range].iter().map(|drawn| Sample {
            ids: &drawn.ids,
            positions: &drawn.positions,
            prompt: self.prompt_tokens,
            pictures: placed
                .get(drawn.prompt)
                .and_then(Option::as_ref)
                .map_or(&[], std::slice::from_ref),
        });
        samples.collect()
    }

    /// Prompts of some samples.
    fn prompts(&self, samples: &Range<usize>) -> Range<usize> {
        let own = &self.drawn[samples.clone()];
        let first = own.first().map_or(0, |drawn| drawn.prompt);
        first..own.last().map_or(first, |drawn| drawn.prompt + 1)
    }
}

/// The picture of a prompt.
fn visual(request: &Request<Prompt>) -> Option<&Visual> {
    request.prompt.visuals.first().map(|(_, visual)| visual)
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

/// Every sample behind its prompt, repeated until it has `tokens` tokens.
fn drawn(requests: &[Request<Prompt>], groups: &[Group], tokens: usize) -> Vec<Drawn> {
    let of = |(prompt, (request, group)): (usize, (&Request<Prompt>, &Group))| {
        let samples = group.completions.iter().map(|completion| {
            let ids = completion.ids().into_iter().cycle().take(tokens).collect::<Vec<_>>();
            let row = request.prompt.row.followed_by(&ids);
            Drawn {
                prompt,
                ids: row.ids,
                positions: row.positions,
            }
        });
        samples.collect::<Vec<_>>()
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
