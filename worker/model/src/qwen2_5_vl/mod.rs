//! Qwen2.5-VL: a windowed vision tower, a patch merger and a language model with multimodal rotary embedding.
//!
//! # Layout
//!
//! | file | what it is |
//! |---|---|
//! | `config.rs` | `config.json`, and the parameters that it asks for |
//! | `processor.rs` | messages and images to token ids, positions and patches |
//! | `visual_processor.rs` | pictures and videos to rows of patches |
//! | `positions.rs` | multimodal rotary positions |
//! | `window.rs` | order of patches and attention windows |
//! | `vision.rs` | vision tower and merger |
//! | `text.rs` | language model: whole rows, and one token at a time over a cache |

pub mod config;
pub mod positions;
pub mod processor;
#[cfg(test)]
mod tests;
mod text;
mod vision;
pub mod visual_processor;
pub mod window;

use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};

use self::{config::Config, processor::ProcessedImage, text::TextTower, vision::VisionTower};
use crate::{ModelError, Result, batch::TextBatch, cache::KvCache, ops::Kernels, weights::Weights};

/// Where and in which precision a model lives.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Device of the weights and of everything computed from them.
    pub device: Device,
    /// Type of the weights and activations.
    pub dtype: DType,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            dtype: DType::F32,
        }
    }
}

/// Whether operations are recorded for a backward pass.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Pass {
    /// Gradients reach every trainable variable ([`Qwen25Vl::set_trainable`]; at first all).
    Train,
    /// Nothing is recorded.
    Infer,
}

/// A model. It can be shared between threads; its variables change in place through [`Var::set`].
#[derive(Clone, Debug)]
pub struct Qwen25Vl {
    config: Config,
    weights: Weights,
    options: LoadOptions,
    kernels: Kernels,
    train: Towers,
    infer: Towers,
}

#[derive(Clone, Debug)]
struct Towers {
    vision: VisionTower,
    text: TextTower,
}

/// The weights as tensors of one pass: recorded where `trainable` says so.
#[derive(Clone, Copy)]
struct Source<'a> {
    weights: &'a Weights,
    trainable: &'a dyn Fn(&str) -> bool,
}

impl Source<'_> {
    fn get(&self, name: &str) -> Result<Tensor> {
        let var = self
            .weights
            .get(name)
            .ok_or_else(|| ModelError::Input(format!("no parameter {name}")))?;
        let trainable = (self.trainable)(name);
        Ok(if trainable {
            var.as_tensor().clone()
        } else {
            var.as_detached_tensor()
        })
    }
}

impl Towers {
    fn new(config: &Config, weights: &Weights, trainable: &dyn Fn(&str) -> bool) -> Result<Self> {
        let source = Source { weights, trainable };
        Ok(Self {
            vision: VisionTower::new(&config.vision, source)?,
            text: TextTower::new(&config.text, config.tie_word_embeddings, source)?,
        })
    }
}

impl Qwen25Vl {
    /// Reads `config.json` and the safetensors of a Hugging Face style directory.
    pub fn load(dir: &Path, options: &LoadOptions) -> Result<Self> {
        let config = Config::load(dir)?;
        let weights = Weights::load(dir, &config.parameters(), options.dtype, &options.device)?;
        Self::new(config, weights, options.clone())
    }

    /// Draws the weights from a seed: linear maps with deviation `1 / sqrt(fan_in)`, embeddings at most 0.08, biases
    /// zero. The same seed gives the same bytes on every machine.
    pub fn random(config: Config, seed: u64, options: &LoadOptions) -> Result<Self> {
        let weights = Weights::random(&config.parameters(), seed, options.dtype, &options.device)?;
        Self::new(config, weights, options.clone())
    }

    fn new(config: Config, weights: Weights, options: LoadOptions) -> Result<Self> {
        Ok(Self {
            train: Towers::new(&config, &weights, &|_| true)?,
            infer: Towers::new(&config, &weights, &|_| false)?,
            config,
            weights,
            options,
            kernels: Kernels::default(),
        })
    }

    /// Sizes and ids.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Device of the weights.
    pub fn device(&self) -> &Device {
        &self.options.device
    }

    /// Type of the weights.
    pub fn dtype(&self) -> DType {
        self.options.dtype
    }

    /// Every variable, sorted by name. They are shared: [`Var::set`] changes this model.
    pub fn named_vars(&self) -> Vec<(String, Var)> {
        self.weights
            .iter()
            .map(|(name, var)| (name.to_owned(), var.clone()))
            .collect()
    }

    /// The variables as a set.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Writes one safetensors file under the hub's names; the bytes depend on the values only.
    pub fn save_weights(&self, path: &Path) -> Result<()> {
        self.weights.save(path)
    }

    /// Reads other weights for this architecture from the safetensors in `dir`; [`Weights::assign`] puts them in place.
    pub fn read_weights(&self, dir: &Path) -> Result<Weights> {
        let options = &self.options;
        Weights::load(dir, &self.config.parameters(), options.dtype, &options.device)
    }

    /// A model of the same values that does not follow this one.
    pub fn deep_copy(&self) -> Result<Self> {
        Self::new(self.config.clone(), self.weights.deep_copy()?, self.options.clone())
    }

    /// From now on [`Pass::Train`] records only what leads to the variables whose names `trainable` accepts: work on
    /// gradients of the others is saved.
    pub fn set_trainable(&mut self, trainable: impl Fn(&str) -> bool) -> Result<()> {
        self.train = Towers::new(&self.config, &self.weights, &trainable)?;
        Ok(())
    }

    /// Chooses fused or composed operations.
    pub fn set_kernels(&mut self, kernels: Kernels) {
        self.kernels = kernels;
    }

    /// The operations this model runs on, also for what is computed from its outputs.
    pub fn kernels(&self) -> Kernels {
        self.kernels
    }

    fn towers(&self, pass: Pass) -> &Towers {
        match pass {
            Pass::Train => &self.train,
            Pass::Infer => &self.infer,
        }
    }

    /// Features of each image, `[tokens, hidden]`; all images go through the tower together.
    pub fn encode_images(&self, images: &[&ProcessedImage], pass: Pass) -> Result<Vec<Tensor>> {
        if images.is_empty() {
            return Ok(Vec::new());
        }
        let width = self.config.vision.patch_values();
        let mut values = Vec::with_capacity(images.iter().map(|image| image.patches.len()).sum());
        for image in images {
            values.extend_from_slice(&image.patches);
        }
        let rows = values.len() / width;
        let patches = Tensor::from_vec(values, (rows, width), self.device())?.to_dtype(self.dtype())?;
        let grids = images.iter().map(|image| image.grid).collect::<Vec<_>>();
        let features = self.towers(pass).vision.forward(&patches, &grids, self.kernels)?;
        let unit = self.config.vision.merge_unit();
        let mut start = 0;
        let mut parts = Vec::with_capacity(images.len());
        for [frames, height, width] in grids {
            let tokens = frames * height * width / unit;
            parts.push(features.narrow(0, start, tokens)?);
            start += tokens;
        }
        Ok(parts)
    }

    /// Final normalized hidden states of right-padded rows, `[rows, width, hidden]`. States at padding are
    /// unspecified (finite).
    pub fn forward(&self, batch: &TextBatch, pass: Pass) -> Result<Tensor> {
        self.towers(pass).text.forward(batch, self.kernels)
    }

    /// Logits `[.., vocab]` of normalized hidden states `[.., hidden]`.
    pub fn logits(&self, hidden: &Tensor, pass: Pass) -> Result<Tensor> {
        let mut shape = hidden.dims().to_vec();
        let width = shape.pop().unwrap_or(0);
        let flat = hidden.reshape(((), width))?;
        let logits = self.towers(pass).text.logits(&flat, self.kernels)?;
        shape.push(self.config.text.vocab_size);
        Ok(logits.reshape(shape)?)
    }

    /// Runs the prompts once and lays row `i`'s keys and values `repeat[i]` times into a cache with room for `room`
    /// more tokens a row. Also the normalized hidden state of each cache row's last token, `[cache rows, hidden]`:
    /// the logits of the first new token come from it.
    pub fn prefill(&self, batch: &TextBatch, repeat: &[usize], room: usize) -> Result<(KvCache, Tensor)> {
        self.infer.text.prefill(batch, repeat, room, self.kernels)
    }

    /// Feeds one token per row and returns its normalized hidden state, `[rows, hidden]`. Rows may have different
    /// lengths; positions continue where each row stands.
    pub fn decode(&self, cache: &mut KvCache, ids: &[u32]) -> Result<Tensor> {
        self.infer.text.decode(cache, ids, self.kernels)
    }
}
