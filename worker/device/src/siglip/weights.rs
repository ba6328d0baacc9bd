//! Weights of the tower and the projector on the card.

use flotilla_kernels::{Buffer, Float, Gpu, rows};
use flotilla_model::{llava_onevision::VisionConfig, weights::TensorSource};

use crate::{error::DeviceError, shape::SiglipVision, weights::values};

/// Numbers of a patch are filled up with zeros to a multiple of this: 588 are no multiple of 16 bytes.
const ALIGNED: usize = 8;

/// `x weight^T + bias`.
#[derive(Clone, Debug)]
pub(super) struct Linear<T> {
    /// `[outputs, inputs]`.
    pub weight: Buffer<T>,
    /// `[outputs]`; zeros where a projector has none.
    pub bias: Buffer<T>,
}

/// A layer normalization.
#[derive(Clone, Debug)]
pub(super) struct LayerNorm<T> {
    pub weight: Buffer<T>,
    pub bias: Buffer<T>,
}

#[derive(Clone, Debug)]
pub(super) struct Layer<T> {
    pub norm1: LayerNorm<T>,
    /// Rows of queries, keys, values.
    pub qkv: Linear<T>,
    pub output: Linear<T>,
    pub norm2: LayerNorm<T>,
    pub up: Linear<T>,
    pub down: Linear<T>,
}

/// Everything before the language model.
#[derive(Clone, Debug)]
pub(super) struct TowerWeights<T> {
    /// `[hidden, padded]`.
    pub patch_embed: Buffer<T>,
    /// `[tokens, hidden]`: what is added to the tokens of every square, the bias of the patches in it.
    pub positions: Buffer<T>,
    pub layers: Vec<Layer<T>>,
    pub projector: [Linear<T>; 2],
    /// `[output]`.
    pub newline: Buffer<T>,
}

/// Numbers of a patch with their zeros.
pub(super) fn padded(shape: &SiglipVision) -> usize {
    shape.patch_values().next_multiple_of(ALIGNED)
}

/// Where values come from.
pub(super) enum Origin<'a> {
    /// A source, by name.
    Host(&'a dyn TensorSource),
    /// A seed: matrices with the deviation `1 / sqrt(inputs)`.
    Random(u64),
}

impl Origin<'_> {
    /// `rows` in all of the matrices of these names, under one another.
    fn matrix<T: Float>(&mut self, gpu: &Gpu, names: &[String], rows: usize, inputs: usize) -> Made<T> {
        match self {
            Self::Host(source) => packed(gpu, *source, names),
            Self::Random(seed) => {
                *seed += 1;
                let buffer = gpu.alloc(rows * inputs)?;
                rows::fill_normal(gpu, &buffer, (inputs as f32).sqrt().recip(), *seed)?;
                Ok(buffer)
            }
        }
    }

    /// The vectors of these names behind one another, `width` numbers in all; `otherwise` where they are random.
    fn vector<T: Float>(&mut self, gpu: &Gpu, names: &[String], width: usize, otherwise: f32) -> Made<T> {
        match self {
            Self::Host(source) => packed(gpu, *source, names),
            Self::Random(_) => Ok(gpu.upload(&vec![T::from_f32(otherwise); width])?),
        }
    }

    fn linear<T: Float>(
        &mut self,
        gpu: &Gpu,
        names: &[String],
        (outputs, inputs): (usize, usize),
        biased: bool,
    ) -> Result<Linear<T>, DeviceError> {
        let of = |kind: &str| names.iter().map(|name| format!("{name}.{kind}")).collect::<Vec<_>>();
        Ok(Linear {
            weight: self.matrix(gpu, &of("weight"), outputs, inputs)?,
            bias: match biased {
                true => self.vector(gpu, &of("bias"), outputs, 0.0)?,
                false => gpu.zeros(outputs)?,
            },
        })
    }

    fn norm<T: Float>(&mut self, gpu: &Gpu, name: &str, width: usize) -> Result<LayerNorm<T>, DeviceError> {
        Ok(LayerNorm {
            weight: self.vector(gpu, &[format!("{name}.weight")], width, 1.0)?,
            bias: self.vector(gpu, &[format!("{name}.bias")], width, 0.0)?,
        })
    }

    fn layer<T: Float>(&mut self, gpu: &Gpu, shape: &SiglipVision, at: &str) -> Result<Layer<T>, DeviceError> {
        let (hidden, inner) = (shape.hidden, shape.intermediate);
        let attention = ["q", "k", "v"].map(|name| format!("{at}.self_attn.{name}_proj"));
        let mut linear = |names: &[String], sizes| self.linear(gpu, names, sizes, true);
        Ok(Layer {
            qkv: linear(&attention, (3 * hidden, hidden))?,
            output: linear(&[format!("{at}.self_attn.out_proj")], (hidden, hidden))?,
            up: linear(&[format!("{at}.mlp.fc1")], (inner, hidden))?,
            down: linear(&[format!("{at}.mlp.fc2")], (hidden, inner))?,
            norm1: self.norm(gpu, &format!("{at}.layer_norm1"), hidden)?,
            norm2: self.norm(gpu, &format!("{at}.layer_norm2"), hidden)?,
        })
    }

    /// `[hidden, padded]`: zeros behind the numbers of each row.
    fn patch_embed<T: Float>(&mut self, gpu: &Gpu, shape: &SiglipVision, name: &str) -> Made<T> {
        let (width, padded) = (shape.patch_values(), padded(shape));
        let narrow = self.matrix::<T>(gpu, &[name.to_owned()], shape.hidden, width)?;
        let mut wide = vec![T::default(); shape.hidden * padded];
        for (to, from) in wide
            .chunks_exact_mut(padded)
            .zip(gpu.download(&narrow)?.chunks_exact(width))
        {
            to[..width].copy_from_slice(from);
        }
        Ok(gpu.upload(&wide)?)
    }

    fn positions<T: Float>(&mut self, gpu: &Gpu, shape: &SiglipVision, [table, bias]: [&str; 2]) -> Made<T> {
        match self {
            Self::Host(source) => {
                let (mut sums, bias) = (values::<f32>(*source, table)?, values::<f32>(*source, bias)?);
                for row in sums.chunks_exact_mut(bias.len()) {
                    row.iter_mut().zip(&bias).for_each(|(sum, bias)| *sum += bias);
                }
                let rounded = sums.into_iter().map(T::from_f32).collect::<Vec<_>>();
                Ok(gpu.upload(&rounded)?)
            }
            Self::Random(_) => self.matrix(gpu, &[], shape.tokens(), shape.hidden),
        }
    }
}

type Made<T> = Result<Buffer<T>, DeviceError>;

/// Parameters of a source behind one another.
fn packed<T: Float>(gpu: &Gpu, weights: &dyn TensorSource, names: &[String]) -> Made<T> {
    let parts = names.iter().map(|name| values::<T>(weights, name));
    Ok(gpu.upload(&parts.collect::<Result<Vec<_>, _>>()?.concat())?)
}

impl<T: Float> TowerWeights<T> {
    pub(super) fn build(gpu: &Gpu, config: &VisionConfig, mut origin: Origin<'_>) -> Result<Self, DeviceError> {
        let shape = SiglipVision::from(config);
        let at = "vision_tower.vision_model";
        let patches = format!("{at}.embeddings.patch_embedding");
        let table = format!("{at}.embeddings.position_embedding.weight");
        let layers = (0..shape.used).map(|index| origin.layer(gpu, &shape, &format!("{at}.encoder.layers.{index}")));
        let layers = layers.collect::<Result<_, _>>()?;
        let mut projector = |name: &str, inputs: usize| {
            let names = [format!("multi_modal_projector.{name}")];
            origin.linear(gpu, &names, (shape.output, inputs), config.projector_bias)
        };
        Ok(Self {
            layers,
            projector: [
                projector("linear_1", shape.hidden)?,
                projector("linear_2", shape.output)?,
            ],
            patch_embed: origin.patch_embed(gpu, &shape, &format!("{patches}.weight"))?,
            positions: origin.positions(gpu, &shape, [&table, &format!("{patches}.bias")])?,
            newline: origin.vector(gpu, &["image_newline".to_owned()], shape.output, 0.0)?,
        })
    }
}
