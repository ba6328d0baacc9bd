//! How fast a released shape runs on this card with random weights, through the engine as users meet it.

use std::time::Instant;

use flotilla_engine::{Engine, EngineError, Group, Limits, Prompt, Request, Sampling, generate};
use flotilla_kernels::{
    Float, Gpu,
    bench::Ceilings,
    optimizer::{AdamW, Rounding},
};
use flotilla_model::{Row, rope::Position};
use half::bf16;
use serde::Serialize;

use crate::{
    error::DeviceError,
    learner::{Known, Learner, Plan, Policy, Sample, Settings},
    runner::{DeviceRunner, Sharing},
    shape::{QwenVision, TextShape},
    vision::QwenTower,
    weights::TextWeights,
};

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// What was measured.
    pub what: String,
    /// What a second brings of it.
    pub rate: f64,
    /// What the rate counts: tokens, pictures.
    pub unit: &'static str,
    /// Milliseconds of one step, or of the whole where there are no steps.
    pub milliseconds: f64,
    /// Milliseconds that memory or arithmetic set as the least, by the ceilings measured before.
    pub floor: f64,
    /// What sets the floor.
    pub bound: &'static str,
    /// Milliseconds of a decode step in which the card had nothing to do: scheduling, and what is done with the tokens.
    pub host: Option<f64>,
}

impl Line {
    /// Share of the floor's speed that is reached.
    pub fn share(&self) -> f64 {
        self.floor / self.milliseconds
    }
}

/// Bytes that a decode step reads at least: every weight but the embedding table once, and the keys and values of
/// `contexts` tokens in all.
pub fn decode_bytes(shape: &TextShape, contexts: usize) -> f64 {
    (bf16::DTYPE.bytes() * (shape.read_parameters() + shape.kv_values() * contexts)) as f64
}

/// Operations of a decode step over `rows` sequences.
pub fn decode_operations(shape: &TextShape, rows: usize) -> f64 {
    shape.token_operations() * rows as f64
}

/// The language model of a shape, with random weights.
#[derive(Debug)]
pub struct Bench {
    gpu: Gpu,
    weights: TextWeights<bf16>,
    ceilings: Ceilings,
    step_tokens: usize,
}

/// Steps of one size before it is measured.
const WARM: usize = 8;

/// Tokens of a block of keys and values.
const BLOCK: usize = 16;

impl Bench {
    /// Draws the weights.
    pub fn new(gpu: &Gpu, shape: &TextShape, ceilings: Ceilings) -> Result<Self, DeviceError> {
        Ok(Self {
            gpu: gpu.clone(),
            weights: TextWeights::random(gpu, shape, 1)?,
            ceilings,
            step_tokens: 8192,
        })
    }

    /// The weights, for a learner.
    pub fn weights(&self) -> &TextWeights<bf16> {
        &self.weights
    }

    fn shape(&self) -> &TextShape {
        &self.weights.shape
    }

    fn engine(&self, rows: usize, tokens: usize, sharing: Sharing) -> Result<Engine<DeviceRunner<bf16>>, DeviceError> {
        let limits = Limits {
            max_rows: rows,
            max_step_tokens: self.step_tokens,
            kv_blocks: (rows * (tokens + 2 * BLOCK)).div_ceil(BLOCK) + 64,
            block_size: BLOCK,
            ..Limits::default()
        };
        let mut runner = DeviceRunner::of_text(&self.gpu, self.weights.clone(), &limits, tokens + BLOCK)?;
        runner.set_sharing(sharing)?;
        Engine::new(runner, "", limits).map_err(failed)
    }

    fn request(&self, index: usize, n: usize, prompt: usize, new_tokens: usize) -> Request<Prompt> {
        let vocabulary = self.shape().vocabulary;
        let id = |at: usize| ((at * 7919 + index * 104_729 + 13) % vocabulary) as u32;
        let sampling = Sampling {
            max_tokens: new_tokens,
            seed: index as u64,
            ..Sampling::default()
        };
        Request::new(
            Prompt::new(Row::text((0..prompt).map(id).collect()), Vec::new()),
            n,
            sampling,
        )
    }

    /// Decoding: `rows` sequences, each after a prompt of its own of `context` tokens.
    pub fn decode(&self, rows: usize, context: usize) -> Result<Line, DeviceError> {
        let (steps, early) = (48, self.early(rows * context));
        let new_tokens = early + steps + 2 * WARM;
        let mut engine = self.engine(rows, context + new_tokens, Sharing::WhereItPays)?;
        for index in 0..rows {
            let request = self.request(index, 1, context, new_tokens);
            engine.submit(&request).map_err(failed)?;
        }
        let steady = self.steady(&mut engine, rows, steps)?;
        let bytes = decode_bytes(self.shape(), rows * (context + early / 2 + WARM + steps / 2));
        Ok(self.line(format!("decode {rows} x {context}"), rows, steady, bytes, rows))
    }

    /// Decoding: `groups` of `n` samples, each group over a prompt of its own.
    pub fn groups(&self, groups: usize, n: usize, prompt: usize, sharing: Sharing) -> Result<Line, DeviceError> {
        let (steps, rows, early) = (48, groups * n, self.early(groups * prompt));
        let new_tokens = early + steps + 2 * WARM;
        let mut engine = self.engine(rows, prompt + new_tokens, sharing)?;
        for index in 0..groups {
            let request = self.request(index, n, prompt, new_tokens);
            engine.submit(&request).map_err(failed)?;
        }
        let steady = self.steady(&mut engine, rows, steps)?;
        let bytes = decode_bytes(self.shape(), groups * prompt + rows * (early / 2 + WARM + steps / 2));
        let how = sharing.name();
        Ok(self.line(
            format!("decode {groups} groups of {n} over {prompt}, {how}"),
            rows,
            steady,
            bytes,
            rows,
        ))
    }

    /// Decoding as in [`Self::groups`] without anything shared: every sample computes and stores a prompt of its own.
    pub fn alone(&self, n: usize, prompt: usize) -> Result<Line, DeviceError> {
        let line = self.decode(n, prompt)?;
        Ok(Line {
            what: format!("decode {n} over {prompt} each, nothing shared"),
            ..line
        })
    }

    /// Tokens that the first sequences draw while the prompts of the last, `prompts` tokens in all, are still computed.
    fn early(&self, prompts: usize) -> usize {
        prompts.div_ceil(self.step_tokens) + 1
    }

    /// Seconds of a step once all rows decode.
    fn steady(
        &self,
        engine: &mut Engine<DeviceRunner<bf16>>,
        rows: usize,
        steps: usize,
    ) -> Result<Steady, DeviceError> {
        // The first step of a size warms up, the second is recorded.
        let mut warm = 0;
        while warm < WARM {
            let step = engine.step().map_err(failed)?;
            warm = if step.events.len() == rows { warm + 1 } else { 0 };
            if engine.is_idle() {
                return Err(DeviceError::Input(format!("{rows} rows never decoded together")));
            }
        }
        self.gpu.synchronize()?;
        let (begin, allocations) = (Instant::now(), self.gpu.allocations());
        let on_card = engine.runner().on_card();
        for _ in 0..steps {
            let drawn = engine.step().map_err(failed)?.events.len();
            if drawn != rows {
                return Err(DeviceError::Input(format!("a step of {drawn} of {rows} rows")));
            }
        }
        self.gpu.synchronize()?;
        let seconds = begin.elapsed().as_secs_f64() / steps as f64;
        let card = (engine.runner().on_card() - on_card).as_secs_f64() / steps as f64;
        let more = self.gpu.allocations() - allocations;
        if more > 0 {
            return Err(DeviceError::Input(format!("{more} allocations in {steps} warm steps")));
        }
        Ok(Steady {
            seconds,
            host: seconds - card,
        })
    }

    fn line(&self, what: String, rate: usize, steady: Steady, bytes: f64, rows: usize) -> Line {
        let Steady { seconds, host } = steady;
        let memory = bytes / self.ceilings.bandwidth;
        let arithmetic = decode_operations(self.shape(), rows) / self.ceilings.arithmetic;
        Line {
            what,
            rate: rate as f64 / seconds,
            unit: "tokens",
            milliseconds: seconds * 1e3,
            floor: memory.max(arithmetic) * 1e3,
            bound: if memory > arithmetic { "memory" } else { "arithmetic" },
            host: Some(host * 1e3),
        }
    }

    /// Prompts of `tokens` tokens each, `rows` of them, until each has its first token; the second time counts.
    pub fn prefill(&self, rows: usize, tokens: usize) -> Result<Line, DeviceError> {
        let mut engine = self.engine(rows, tokens + 2, Sharing::WhereItPays)?;
        let mut seconds = 0.0;
        for round in 0..3 {
            for index in 0..rows {
                let request = self.request(1000 * (round + 1) + index, 1, tokens, 1);
                engine.submit(&request).map_err(failed)?;
            }
            self.gpu.synchronize()?;
            let begin = Instant::now();
            while !engine.is_idle() {
                engine.step().map_err(failed)?;
            }
            self.gpu.synchronize()?;
            seconds = begin.elapsed().as_secs_f64();
        }
        let shape = self.shape();
        let all = rows * tokens;
        // The head computes the last token of each prompt alone.
        let head = 2.0 * (shape.vocabulary * shape.hidden * (all - rows)) as f64;
        let pairs = rows as f64 * tokens as f64 * (tokens + 1) as f64 / 2.0;
        let operations = shape.token_operations() * all as f64 - head + shape.attention_operations(1) * pairs;
        Ok(Line {
            what: format!("prefill {rows} x {tokens}"),
            rate: all as f64 / seconds,
            unit: "tokens",
            milliseconds: seconds * 1e3,
            floor: operations / self.ceilings.arithmetic * 1e3,
            bound: "arithmetic",
            host: None,
        })
    }
}

/// A step once it is always the same.
#[derive(Clone, Copy)]
struct Steady {
    seconds: f64,
    /// Those in which the card had nothing to do.
    host: f64,
}

/// One step of GRPO.
#[derive(Clone, Copy, Debug)]
pub struct Grpo {
    /// Prompts.
    pub prompts: usize,
    /// Samples of each.
    pub group: usize,
    /// Tokens of a prompt, of which most would be a picture's.
    pub prompt_tokens: usize,
    /// Tokens of a sample.
    pub new_tokens: usize,
    /// Whether the log-probabilities of a frozen reference are computed, from a second copy of the weights.
    pub reference: bool,
}

/// Seconds of one step of GRPO by stage, in one process over one copy of the weights.
#[derive(Clone, Debug, Serialize)]
pub struct GrpoStep {
    /// Drawing the samples.
    pub sample: f64,
    /// Rewards and advantages, by a rule.
    pub reward: f64,
    /// Log-probabilities under the weights as they are.
    pub old: f64,
    /// Those of the reference.
    pub reference: f64,
    /// Gradients and the update.
    pub update: f64,
    /// Tokens of prompts and samples that are trained on.
    pub tokens: usize,
    /// Mean of `|d|` of the sampler's log-probabilities and the learner's.
    pub apart: f64,
    /// The most bytes that were allocated.
    pub peak_bytes: usize,
    /// Bytes as planned, keys and values of the engine included.
    #[serde(skip)]
    pub plan: Plan,
}

impl GrpoStep {
    /// The whole.
    pub fn seconds(&self) -> f64 {
        self.sample + self.reward + self.old + self.reference + self.update
    }

    /// Tokens of prompts and samples per second of the whole step: the `perf/throughput` of EasyR1 and verl.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds()
    }
}

/// Temperature of the samples.
const TEMPERATURE: f32 = 1.0;

impl Bench {
    /// The second of two steps of GRPO with all parameters trained: the first warms up. The weights change.
    pub fn grpo(&self, spec: Grpo) -> Result<GrpoStep, DeviceError> {
        let gpu = &self.gpu;
        gpu.reset_peak();
        let samples = spec.prompts * spec.group;
        let tokens = spec.prompt_tokens + spec.new_tokens;
        let limits = Limits {
            max_rows: samples.min(128),
            max_step_tokens: 4096,
            kv_blocks: samples.min(128) * (tokens + 2 * BLOCK) / BLOCK + 64,
            block_size: BLOCK,
            ..Limits::default()
        };
        let pool = limits.kv_tokens() * self.shape().kv_values() * bf16::DTYPE.bytes();
        let settings = Settings::new((4 * tokens).min(8192).max(tokens));
        let reference = match spec.reference {
            true => Some(TextWeights::random(gpu, self.shape(), 2)?),
            false => None,
        };
        let mut learner = Learner::<bf16, bf16>::new(gpu, self.weights.clone(), settings)?;
        let (_, card) = gpu.memory()?;
        let plan = Plan::new(self.shape(), bf16::DTYPE, &settings, pool, card);
        let mut step = None;
        for round in 0..2 {
            step = Some(self.grpo_step(spec, round, &limits, &mut learner, reference.as_ref(), plan.clone())?);
        }
        step.ok_or_else(|| DeviceError::Input("no step".to_owned()))
    }

    fn grpo_step(
        &self,
        spec: Grpo,
        round: usize,
        limits: &Limits,
        learner: &mut Learner<bf16, bf16>,
        reference: Option<&TextWeights<bf16>>,
        plan: Plan,
    ) -> Result<GrpoStep, DeviceError> {
        let mut watch = Watch::new(&self.gpu)?;
        let requests = (0..spec.prompts)
            .map(|index| self.request(index + 1000 * round, spec.group, spec.prompt_tokens, spec.new_tokens));
        let requests = requests.collect::<Vec<_>>();
        let runner = DeviceRunner::of_text(
            &self.gpu,
            self.weights.clone(),
            limits,
            spec.prompt_tokens + spec.new_tokens + BLOCK,
        )?;
        let groups = generate(runner, &requests, *limits, &|| false).map_err(failed)?;
        let sample = watch.lap()?;
        let advantages = groups.iter().flat_map(advantages).collect::<Vec<_>>();
        let reward = watch.lap()?;
        let rows = rows(&requests, &groups);
        let samples = rows.iter().map(|(ids, positions)| Sample {
            ids,
            positions,
            prompt: spec.prompt_tokens,
            pictures: &[],
        });
        let samples = samples.collect::<Vec<_>>();
        let old = learner.log_probs(None, &samples, TEMPERATURE)?;
        let old_seconds = watch.lap()?;
        let frozen = reference.map(|weights| learner.log_probs(Some(weights), &samples, TEMPERATURE));
        let frozen = frozen.transpose()?;
        let reference_seconds = watch.lap()?;
        let policy = Policy {
            clip_low: 0.2,
            clip_high: 0.3,
            dual_clip: Some(3.0),
            kl_coefficient: if frozen.is_some() { 1e-2 } else { 0.0 },
        };
        let weight = ((samples.len() * spec.new_tokens) as f32).recip();
        learner.learn(&samples, TEMPERATURE, |index, log_probs| {
            let mut slopes = Vec::new();
            let known = Known {
                old: &old[index],
                reference: frozen.as_ref().map(|frozen| frozen[index].as_slice()),
                advantage: &vec![advantages[index]; log_probs.len()],
                weight: &vec![weight; log_probs.len()],
            };
            policy.gradient(log_probs, known, &mut slopes);
            slopes
        })?;
        learner.update(&adamw(), 1.0)?;
        let update = watch.lap()?;
        Ok(GrpoStep {
            sample,
            reward,
            old: old_seconds,
            reference: reference_seconds,
            update,
            tokens: samples.iter().map(|sample| sample.ids.len()).sum(),
            apart: apart(&groups, &old),
            peak_bytes: self.gpu.peak_bytes(),
            plan,
        })
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

/// Ids and positions of every prompt with each of its samples.
fn rows(requests: &[Request<Prompt>], groups: &[Group]) -> Vec<(Vec<u32>, Vec<Position>)> {
    let of = |(request, group): (&Request<Prompt>, &Group)| {
        let prompt = &request.prompt.row;
        let rows = group.completions.iter().map(|completion| {
            let row = prompt.followed_by(&completion.ids());
            (row.ids, row.positions)
        });
        rows.collect::<Vec<_>>()
    };
    requests.iter().zip(groups).flat_map(of).collect()
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

/// Seconds of one stage after another, each with what the card does in it.
struct Watch {
    gpu: Gpu,
    begin: Instant,
}

impl Watch {
    fn new(gpu: &Gpu) -> Result<Self, DeviceError> {
        gpu.synchronize()?;
        Ok(Self {
            gpu: gpu.clone(),
            begin: Instant::now(),
        })
    }

    fn lap(&mut self) -> Result<f64, DeviceError> {
        self.gpu.synchronize()?;
        let seconds = self.begin.elapsed().as_secs_f64();
        self.begin = Instant::now();
        Ok(seconds)
    }
}

/// Pictures of `side` patches each way through a random tower, `count` together, from their values on the host.
pub fn vision(
    gpu: &Gpu,
    ceilings: &Ceilings,
    shape: &QwenVision,
    count: usize,
    side: usize,
) -> Result<Line, DeviceError> {
    let tower = QwenTower::<bf16>::random(gpu, shape.clone(), 1)?;
    let patches = side * side;
    let values = vec![0.25f32; count * patches * shape.patch_values()];
    let grids = vec![[1, side, side]; count];
    let mut seconds = f64::INFINITY;
    for _ in 0..4 {
        gpu.synchronize()?;
        let begin = Instant::now();
        tower.forward(&values, &grids)?;
        gpu.synchronize()?;
        seconds = seconds.min(begin.elapsed().as_secs_f64());
    }
    Ok(Line {
        what: format!("vision {count} of {patches} patches"),
        rate: count as f64 / seconds,
        unit: "pictures",
        milliseconds: seconds * 1e3,
        floor: vision_operations(shape, patches) * count as f64 / ceilings.arithmetic * 1e3,
        bound: "arithmetic",
        host: None,
    })
}

/// Operations of one picture: matrices of every block and of the merger, attention in windows and over the whole.
pub fn vision_operations(shape: &QwenVision, patches: usize) -> f64 {
    let (hidden, inner, merged) = (shape.hidden, shape.intermediate, shape.merged());
    let block = 4 * hidden * hidden + 3 * hidden * inner;
    let matrices = shape.patch_values() * hidden + shape.depth * block;
    let merger = merged * merged + merged * shape.output;
    let unit = shape.merge * shape.merge;
    let window = (shape.window * shape.window * unit).min(patches);
    let seen = shape.full.len() * patches + (shape.depth - shape.full.len()) * window;
    let attention = 4.0 * (hidden * patches) as f64 * seen as f64;
    2.0 * (matrices * patches) as f64 + 2.0 * (merger * (patches / unit)) as f64 + attention
}

fn failed(error: EngineError) -> DeviceError {
    DeviceError::Engine(Box::new(error))
}
