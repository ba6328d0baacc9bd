//! What the commands have in common: which model, in which precision.

use std::path::{Path, PathBuf};

use candle_core::DType;
use clap::{Args, ValueEnum};
use flotilla_model::{
    Config, LoadOptions, Lora, Processor, Vlm,
    media::Resampler,
    processor::ProcessorOptions,
    qwen2_5_vl::{FrameBudget, TimeStep},
};

use crate::{
    device::{Opened, Wanted},
    error::WorkerError,
    models::locate_argument,
    runner::load_options,
};

/// Which model.
#[derive(Args, Clone, Debug)]
pub struct ModelArguments {
    /// Directory with config.json, safetensors and tokenizer.json; or hf://org/name[@revision], s3://bucket/prefix,
    /// gs://bucket/prefix, az://container/prefix, which is fetched into the cache.
    #[arg(long, value_name = "DIR|URI")]
    pub model: PathBuf,
    /// Directory of a LoRA adapter (PEFT's layout) to add, or such a URI.
    #[arg(long, value_name = "DIR|URI")]
    pub adapter: Option<PathBuf>,
    /// Precision of weights and activations.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: Precision,
}

/// Precision of weights and activations.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum Precision {
    /// 32 bits.
    #[default]
    F32,
    /// 16 bits, 8 of them exponent.
    Bf16,
    /// 16 bits, 5 of them exponent.
    F16,
}

impl From<Precision> for DType {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32,
            Precision::Bf16 => Self::BF16,
            Precision::F16 => Self::F16,
        }
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        })
    }
}

/// How pictures and videos are read, where checkpoints leave it open.
#[derive(Args, Clone, Debug, Default)]
pub struct MediaArguments {
    /// Turn pictures upright by their EXIF orientation; the reference's processors do not.
    #[arg(long)]
    pub upright: bool,
    /// How pictures are resized: the reference has a slow and a fast processor (Qwen2.5-VL).
    #[arg(long, value_enum, default_value_t)]
    pub resampler: ResamplerArgument,
    /// Cut the seconds between two slices of a video to a whole number, as transformers 4.57 does (Qwen2.5-VL).
    #[arg(long)]
    pub integer_seconds: bool,
    /// Bound the pixels of a frame by a context of so many tokens, as qwen-vl-utils does; by default the
    /// checkpoint's video preprocessor decides (Qwen2.5-VL).
    #[arg(long, value_name = "TOKENS")]
    pub frame_budget: Option<usize>,
}

/// [`Resampler`] on the command line.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum ResamplerArgument {
    /// As Pillow: the slow processors, and what the models were trained with.
    #[default]
    Pillow,
    /// As torchvision: the fast processors.
    Torchvision,
}

impl MediaArguments {
    fn options(&self) -> ProcessorOptions {
        ProcessorOptions {
            time_step: if self.integer_seconds {
                TimeStep::Integer
            } else {
                TimeStep::Float
            },
            frame_budget: self.frame_budget.map_or(FrameBudget::Checkpoint, FrameBudget::Context),
            resampler: match self.resampler {
                ResamplerArgument::Pillow => Resampler::Pillow,
                ResamplerArgument::Torchvision => Resampler::Torchvision,
            },
        }
    }
}

impl ModelArguments {
    /// Fetches what lies elsewhere: from here on, model and adapter are directories.
    pub fn locate(&mut self, cache: Option<&Path>) -> Result<(), WorkerError> {
        self.model = locate_argument(&self.model, cache)?;
        if let Some(adapter) = &mut self.adapter {
            *adapter = locate_argument(adapter, cache)?;
        }
        Ok(())
    }

    /// The model with its adapter, on a device.
    pub fn load(&self, device: Wanted) -> Result<Vlm, WorkerError> {
        self.load_with(&LoadOptions {
            device: device.open()?.device,
            dtype: self.dtype.into(),
        })
    }

    /// The model with its adapter, where a [`ModelRunner`](crate::runner::ModelRunner) takes it from.
    pub fn load_for_engine(&self, opened: &Opened) -> Result<Vlm, WorkerError> {
        let dtype = self.dtype.into();
        match self.adapter {
            None => self.load_with(&load_options(opened, dtype)),
            Some(_) => self.load_with(&LoadOptions {
                device: opened.device.clone(),
                dtype,
            }),
        }
    }

    fn load_with(&self, options: &LoadOptions) -> Result<Vlm, WorkerError> {
        let mut model = Vlm::load(&self.model, options).map_err(failed("load the model", &self.model))?;
        if let Some(directory) = &self.adapter {
            let failed = || failed("load the adapter", directory);
            let adapter = Lora::load(directory, model.config(), options.dtype, &options.device).map_err(failed())?;
            model.attach(adapter).map_err(failed())?;
        }
        Ok(model)
    }

    /// The configuration alone.
    pub fn config(&self) -> Result<Config, WorkerError> {
        Config::load(&self.model).map_err(failed("read the configuration", &self.model))
    }

    /// The processor files.
    pub fn processor(&self, media: &MediaArguments) -> Result<Processor, WorkerError> {
        Processor::load_with(&self.model, &media.options()).map_err(failed("load the processor", &self.model))
    }
}

/// Wraps an error that another attempt would meet again.
pub(super) fn failed<E: Into<crate::error::Cause>>(what: &str, path: &Path) -> impl FnOnce(E) -> WorkerError {
    let message = format!("failed to {what} in {}", path.display());
    move |error| WorkerError::permanent(message, error)
}
