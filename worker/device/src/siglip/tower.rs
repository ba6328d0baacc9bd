//! The tower, computed: squares in, features of whole visuals out.

use flotilla_kernels::{
    Buffer, Finish, Float, Gemm, Gpu,
    activation::{Gelu, add_bias, gelu},
    attention::{self, Attention, Rows, Segments},
    norm::{Norm, layer_norm},
    pictures::{self, Squares},
};
use flotilla_model::{
    Config, Vision, Visual,
    llava_onevision::{Arrangement, VisionConfig},
    weights::TensorSource,
};

use super::{
    mixture::Mixture,
    turns::turns,
    weights::{Layer, LayerNorm, Linear, Origin, TowerWeights, padded},
};
use crate::{error::DeviceError, shape::SiglipVision};

/// Patches that go through the tower together: more squares wait for their turn.
const MOST_PATCHES: usize = 1 << 15;

/// Tower, projector and line end on the card.
#[derive(Clone, Debug)]
pub struct SiglipTower<T> {
    pub(super) gpu: Gpu,
    pub(super) shape: SiglipVision,
    pub(super) config: VisionConfig,
    pub(super) weights: TowerWeights<T>,
    /// Squares that go through together at most.
    most: usize,
}

impl<T: Float> SiglipTower<T> {
    /// That of a source; None if the model has another one.
    pub fn load(gpu: &Gpu, config: &Config, weights: &dyn TensorSource) -> Result<Option<Self>, DeviceError> {
        match &config.vision {
            Vision::LlavaOneVision(vision) => Self::build(gpu, vision, Origin::Host(weights)).map(Some),
            Vision::Qwen25Vl(_) => Ok(None),
        }
    }

    /// Random weights, for measuring.
    pub fn random(gpu: &Gpu, config: &VisionConfig, seed: u64) -> Result<Self, DeviceError> {
        Self::build(gpu, config, Origin::Random(seed))
    }

    fn build(gpu: &Gpu, config: &VisionConfig, origin: Origin<'_>) -> Result<Self, DeviceError> {
        let shape = SiglipVision::from(config);
        Ok(Self {
            weights: TowerWeights::build(gpu, config, origin)?,
            gpu: gpu.clone(),
            config: config.clone(),
            most: (MOST_PATCHES / shape.tokens()).max(1),
            shape,
        })
    }

    /// Sizes.
    pub fn shape(&self) -> &SiglipVision {
        &self.shape
    }

    /// The same tower with at most this many squares at once.
    pub fn at_most(self, squares: usize) -> Self {
        Self { most: squares, ..self }
    }

    /// Features `[tokens, output]` of each visual.
    pub fn encode(&self, visuals: &[&Visual]) -> Result<Vec<Buffer<T>>, DeviceError> {
        let arrangements = visuals.iter().map(|visual| self.arrangement(visual));
        let arrangements = arrangements.collect::<Result<Vec<_>, _>>()?;
        let mut features = Vec::with_capacity(visuals.len());
        let mut start = 0;
        while start < visuals.len() {
            let (mut squares, mut end) = (0, start);
            while end < visuals.len() && (end == start || squares + arrangements[end].squares <= self.most) {
                squares += arrangements[end].squares;
                end += 1;
            }
            features.extend(self.encode_together(&visuals[start..end], &arrangements[start..end])?);
            start = end;
        }
        Ok(features)
    }

    fn arrangement(&self, visual: &Visual) -> Result<Arrangement, DeviceError> {
        let arrangement = Arrangement::new(&visual.layout, &self.config)?;
        let expected = self.squares(arrangement.squares).values();
        if visual.values.len() != expected {
            return Err(DeviceError::Input(format!(
                "{} values for {} squares of {} pixels, which take {expected}",
                visual.values.len(),
                arrangement.squares,
                self.shape.pixels
            )));
        }
        Ok(arrangement)
    }

    fn encode_together(
        &self,
        visuals: &[&Visual],
        arrangements: &[Arrangement],
    ) -> Result<Vec<Buffer<T>>, DeviceError> {
        let (gpu, width) = (&self.gpu, self.shape.output);
        let pixels = self.squares(1).values();
        let squares = visuals.iter().flat_map(|visual| visual.values.chunks_exact(pixels));
        let squares = squares.collect::<Vec<_>>();
        let rows = squares.len() * self.shape.tokens();
        // Behind the tokens of all squares is the end of a line.
        let tokens = gpu.alloc((rows + 1) * width)?;
        gpu.copy(&self.weights.newline, &tokens.slice(rows * width..(rows + 1) * width)?)?;
        let mut feed = gpu.feed(squares.len() * pixels)?;
        let (mut left, mut start) = (squares.as_slice(), 0);
        for turn in turns(squares.len(), self.most) {
            let (together, others) = left.split_at(turn);
            let length = turn * self.shape.tokens() * width;
            self.forward(&feed.push(together)?, turn, &tokens.slice(start..start + length)?)?;
            (left, start) = (others, start + length);
        }
        let mut first = 0;
        let arranged = arrangements.iter().map(|arrangement| {
            let mixture = Mixture::new(&arrangement.cells, first, rows);
            first += arrangement.squares * self.shape.tokens();
            self.arrange(&tokens, &mixture)
        });
        arranged.collect()
    }

    fn squares(&self, count: usize) -> Squares {
        Squares {
            count,
            channels: self.config.tower.num_channels,
            side: self.shape.pixels,
            patch: self.shape.patch,
        }
    }

    /// Tokens of squares, `[squares * tokens, output]`, before they are arranged, from their pixels.
    pub(super) fn forward(&self, pixels: &Buffer<f32>, count: usize, out: &Buffer<T>) -> Result<(), DeviceError> {
        let pass = Pass::new(&self.gpu, &self.shape, count)?;
        self.embed(pixels, &pass)?;
        for layer in &self.weights.layers {
            self.layer(layer, &pass)?;
        }
        self.project(&pass, out)
    }

    /// Patches to the stream, with their positions.
    pub(super) fn embed(&self, pixels: &Buffer<f32>, pass: &Pass<T>) -> Result<(), DeviceError> {
        let (gpu, hidden, width) = (&self.gpu, self.shape.hidden, padded(&self.shape));
        let patches = gpu.alloc::<T>(pass.rows * width)?;
        pictures::patches(gpu, self.squares(pass.squares), pixels, width, &patches)?;
        let product = Gemm::linear(pass.rows, hidden, width);
        gpu.gemm(product, &patches, &self.weights.patch_embed, &pass.stream)?;
        let square = self.shape.tokens() * hidden;
        Ok(add_bias(
            gpu,
            pass.squares,
            square,
            &self.weights.positions,
            &pass.stream,
        )?)
    }

    fn layer(&self, layer: &Layer<T>, pass: &Pass<T>) -> Result<(), DeviceError> {
        self.norm(&layer.norm1, pass)?;
        self.queries(layer, pass)?;
        self.attend(pass)?;
        self.output(layer, pass)?;
        self.norm(&layer.norm2, pass)?;
        self.up(layer, pass)?;
        self.down(layer, pass)
    }

    pub(super) fn norm(&self, norm: &LayerNorm<T>, pass: &Pass<T>) -> Result<(), DeviceError> {
        #[allow(
            clippy::cast_possible_truncation,
            reason = "an epsilon is kept in f32 by every kernel"
        )]
        let shape = Norm {
            rows: pass.rows,
            width: self.shape.hidden,
            eps: self.config.tower.layer_norm_eps as f32,
        };
        let (weight, bias) = (&norm.weight, &norm.bias);
        Ok(layer_norm(
            &self.gpu,
            shape,
            &pass.stream,
            None,
            weight,
            bias,
            &pass.normed,
        )?)
    }

    pub(super) fn queries(&self, layer: &Layer<T>, pass: &Pass<T>) -> Result<(), DeviceError> {
        let product = Gemm::linear(pass.rows, 3 * self.shape.hidden, self.shape.hidden);
        self.linear(product, &pass.normed, &layer.qkv, &pass.qkv)
    }

    /// Each square sees itself alone.
    pub(super) fn attend(&self, pass: &Pass<T>) -> Result<(), DeviceError> {
        let (shape, rows, hidden) = (&self.shape, pass.rows, self.shape.hidden);
        let rule = Attention {
            heads: shape.heads,
            kv_heads: shape.heads,
            head_dim: shape.head_dim(),
            scale: (shape.head_dim() as f32).sqrt().recip(),
            causal: false,
        };
        let segments = Segments {
            queries: &pass.segments,
            keys: &pass.segments,
            query_tokens: rows,
            key_tokens: rows,
        };
        let part = |index: usize| pass.qkv.slice(index * hidden..pass.qkv.len());
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let [q, k, v] = [&q, &k, &v].map(|part| Rows::new(part, 3 * hidden));
        Ok(attention::forward(
            &self.gpu,
            &rule,
            q,
            k,
            v,
            &segments,
            &pass.mixed,
            None,
        )?)
    }

    pub(super) fn output(&self, layer: &Layer<T>, pass: &Pass<T>) -> Result<(), DeviceError> {
        let product = Gemm::linear(pass.rows, self.shape.hidden, self.shape.hidden).accumulate();
        self.linear(product, &pass.mixed, &layer.output, &pass.stream)
    }

    pub(super) fn up(&self, layer: &Layer<T>, pass: &Pass<T>) -> Result<(), DeviceError> {
        let product = Gemm::linear(pass.rows, self.shape.intermediate, self.shape.hidden);
        let (gpu, finish) = (&self.gpu, Finish::BiasGelu(&layer.up.bias));
        Ok(gpu.gemm_finished(product, &pass.normed, &layer.up.weight, &pass.inner, finish)?)
    }

    pub(super) fn down(&self, layer: &Layer<T>, pass: &Pass<T>) -> Result<(), DeviceError> {
        let product = Gemm::linear(pass.rows, self.shape.hidden, self.shape.intermediate).accumulate();
        self.linear(product, &pass.inner, &layer.down, &pass.stream)
    }

    fn linear(&self, product: Gemm, x: &Buffer<T>, layer: &Linear<T>, out: &Buffer<T>) -> Result<(), DeviceError> {
        Ok(self.gpu.gemm_with_bias(product, x, &layer.weight, &layer.bias, out)?)
    }

    /// The stream to tokens of the language model's width.
    pub(super) fn project(&self, pass: &Pass<T>, out: &Buffer<T>) -> Result<(), DeviceError> {
        let (gpu, shape, rows) = (&self.gpu, &self.shape, pass.rows);
        let [first, second] = &self.weights.projector;
        let wide = gpu.alloc(rows * shape.output)?;
        let product = Gemm::linear(rows, shape.output, shape.hidden);
        gpu.gemm(product, &pass.stream, &first.weight, &wide)?;
        let sizes = (rows, shape.output);
        gelu(gpu, Gelu::Erf, sizes, &wide, Some(&first.bias), &wide)?;
        self.linear(Gemm::linear(rows, shape.output, shape.output), &wide, second, out)
    }

    /// Tokens in the order of the sequence.
    pub(super) fn arrange(&self, tokens: &Buffer<T>, mixture: &Mixture) -> Result<Buffer<T>, DeviceError> {
        let (gpu, width) = (&self.gpu, self.shape.output);
        let (at, weights) = (gpu.upload(&mixture.at)?, gpu.upload(&mixture.weights)?);
        let out = gpu.alloc(mixture.at.len() / pictures::TAPS * width)?;
        pictures::mix_rows(gpu, width, tokens, &at, &weights, &out)?;
        Ok(out)
    }
}

/// Activations of squares on their way through the tower.
pub(super) struct Pass<T> {
    pub squares: usize,
    /// Tokens of all squares.
    pub rows: usize,
    /// Where the tokens of each square begin, and where the last end.
    pub segments: Buffer<u32>,
    pub stream: Buffer<T>,
    pub normed: Buffer<T>,
    pub qkv: Buffer<T>,
    pub mixed: Buffer<T>,
    pub inner: Buffer<T>,
}

impl<T: Float> Pass<T> {
    pub(super) fn new(gpu: &Gpu, shape: &SiglipVision, squares: usize) -> Result<Self, DeviceError> {
        let rows = squares * shape.tokens();
        let begin = |square: usize| u32::try_from(square * shape.tokens()).unwrap_or(u32::MAX);
        let wide = |width: usize| gpu.alloc(rows * width);
        Ok(Self {
            squares,
            rows,
            segments: gpu.upload(&(0..=squares).map(begin).collect::<Vec<_>>())?,
            stream: wide(shape.hidden)?,
            normed: wide(shape.hidden)?,
            qkv: wide(3 * shape.hidden)?,
            mixed: wide(shape.hidden)?,
            inner: wide(shape.intermediate)?,
        })
    }
}
