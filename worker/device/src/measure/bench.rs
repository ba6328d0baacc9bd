//! A language model of random weights and engines over it.

use std::time::Instant;

use flotilla_engine::{Engine, EngineError, Limits, Prompt, Request, Sampling};
use flotilla_kernels::Gpu;
use flotilla_model::Row;
use half::bf16;

use super::{Ceiling, memory::BLOCK, memory::STEP_TOKENS};
use crate::{
    error::DeviceError,
    runner::{DeviceRunner, Sharing},
    shape::TextShape,
    weights::TextWeights,
};

/// The language model of a shape, with random weights.
#[derive(Debug)]
pub struct Bench {
    pub(super) gpu: Gpu,
    pub(super) weights: TextWeights<bf16>,
    pub(super) ceiling: Ceiling,
}

/// An engine over those weights.
pub(super) type DeviceEngine = Engine<DeviceRunner<bf16>>;

impl Bench {
    /// Draws the weights.
    pub fn new(gpu: &Gpu, shape: &TextShape, ceiling: Ceiling) -> Result<Self, DeviceError> {
        Ok(Self {
            gpu: gpu.clone(),
            weights: TextWeights::random(gpu, shape, 1)?,
            ceiling,
        })
    }

    pub(super) fn shape(&self) -> &TextShape {
        &self.weights.shape
    }

    /// For `rows` sequences of `tokens` tokens each.
    pub(super) fn engine(&self, rows: usize, tokens: usize, sharing: Sharing) -> Result<DeviceEngine, DeviceError> {
        let limits = Limits {
            max_rows: rows,
            max_step_tokens: STEP_TOKENS,
            kv_blocks: (rows * (tokens + 2 * BLOCK)).div_ceil(BLOCK) + 64,
            block_size: BLOCK,
            ..Limits::default()
        };
        let mut runner = DeviceRunner::of_text(&self.gpu, self.weights.clone(), &limits, tokens + BLOCK)?;
        runner.set_sharing(sharing)?;
        Engine::new(runner, "", limits).map_err(failed)
    }

    /// Tokens of a prompt like no other of another `index`.
    pub(super) fn ids(&self, index: usize, tokens: usize) -> Vec<u32> {
        let vocabulary = self.shape().vocabulary;
        let id = |at: usize| ((at * 7919 + index * 104_729 + 13) % vocabulary) as u32;
        (0..tokens).map(id).collect()
    }

    pub(super) fn request(&self, index: usize, n: usize, prompt: usize, new_tokens: usize) -> Request<Prompt> {
        let prompt = Prompt::new(Row::text(self.ids(index, prompt)), Vec::new());
        Request::new(prompt, n, sampling(index, new_tokens))
    }
}

pub(super) fn sampling(index: usize, new_tokens: usize) -> Sampling {
    Sampling {
        max_tokens: new_tokens,
        seed: index as u64,
        ..Sampling::default()
    }
}

/// Seconds of one stage after another, each with what the card does in it.
pub(super) struct Watch {
    gpu: Gpu,
    begin: Instant,
}

impl Watch {
    pub fn new(gpu: &Gpu) -> Result<Self, DeviceError> {
        gpu.synchronize()?;
        Ok(Self {
            gpu: gpu.clone(),
            begin: Instant::now(),
        })
    }

    pub fn lap(&mut self) -> Result<f64, DeviceError> {
        self.gpu.synchronize()?;
        let seconds = self.begin.elapsed().as_secs_f64();
        self.begin = Instant::now();
        Ok(seconds)
    }
}

pub(super) fn failed(error: EngineError) -> DeviceError {
    DeviceError::Engine(Box::new(error))
}
