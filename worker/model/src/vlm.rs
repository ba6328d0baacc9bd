//! A vision-language model of any family: what engine, trainer and server see.

use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};

use crate::{
    ModelError, Result,
    batch::TextBatch,
    config::{Config, Vision},
    layers::Source,
    llava_onevision,
    lora::Lora,
    ops::Kernels,
    pool::{KvPool, PackedSpans, Span},
    qwen2_5_vl,
    text::TextTower,
    visual::{Layout, Visual},
    weights::Weights,
};

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
    /// Gradients reach every trainable variable ([`Vlm::set_trainable`]; at first all).
    Train,
    /// Nothing is recorded.
    Infer,
}

/// A model. It can be shared between threads; its variables change in place through [`Var::set`].
#[derive(Clone, Debug)]
pub struct Vlm {
    config: Config,
    weights: Weights,
    adapter: Option<Lora>,
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

#[derive(Clone, Debug)]
enum VisionTower {
    Qwen25Vl(qwen2_5_vl::VisionTower),
    LlavaOneVision(llava_onevision::VisionTower),
}

impl Towers {
    fn new(config: &Config, source: Source<'_>) -> Result<Self> {
        let vision = match &config.vision {
            Vision::Qwen25Vl(vision) => VisionTower::Qwen25Vl(qwen2_5_vl::VisionTower::new(vision, source)?),
            Vision::LlavaOneVision(vision) => {
                VisionTower::LlavaOneVision(llava_onevision::VisionTower::new(vision, source)?)
            }
        };
        Ok(Self {
            vision,
            text: TextTower::new(&config.text, source)?,
        })
    }
}

impl Vlm {
    /// Reads `config.json` and the safetensors of a Hugging Face style directory.
    pub fn load(dir: &Path, options: &LoadOptions) -> Result<Self> {
        let config = Config::load(dir)?;
        let weights = read_weights(&config, dir, options)?;
        Self::new(config, weights, None, options.clone())
    }

    /// Draws the weights from a seed: linear maps with deviation `1 / sqrt(fan_in)`, embeddings at most 0.08, biases
    /// zero. The same seed gives the same bytes on every machine.
    pub fn random(config: Config, seed: u64, options: &LoadOptions) -> Result<Self> {
        let weights = Weights::random(&config.parameters(), seed, options.dtype, &options.device)?;
        Self::new(config, weights, None, options.clone())
    }

    fn new(config: Config, weights: Weights, adapter: Option<Lora>, options: LoadOptions) -> Result<Self> {
        let towers = |trainable: &dyn Fn(&str) -> bool| {
            let source = Source {
                weights: &weights,
                adapter: adapter.as_ref(),
                trainable,
            };
            Towers::new(&config, source)
        };
        Ok(Self {
            train: towers(&|_| true)?,
            infer: towers(&|_| false)?,
            config,
            weights,
            adapter,
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

    /// Every variable of the model itself, sorted by name. They are shared: [`Var::set`] changes this model.
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
        read_weights(&self.config, dir, &self.options)
    }

    /// A model of the same values that does not follow this one; an adapter is shared.
    pub fn deep_copy(&self) -> Result<Self> {
        let weights = self.weights.deep_copy()?;
        Self::new(self.config.clone(), weights, self.adapter.clone(), self.options.clone())
    }

    /// The adapter that the linear maps add, if there is one.
    pub fn adapter(&self) -> Option<&Lora> {
        self.adapter.as_ref()
    }

    /// Adds an adapter (in the place of one that is there). From now on [`Pass::Train`] records only what leads to the
    /// adapter's variables.
    pub fn attach(&mut self, adapter: Lora) -> Result<()> {
        let (config, weights, options) = (self.config.clone(), self.weights.clone(), self.options.clone());
        let kernels = self.kernels;
        *self = Self::new(config, weights, Some(adapter), options)?;
        self.kernels = kernels;
        self.set_trainable(|name| name.contains(".lora_"))
    }

    /// Adds the adapter into the weights, which change in place, and drops it. Every variable is trainable afterwards.
    pub fn merge_adapter(&mut self) -> Result<()> {
        if let Some(adapter) = self.adapter.take() {
            adapter.merge_into(&self.weights)?;
            let kernels = self.kernels;
            *self = Self::new(self.config.clone(), self.weights.clone(), None, self.options.clone())?;
            self.kernels = kernels;
        }
        Ok(())
    }

    /// From now on [`Pass::Train`] records only what leads to the variables whose names `trainable` accepts: work on
    /// gradients of the others is saved.
    pub fn set_trainable(&mut self, trainable: impl Fn(&str) -> bool) -> Result<()> {
        let source = Source {
            weights: &self.weights,
            adapter: self.adapter.as_ref(),
            trainable: &trainable,
        };
        self.train = Towers::new(&self.config, source)?;
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

    /// Features of each visual, `[tokens, hidden]`; all of them go through the tower together.
    pub fn encode(&self, visuals: &[&Visual], pass: Pass) -> Result<Vec<Tensor>> {
        self.encode_traced(visuals, pass, |_| {})
    }

    /// As [`Self::encode`]; `seen` gets the stream after each block of the vision tower.
    pub fn encode_traced(&self, visuals: &[&Visual], pass: Pass, seen: impl FnMut(&Tensor)) -> Result<Vec<Tensor>> {
        if visuals.is_empty() {
            return Ok(Vec::new());
        }
        match &self.towers(pass).vision {
            VisionTower::Qwen25Vl(tower) => self.encode_patches(tower, visuals, seen),
            VisionTower::LlavaOneVision(tower) => tower.forward(visuals, self.dtype(), self.kernels, seen),
        }
    }

    fn encode_patches(
        &self,
        tower: &qwen2_5_vl::VisionTower,
        visuals: &[&Visual],
        seen: impl FnMut(&Tensor),
    ) -> Result<Vec<Tensor>> {
        let mut grids = Vec::with_capacity(visuals.len());
        let mut values = Vec::with_capacity(visuals.iter().map(|visual| visual.values.len()).sum());
        for visual in visuals {
            let Layout::Patches { grid, .. } = visual.layout else {
                let message = "squares of another family cannot be read as patches";
                return Err(ModelError::Input(message.to_owned()));
            };
            grids.push(grid);
            values.extend_from_slice(&visual.values);
        }
        let (width, unit) = (tower.config().patch_values(), tower.config().merge_unit());
        let rows = values.len() / width;
        let patches = Tensor::from_vec(values, (rows, width), self.device())?.to_dtype(self.dtype())?;
        let features = tower.forward(&patches, &grids, self.kernels, seen)?;
        let mut start = 0;
        let mut parts = Vec::with_capacity(visuals.len());
        for grid in grids {
            let tokens = grid.iter().product::<usize>() / unit;
            parts.push(features.narrow(0, start, tokens)?);
            start += tokens;
        }
        Ok(parts)
    }

    /// Final normalized hidden states of right-padded rows, `[rows, width, hidden]`. States at padding are
    /// unspecified (finite).
    pub fn forward(&self, batch: &TextBatch, pass: Pass) -> Result<Tensor> {
        self.forward_traced(batch, pass, |_| {})
    }

    /// As [`Self::forward`]; `seen` gets the stream before each layer of the language model and after the last,
    /// `[rows * width, hidden]`.
    pub fn forward_traced(&self, batch: &TextBatch, pass: Pass, seen: impl FnMut(&Tensor)) -> Result<Tensor> {
        self.towers(pass).text.forward(batch, self.kernels, seen)
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

    /// Room for the keys and values of `blocks * block_size` tokens of sequences that [`Self::extend`] computes.
    pub fn pool(&self, blocks: usize, block_size: usize) -> Result<KvPool> {
        KvPool::new(&self.config.text, blocks, block_size, self.dtype(), self.device())
    }

    /// Copies whole blocks of a pool, from the first of each pair to the second. No pair reads what one before it has
    /// written, and no block is written twice.
    pub fn copy(&self, pool: &mut KvPool, pairs: &[(u32, u32)]) -> Result<()> {
        pool.copy(pairs, self.kernels)
    }

    /// Computes the next tokens of several sequences together: parts of prompts and drawn tokens in any mixture, without
    /// padding. Their keys and values go into the pool. Gives the normalized hidden state of the last token of each span
    /// that wants it, `[wanted, hidden]`.
    ///
    /// No two spans may be of one sequence, and none may write into a block that another one has.
    pub fn extend(&self, pool: &mut KvPool, spans: &[Span<'_>]) -> Result<Tensor> {
        if spans.is_empty() {
            let shape = (0, self.config.text.hidden_size);
            return Ok(Tensor::zeros(shape, self.dtype(), self.device())?);
        }
        let packed = PackedSpans::new(spans, pool)?;
        self.infer.text.extend(pool, &packed, self.kernels)
    }
}

fn read_weights(config: &Config, dir: &Path, options: &LoadOptions) -> Result<Weights> {
    Weights::load(
        dir,
        &config.parameters(),
        config.names(),
        options.dtype,
        &options.device,
    )
}
