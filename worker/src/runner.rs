//! The model behind an engine, wherever it runs.
//!
//! On the CPU it is the model of `flotilla-model`; on a GPU, in f32 and bf16, the packed one of `flotilla-device` with its own
//! kernels. What that one does not have (f16, adapters that are not merged) runs on the GPU by candle's operations.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device};
use flotilla_api::role::Precision;
#[cfg(feature = "cuda")]
use flotilla_device::{DevicePool, DeviceRunner};
use flotilla_engine::{
    Limits, Prompt, Runner, VlmRunner,
    blocks::Block,
    runner::{Answers, Cause, Chunk, VisualCounts},
};
use flotilla_model::{
    Config, KvPool, LoadOptions, ModelError, Vlm,
    weights::{StoredWeights, TensorSource, Weights},
};
#[cfg(feature = "cuda")]
use half::bf16;

use crate::{
    device::{Opened, Place},
    error::WorkerError,
    group::{Group, Led},
};

/// Share of the free memory of a GPU that keys and values take where nothing else is said. The rest is for pictures on their
/// way and for what the libraries allocate.
pub const CACHE_SHARE: f64 = 0.85;

/// A model with its device.
#[derive(Debug)]
pub enum ModelRunner {
    /// By candle's operations and those of `flotilla-model`.
    Host(Box<VlmRunner>),
    /// On a GPU in f32.
    #[cfg(feature = "cuda")]
    Exact(Box<DeviceRunner<f32>>),
    /// On a GPU in bf16.
    #[cfg(feature = "cuda")]
    Rounded(Box<DeviceRunner<bf16>>),
    /// On several GPUs, each with a process of its own.
    Led(Box<Led>),
}

/// A model of which nothing but the configuration has been read: weights are, tensor by tensor, where they are wanted.
#[derive(Debug)]
pub struct ModelFiles {
    directory: PathBuf,
    random_seed: Option<u64>,
    config: Config,
    tensors: Box<dyn TensorSource>,
}

impl ModelFiles {
    /// Those of a directory; with a seed, random weights for its configuration, which are drawn now, in `dtype`.
    ///
    /// # Errors
    /// Files that are no checkpoint of this configuration.
    pub fn open(directory: &Path, random_seed: Option<u64>, dtype: DType) -> Result<Self, WorkerError> {
        let open = || -> Result<Self, ModelError> {
            let config = Config::load(directory)?;
            let parameters = config.parameters();
            let tensors: Box<dyn TensorSource> = match random_seed {
                Some(seed) => Box::new(Weights::random(&parameters, seed, dtype, &Device::Cpu)?),
                None => Box::new(StoredWeights::open(directory, &parameters, config.names())?),
            };
            Ok(Self {
                directory: directory.to_owned(),
                random_seed,
                config,
                tensors,
            })
        };
        open().map_err(unread(directory))
    }

    /// Where they are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The seed of random weights.
    pub fn random_seed(&self) -> Option<u64> {
        self.random_seed
    }

    /// Sizes and ids.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The weights.
    pub fn tensors(&self) -> &dyn TensorSource {
        &*self.tensors
    }
}

/// What is said of a directory that cannot be loaded.
fn unread(directory: &Path) -> impl FnOnce(ModelError) -> WorkerError {
    let what = format!("failed to load the model in {}", directory.display());
    move |error| WorkerError::permanent(what, error)
}

/// Keys and values of a [`ModelRunner`].
#[derive(Debug)]
pub enum ModelPool {
    /// See [`ModelRunner::Host`].
    Host(KvPool),
    /// See [`ModelRunner::Exact`].
    #[cfg(feature = "cuda")]
    Exact(DevicePool<f32>),
    /// See [`ModelRunner::Rounded`].
    #[cfg(feature = "cuda")]
    Rounded(DevicePool<bf16>),
}

/// Whether this place and format have kernels of their own.
pub fn is_packed(place: Place, dtype: DType) -> bool {
    cfg!(feature = "cuda") && matches!(place, Place::Cuda(_)) && matches!(dtype, DType::F32 | DType::BF16)
}

/// The format that is computed in where nobody says: exact on a CPU, which has no faster one; bf16 on a GPU.
pub fn default_dtype(place: Place) -> DType {
    match place {
        Place::Cpu => DType::F32,
        Place::Cuda(_) => DType::BF16,
    }
}

/// The format of a precision.
pub fn dtype_of(precision: Precision) -> DType {
    match precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
        Precision::F16 => DType::F16,
    }
}

/// The inverse of [`dtype_of`].
pub fn precision_of(dtype: DType) -> Option<Precision> {
    let all = [Precision::F32, Precision::Bf16, Precision::F16];
    all.into_iter().find(|precision| dtype_of(*precision) == dtype)
}

/// How a model is loaded that a [`ModelRunner`] will have: to the host where the weights are packed for the card from there.
pub fn load_options(opened: &Opened, dtype: DType) -> LoadOptions {
    LoadOptions {
        dtype,
        device: if is_packed(opened.place, dtype) {
            Device::Cpu
        } else {
            opened.device.clone()
        },
    }
}

impl ModelRunner {
    /// Takes a model that was loaded with [`load_options`]. `max_tokens` is the longest sequence.
    pub fn new(model: Vlm, opened: &Opened, limits: &Limits, max_tokens: usize) -> Result<Self, WorkerError> {
        #[cfg(feature = "cuda")]
        if let Place::Cuda(number) = opened.place
            && is_packed(opened.place, model.dtype())
            && model.adapter().is_none()
        {
            let (config, weights) = (model.config(), model.weights());
            return Self::packed(number, config, weights, model.dtype(), limits, max_tokens)
                .map_err(|error| WorkerError::retryable("failed to put the model on the GPU", error));
        }
        let _ = (opened, max_tokens);
        Ok(Self::Host(Box::new(VlmRunner::new(model, limits))))
    }

    /// Reads a model where it will run: packed for one GPU or several straight from its files, so that the host never has
    /// all of it; else as [`Self::new`].
    pub fn read(
        directory: &Path,
        random_seed: Option<u64>,
        dtype: DType,
        opened: &Opened,
        limits: &Limits,
        max_tokens: usize,
        group: Option<&Group>,
    ) -> Result<Self, WorkerError> {
        if let Some(group) = group {
            let files = ModelFiles::open(directory, random_seed, dtype)?;
            return crate::group::lead(group, &files, dtype, limits, max_tokens);
        }
        #[cfg(feature = "cuda")]
        if let Place::Cuda(number) = opened.place
            && is_packed(opened.place, dtype)
        {
            let files = ModelFiles::open(directory, random_seed, dtype)?;
            let placed = Self::packed(number, files.config(), files.tensors(), dtype, limits, max_tokens);
            return placed.map_err(|error| match advice(number, &files, dtype, limits) {
                Some(fault) => WorkerError::permanent(format!("failed to put the model on the GPU: {error}"), fault),
                None => WorkerError::retryable("failed to put the model on the GPU", error),
            });
        }
        let options = load_options(opened, dtype);
        let model = read_model(directory, random_seed, &options).map_err(unread(directory))?;
        Self::new(model, opened, limits, max_tokens)
    }

    #[cfg(feature = "cuda")]
    fn packed(
        number: usize,
        config: &Config,
        source: &dyn TensorSource,
        dtype: DType,
        limits: &Limits,
        max_tokens: usize,
    ) -> Result<Self, flotilla_device::DeviceError> {
        let gpu = flotilla_kernels::Gpu::new(number)?;
        Ok(if dtype == DType::BF16 {
            Self::Rounded(Box::new(DeviceRunner::read(&gpu, config, source, limits, max_tokens)?))
        } else {
            Self::Exact(Box::new(DeviceRunner::read(&gpu, config, source, limits, max_tokens)?))
        })
    }

    /// Blocks of keys and values for which this share of the GPU's free memory is enough; in a group, on the GPU that has
    /// least. None on the host, whose memory is not this program's own.
    pub fn room(&self, share: f64, block_size: usize) -> Option<usize> {
        let _ = (share, block_size);
        match self {
            Self::Host(_) => None,
            #[cfg(feature = "cuda")]
            Self::Exact(runner) => runner.blocks_that_fit(share, block_size).ok(),
            #[cfg(feature = "cuda")]
            Self::Rounded(runner) => runner.blocks_that_fit(share, block_size).ok(),
            Self::Led(led) => led.runner().room(share, block_size),
        }
    }

    /// Why the group of GPUs that shares the model computes nothing any more, if that is so.
    pub fn broken(&mut self) -> Option<String> {
        match self {
            Self::Host(_) => None,
            #[cfg(feature = "nccl")]
            Self::Exact(runner) => runner.broken(),
            #[cfg(feature = "nccl")]
            Self::Rounded(runner) => runner.broken(),
            #[cfg(all(feature = "cuda", not(feature = "nccl")))]
            Self::Exact(_) | Self::Rounded(_) => None,
            Self::Led(led) => led.runner_mut().broken(),
        }
    }
}

impl ModelRunner {
    /// Takes over the weights that a model of the host has now; one that runs on the host shares them already. For
    /// [`flotilla_engine::Engine::load_weights`].
    pub fn reload(&mut self, model: &Vlm) -> Result<(), Cause> {
        let _ = model;
        match self {
            Self::Host(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Self::Exact(runner) => Ok(runner.reload(model)?),
            #[cfg(feature = "cuda")]
            Self::Rounded(runner) => Ok(runner.reload(model)?),
            Self::Led(led) => led.runner_mut().reload(model),
        }
    }
}

/// A model of random weights, or the one in a directory.
pub fn read_model(directory: &Path, seed: Option<u64>, options: &LoadOptions) -> Result<Vlm, ModelError> {
    match seed {
        Some(seed) => Vlm::random(Config::load(directory)?, seed, options),
        None => Vlm::load(directory, options),
    }
}

/// Why a model did not get onto a GPU, where it needs more than one.
#[cfg(feature = "cuda")]
fn advice(number: usize, files: &ModelFiles, dtype: DType, limits: &Limits) -> Option<crate::group::GroupFault> {
    let (_, memory) = flotilla_kernels::Gpu::new(number).ok()?.memory().ok()?;
    crate::group::too_large(files.config(), dtype, limits, memory)
}

/// A pool that another runner has made.
#[cfg(feature = "cuda")]
fn strange() -> Cause {
    "the pool of another device".into()
}

impl Runner for ModelRunner {
    type Prompt = Prompt;
    type Pool = ModelPool;

    fn prompt_ids<'a>(&self, prompt: &'a Prompt) -> &'a [u32] {
        &prompt.row.ids
    }

    fn content(&self, prompt: &Prompt, drawn: &[u32], range: Range<usize>, out: &mut Vec<u8>) -> Result<(), Cause> {
        prompt.content(drawn, range, out)
    }

    fn pool(&self, blocks: usize, block_size: usize) -> Result<ModelPool, Cause> {
        Ok(match self {
            Self::Host(runner) => ModelPool::Host(runner.pool(blocks, block_size)?),
            #[cfg(feature = "cuda")]
            Self::Exact(runner) => ModelPool::Exact(runner.pool(blocks, block_size)?),
            #[cfg(feature = "cuda")]
            Self::Rounded(runner) => ModelPool::Rounded(runner.pool(blocks, block_size)?),
            Self::Led(led) => led.runner().pool(blocks, block_size)?,
        })
    }

    fn copy(&mut self, pool: &mut ModelPool, pairs: &[(Block, Block)]) -> Result<(), Cause> {
        match (self, pool) {
            (Self::Host(runner), ModelPool::Host(pool)) => runner.copy(pool, pairs),
            #[cfg(feature = "cuda")]
            (Self::Exact(runner), ModelPool::Exact(pool)) => runner.copy(pool, pairs),
            #[cfg(feature = "cuda")]
            (Self::Rounded(runner), ModelPool::Rounded(pool)) => runner.copy(pool, pairs),
            (Self::Led(led), pool) => led.copy(pool, pairs),
            #[cfg(feature = "cuda")]
            _ => Err(strange()),
        }
    }

    fn step(&mut self, pool: &mut ModelPool, chunks: &[Chunk<'_, Prompt>]) -> Result<Answers, Cause> {
        match (self, pool) {
            (Self::Host(runner), ModelPool::Host(pool)) => runner.step(pool, chunks),
            #[cfg(feature = "cuda")]
            (Self::Exact(runner), ModelPool::Exact(pool)) => runner.step(pool, chunks),
            #[cfg(feature = "cuda")]
            (Self::Rounded(runner), ModelPool::Rounded(pool)) => runner.step(pool, chunks),
            (Self::Led(led), pool) => led.step(pool, chunks),
            #[cfg(feature = "cuda")]
            _ => Err(strange()),
        }
    }

    fn begin(&mut self, pool: &mut ModelPool, chunks: &[Chunk<'_, Prompt>]) -> Result<bool, Cause> {
        match (self, pool) {
            (Self::Host(runner), ModelPool::Host(pool)) => runner.begin(pool, chunks),
            #[cfg(feature = "cuda")]
            (Self::Exact(runner), ModelPool::Exact(pool)) => runner.begin(pool, chunks),
            #[cfg(feature = "cuda")]
            (Self::Rounded(runner), ModelPool::Rounded(pool)) => runner.begin(pool, chunks),
            (Self::Led(led), pool) => led.runner_mut().begin(pool, chunks),
            #[cfg(feature = "cuda")]
            _ => Err(strange()),
        }
    }

    fn finish(&mut self) -> Result<Answers, Cause> {
        match self {
            Self::Host(runner) => runner.finish(),
            #[cfg(feature = "cuda")]
            Self::Exact(runner) => runner.finish(),
            #[cfg(feature = "cuda")]
            Self::Rounded(runner) => runner.finish(),
            Self::Led(led) => led.runner_mut().finish(),
        }
    }

    fn abandon(&mut self) {
        match self {
            Self::Host(runner) => runner.abandon(),
            #[cfg(feature = "cuda")]
            Self::Exact(runner) => runner.abandon(),
            #[cfg(feature = "cuda")]
            Self::Rounded(runner) => runner.abandon(),
            Self::Led(led) => led.runner_mut().abandon(),
        }
    }

    fn lost(&mut self) -> Option<String> {
        match self {
            Self::Host(runner) => runner.lost(),
            #[cfg(feature = "cuda")]
            Self::Exact(runner) => runner.lost(),
            #[cfg(feature = "cuda")]
            Self::Rounded(runner) => runner.lost(),
            Self::Led(led) => {
                led.look();
                None
            }
        }
    }

    fn flush(&mut self) {
        match self {
            Self::Host(runner) => runner.flush(),
            #[cfg(feature = "cuda")]
            Self::Exact(runner) => runner.flush(),
            #[cfg(feature = "cuda")]
            Self::Rounded(runner) => runner.flush(),
            Self::Led(led) => led.runner_mut().flush(),
        }
    }

    fn visual_counts(&self) -> VisualCounts {
        match self {
            Self::Host(runner) => runner.visual_counts(),
            #[cfg(feature = "cuda")]
            Self::Exact(runner) => runner.visual_counts(),
            #[cfg(feature = "cuda")]
            Self::Rounded(runner) => runner.visual_counts(),
            Self::Led(led) => led.runner().visual_counts(),
        }
    }
}
