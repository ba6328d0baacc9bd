//! How fast a released shape runs on this card with random weights, through the engine as users meet it.

use std::time::Instant;

use flotilla_engine::{Engine, EngineError, Limits, Prompt, Request, Sampling};
use flotilla_kernels::{Float, Gpu, bench::Ceilings};
use flotilla_model::Row;
use half::bf16;
use serde::Serialize;

use crate::{
    error::DeviceError,
    runner::DeviceRunner,
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

    fn engine(&self, rows: usize, tokens: usize, shares: bool) -> Result<Engine<DeviceRunner<bf16>>, DeviceError> {
        let limits = Limits {
            max_rows: rows,
            max_step_tokens: self.step_tokens,
            kv_blocks: (rows * (tokens + 2 * BLOCK)).div_ceil(BLOCK) + 64,
            block_size: BLOCK,
            ..Limits::default()
        };
        let mut runner = DeviceRunner::of_text(&self.gpu, self.weights.clone(), &limits, tokens + BLOCK)?;
        runner.set_shares(shares);
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
        let steps = 48;
        let mut engine = self.engine(rows, context + steps + 24, true)?;
        for index in 0..rows {
            engine
                .submit(&self.request(index, 1, context, steps + 24))
                .map_err(failed)?;
        }
        let seconds = self.steady(&mut engine, rows, steps)?;
        let bytes = decode_bytes(self.shape(), rows * (context + 12 + steps / 2));
        Ok(self.line(format!("decode {rows} x {context}"), rows, seconds, bytes, rows))
    }

    /// Decoding: one group of `n` samples over a prompt; `shares` says whether its keys and values are read once.
    pub fn group(&self, n: usize, prompt: usize, shares: bool) -> Result<Line, DeviceError> {
        let steps = 48;
        let mut engine = self.engine(n, prompt + steps + 24, shares)?;
        engine.submit(&self.request(0, n, prompt, steps + 24)).map_err(failed)?;
        let seconds = self.steady(&mut engine, n, steps)?;
        let own = n * (12 + steps / 2);
        let bytes = decode_bytes(self.shape(), prompt + own);
        let how = if shares {
            "prefix read once"
        } else {
            "prefix read for each"
        };
        Ok(self.line(
            format!("decode group of {n} over {prompt}, {how}"),
            n,
            seconds,
            bytes,
            n,
        ))
    }

    /// Seconds of a step once all rows decode.
    fn steady(&self, engine: &mut Engine<DeviceRunner<bf16>>, rows: usize, steps: usize) -> Result<f64, DeviceError> {
        // The first step of a size warms up, the second is recorded.
        let mut warm = 0;
        while warm < 8 {
            let step = engine.step().map_err(failed)?;
            warm = if step.events.len() == rows { warm + 1 } else { 0 };
            if engine.is_idle() {
                return Err(DeviceError::Input(format!("{rows} rows never decoded together")));
            }
        }
        self.gpu.synchronize()?;
        let (begin, allocations) = (Instant::now(), self.gpu.allocations());
        for _ in 0..steps {
            engine.step().map_err(failed)?;
        }
        self.gpu.synchronize()?;
        let seconds = begin.elapsed().as_secs_f64() / steps as f64;
        let more = self.gpu.allocations() - allocations;
        if more > 0 {
            return Err(DeviceError::Input(format!("{more} allocations in {steps} warm steps")));
        }
        Ok(seconds)
    }

    fn line(&self, what: String, rate: usize, seconds: f64, bytes: f64, rows: usize) -> Line {
        let memory = bytes / self.ceilings.bandwidth;
        let arithmetic = decode_operations(self.shape(), rows) / self.ceilings.arithmetic;
        Line {
            what,
            rate: rate as f64 / seconds,
            unit: "tokens",
            milliseconds: seconds * 1e3,
            floor: memory.max(arithmetic) * 1e3,
            bound: if memory > arithmetic { "memory" } else { "arithmetic" },
        }
    }

    /// Prompts of `tokens` tokens each, `rows` of them, until each has its first token; the second time counts.
    pub fn prefill(&self, rows: usize, tokens: usize) -> Result<Line, DeviceError> {
        let mut engine = self.engine(rows, tokens + 2, true)?;
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
        })
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
