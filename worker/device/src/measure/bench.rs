//! A language model of random weights and engines over it.

use std::time::Instant;

use flotilla_engine::{Engine, EngineError, Limits, Prompt, Sampling};
use flotilla_kernels::Gpu;
use flotilla_model::{Row, Visual};
use half::bf16;

use super::{
    Ceiling,
    memory::{BLOCK, STEP_TOKENS},
    picture::{self, Size},
};
use crate::{
    error::DeviceError,
    runner::{DeviceRunner, Sharing},
    shape::{QwenVision, TextShape},
    tower::Vision,
    vision::QwenTower,
    weights::TextWeights,
};

/// The language model of a shape, with random weights.
#[derive(Debug)]
pub struct Bench {
    pub(super) gpu: Gpu,
    pub(super) weights: TextWeights<bf16>,
    pub(super) ceiling: Ceiling,
}

/// A picture in each prompt, and the tower that encodes it.
pub(super) struct Shown {
    pub tower: QwenTower<bf16>,
    pub size: Size,
}

impl Shown {
    /// Draws the weights of a tower.
    pub fn new(gpu: &Gpu, tower: &QwenVision, size: Size) -> Result<Self, DeviceError> {
        Ok(Self {
            tower: QwenTower::random(gpu, tower.clone(), 3)?,
            size,
        })
    }

    fn visual(&self, index: usize) -> Visual {
        let seed = u32::try_from(index).unwrap_or(u32::MAX);
        self.size.visual(self.tower.shape(), seed)
    }
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

    /// For `rows` sequences of `tokens` tokens each, with pictures or without. All engines share one tower.
    pub(super) fn engine(
        &self,
        rows: usize,
        tokens: usize,
        sharing: Sharing,
        shown: Option<&Shown>,
    ) -> Result<DeviceEngine, DeviceError> {
        let limits = Limits {
            max_rows: rows,
            max_step_tokens: STEP_TOKENS,
            kv_blocks: (rows * (tokens + 2 * BLOCK)).div_ceil(BLOCK) + 64,
            block_size: BLOCK,
            ..Limits::default()
        };
        let vision = shown.map_or(Vision::None, |shown| Vision::Qwen(Box::new(shown.tower.clone())));
        let (weights, longest) = (self.weights.clone(), tokens + BLOCK);
        let mut runner = DeviceRunner::shared(&self.gpu, weights, vision, &limits, longest, true)?;
        runner.set_sharing(sharing)?;
        Engine::new(runner, "", limits).map_err(failed)
    }

    /// Tokens of a prompt like no other of another `index`.
    pub(super) fn ids(&self, index: usize, tokens: usize) -> Vec<u32> {
        let vocabulary = self.shape().vocabulary;
        let id = |at: usize| ((at * 7919 + index * 104_729 + 13) % vocabulary) as u32;
        (0..tokens).map(id).collect()
    }

    /// A prompt whose tokens differ from those of another `index` from the first on, with a picture that differs too. It is
    /// digested already.
    pub(super) fn prompt(&self, index: usize, tokens: usize, shown: Option<&Shown>) -> Result<Prompt, DeviceError> {
        let visuals = shown.map(|shown| (picture::START, shown.visual(index)));
        let prompt = Prompt::new(self.row(index, tokens, shown)?, visuals.into_iter().collect());
        prompt
            .identity()
            .map_err(|cause| DeviceError::Input(cause.to_string()))?;
        Ok(prompt)
    }

    /// As [`Self::prompt`], but with the picture of another prompt of that length, whose digest is known.
    pub(super) fn prompt_like(
        &self,
        other: &Prompt,
        index: usize,
        shown: Option<&Shown>,
    ) -> Result<Prompt, DeviceError> {
        let mut prompt = other.clone();
        prompt.row = self.row(index, other.row.ids.len(), shown)?;
        Ok(prompt)
    }

    fn row(&self, index: usize, tokens: usize, shown: Option<&Shown>) -> Result<Row, DeviceError> {
        let ids = self.ids(index, tokens);
        match shown {
            Some(shown) => Ok(shown.size.row(shown.tower.shape(), ids)?),
            None => Ok(Row::text(ids)),
        }
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
