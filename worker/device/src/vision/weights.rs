//! Packed weights of the tower: one copy, which the engine reads and the learner updates in place.

use flotilla_kernels::{Buffer, Float, Gpu, rows};
use flotilla_model::{
    Config, Vision,
    rope::frequencies,
    weights::{TensorSource, Weights},
};

use super::QwenTower;
use crate::{
    error::DeviceError,
    shape::QwenVision,
    weights::{assign, values},
};

/// Base of the frequencies: fixed in the reference.
const THETA: f64 = 10_000.0;

/// A linear layer with its bias.
#[derive(Clone, Debug)]
pub(crate) struct Linear<T> {
    /// `[outputs, inputs]`.
    pub weight: Buffer<T>,
    /// `[outputs]`.
    pub bias: Buffer<T>,
}

/// One block of the tower.
#[derive(Clone, Debug)]
pub(crate) struct Block<T> {
    pub norm1: Buffer<T>,
    pub qkv: Linear<T>,
    pub proj: Linear<T>,
    pub norm2: Buffer<T>,
    /// `[2 * padded, hidden]`: rows of the gate, zeros, rows of the other half, zeros.
    pub gate_up: Linear<T>,
    /// `[hidden, padded]`.
    pub down: Linear<T>,
}

/// Where the values of a tower come from.
enum Origin<'a> {
    Host(&'a dyn TensorSource),
    Random(u64),
}

impl Origin<'_> {
    fn values<T: Float>(
        &mut self,
        gpu: &Gpu,
        name: &str,
        (outputs, inputs): (usize, usize),
    ) -> Result<Buffer<T>, DeviceError> {
        match self {
            Self::Host(source) => Ok(gpu.upload(&values::<T>(*source, name)?)?),
            Self::Random(seed) => {
                *seed += 1;
                let buffer = gpu.alloc(outputs * inputs)?;
                rows::fill_normal(gpu, &buffer, (inputs as f32).sqrt().recip(), *seed)?;
                Ok(buffer)
            }
        }
    }

    fn linear<T: Float>(
        &mut self,
        gpu: &Gpu,
        name: &str,
        (outputs, inputs): (usize, usize),
    ) -> Result<Linear<T>, DeviceError> {
        Ok(Linear {
            weight: self.values(gpu, &format!("{name}.weight"), (outputs, inputs))?,
            bias: match self {
                Self::Host(_) => self.values(gpu, &format!("{name}.bias"), (outputs, 1))?,
                Self::Random(_) => gpu.zeros(outputs)?,
            },
        })
    }

    fn norm<T: Float>(&mut self, gpu: &Gpu, name: &str, width: usize) -> Result<Buffer<T>, DeviceError> {
        match self {
            Self::Host(_) => self.values(gpu, name, (width, 1)),
            Self::Random(_) => Ok(gpu.upload(&vec![T::from_f32(1.0); width])?),
        }
    }
}

impl<T: Float> QwenTower<T> {
    /// That of a source; None if the model has another one.
    pub fn load(gpu: &Gpu, config: &Config, weights: &dyn TensorSource) -> Result<Option<Self>, DeviceError> {
        match &config.vision {
            Vision::Qwen25Vl(vision) => Self::build(gpu, QwenVision::from(vision), Origin::Host(weights)).map(Some),
            Vision::LlavaOneVision(_) => Ok(None),
        }
    }

    /// Random weights, for measuring.
    pub fn random(gpu: &Gpu, shape: QwenVision, seed: u64) -> Result<Self, DeviceError> {
        Self::build(gpu, shape, Origin::Random(seed))
    }

    fn build(gpu: &Gpu, shape: QwenVision, mut origin: Origin<'_>) -> Result<Self, DeviceError> {
        let (hidden, merged) = (shape.hidden, shape.merged());
        let half = frequencies(THETA, shape.head_dim() / 2);
        let patches = (hidden, shape.patch_values());
        let axes = [vec![0u8; half.len()], vec![1u8; half.len()]].concat();
        Ok(Self {
            patch_embed: origin.values(gpu, "visual.patch_embed.proj.weight", patches)?,
            blocks: (0..shape.depth)
                .map(|index| Block::build(gpu, &shape, index, &mut origin))
                .collect::<Result<_, _>>()?,
            merger_norm: origin.norm(gpu, "visual.merger.ln_q.weight", hidden)?,
            merger: [
                origin.linear(gpu, "visual.merger.mlp.0", (merged, merged))?,
                origin.linear(gpu, "visual.merger.mlp.2", (shape.output, merged))?,
            ],
            frequencies: gpu.upload(&[half.clone(), half].concat())?,
            axis_of: gpu.upload(&axes)?,
            gpu: gpu.clone(),
            shape,
        })
    }

    /// Every buffer with its name: what an optimiser updates. They are the tower's own: what is written to them it computes with.
    pub fn named(&self) -> Vec<(String, Buffer<T>)> {
        let mut named = vec![("visual.patch_embed".to_owned(), self.patch_embed.clone())];
        for (index, block) in self.blocks.iter().enumerate() {
            let parts = [
                ("norm1", &block.norm1),
                ("qkv", &block.qkv.weight),
                ("qkv_bias", &block.qkv.bias),
                ("proj", &block.proj.weight),
                ("proj_bias", &block.proj.bias),
                ("norm2", &block.norm2),
                ("gate_up", &block.gate_up.weight),
                ("gate_up_bias", &block.gate_up.bias),
                ("down", &block.down.weight),
                ("down_bias", &block.down.bias),
            ];
            named.extend(parts.map(|(name, buffer)| (format!("visual.blocks.{index}.{name}"), buffer.clone())));
        }
        let [first, second] = &self.merger;
        let merger = [
            ("norm", &self.merger_norm),
            ("first", &first.weight),
            ("first_bias", &first.bias),
            ("second", &second.weight),
            ("second_bias", &second.bias),
        ];
        named.extend(merger.map(|(name, buffer)| (format!("visual.merger.{name}"), buffer.clone())));
        named
    }

    /// The inverse of [`Self::load`]: sets the variables of a model of the host, from which a checkpoint is written. The
    /// zeros that fill up the gated MLP are left out.
    pub fn store(&self, gpu: &Gpu, weights: &Weights) -> Result<(), DeviceError> {
        for stored in self.stored()? {
            let values = without_padding(&gpu.download(&stored.buffer)?, stored.columns, stored.stride);
            let variable = weights.get(&stored.name);
            let variable = variable.ok_or_else(|| DeviceError::Missing(stored.name.clone()))?;
            if variable.elem_count() != values.len() {
                return Err(DeviceError::Input(format!(
                    "{} has {} numbers on the host and {} on the card",
                    stored.name,
                    variable.elem_count(),
                    values.len()
                )));
            }
            assign(variable, &values)?;
        }
        Ok(())
    }

    /// Where each tensor of the host is.
    fn stored(&self) -> Result<Vec<Stored<T>>, DeviceError> {
        let (hidden, inner, padded) = (self.shape.hidden, self.shape.intermediate, self.shape.padded());
        let mut stored = vec![Stored::whole("visual.patch_embed.proj.weight", &self.patch_embed)];
        for (index, block) in self.blocks.iter().enumerate() {
            let at = format!("visual.blocks.{index}");
            stored.extend([
                Stored::whole(format!("{at}.norm1.weight"), &block.norm1),
                Stored::whole(format!("{at}.norm2.weight"), &block.norm2),
                Stored {
                    columns: inner,
                    stride: padded,
                    ..Stored::whole(format!("{at}.mlp.down_proj.weight"), &block.down.weight)
                },
                Stored::whole(format!("{at}.mlp.down_proj.bias"), &block.down.bias),
            ]);
            stored.extend(Stored::linear(&format!("{at}.attn.qkv"), &block.qkv));
            stored.extend(Stored::linear(&format!("{at}.attn.proj"), &block.proj));
            for (half, name) in ["gate_proj", "up_proj"].into_iter().enumerate() {
                let first = half * padded;
                let rows = block.gate_up.weight.slice(first * hidden..(first + inner) * hidden)?;
                let bias = block.gate_up.bias.slice(first..first + inner)?;
                stored.push(Stored::whole(format!("{at}.mlp.{name}.weight"), &rows));
                stored.push(Stored::whole(format!("{at}.mlp.{name}.bias"), &bias));
            }
        }
        stored.push(Stored::whole("visual.merger.ln_q.weight", &self.merger_norm));
        stored.extend(Stored::linear("visual.merger.mlp.0", &self.merger[0]));
        stored.extend(Stored::linear("visual.merger.mlp.2", &self.merger[1]));
        Ok(stored)
    }
}

/// A tensor of the host in a buffer of the card: rows of `columns` numbers, `stride` apart.
struct Stored<T> {
    name: String,
    buffer: Buffer<T>,
    columns: usize,
    stride: usize,
}

impl<T: Float> Stored<T> {
    fn whole(name: impl Into<String>, buffer: &Buffer<T>) -> Self {
        Self {
            name: name.into(),
            buffer: buffer.clone(),
            columns: 1,
            stride: 1,
        }
    }

    fn linear(name: &str, layer: &Linear<T>) -> [Self; 2] {
        [
            Self::whole(format!("{name}.weight"), &layer.weight),
            Self::whole(format!("{name}.bias"), &layer.bias),
        ]
    }
}

/// The first `columns` of every `stride` numbers.
fn without_padding<T: Copy>(values: &[T], columns: usize, stride: usize) -> Vec<T> {
    let rows = values.chunks_exact(stride);
    rows.flat_map(|row| row[..columns].iter().copied()).collect()
}

/// Rows of `columns` numbers with zeros behind each, `stride` apart: the inverse of [`without_padding`].
fn with_padding<T: Copy + Default>(values: &[T], columns: usize, stride: usize) -> Vec<T> {
    let rows = values.chunks_exact(columns);
    rows.flat_map(|row| {
        let padding = std::iter::repeat_n(T::default(), stride - columns);
        row.iter().copied().chain(padding)
    })
    .collect()
}

impl<T: Float> Block<T> {
    fn build(gpu: &Gpu, shape: &QwenVision, index: usize, origin: &mut Origin<'_>) -> Result<Self, DeviceError> {
        let at = format!("visual.blocks.{index}");
        let (hidden, inner, padded) = (shape.hidden, shape.intermediate, shape.padded());
        let mut linear = |name: &str, outputs: usize, inputs: usize| {
            origin.linear::<T>(gpu, &format!("{at}.{name}"), (outputs, inputs))
        };
        let qkv = linear("attn.qkv", 3 * hidden, hidden)?;
        let proj = linear("attn.proj", hidden, hidden)?;
        let (gate, up) = (
            linear("mlp.gate_proj", inner, hidden)?,
            linear("mlp.up_proj", inner, hidden)?,
        );
        let down = linear("mlp.down_proj", hidden, inner)?;
        let gate_up = Linear {
            weight: gpu.zeros(2 * padded * hidden)?,
            bias: gpu.zeros(2 * padded)?,
        };
        for (half, part) in [gate, up].iter().enumerate() {
            let first = half * padded;
            let rows = gate_up.weight.slice(first * hidden..(first + inner) * hidden)?;
            gpu.copy(&part.weight, &rows)?;
            gpu.copy(&part.bias, &gate_up.bias.slice(first..first + inner)?)?;
        }
        let wide = with_padding(&gpu.download(&down.weight)?, inner, padded);
        Ok(Self {
            norm1: origin.norm(gpu, &format!("{at}.norm1.weight"), hidden)?,
            norm2: origin.norm(gpu, &format!("{at}.norm2.weight"), hidden)?,
            down: Linear {
                weight: gpu.upload(&wide)?,
                bias: down.bias,
            },
            qkv,
            proj,
            gate_up,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_padded_comes_back() {
        let values = (1..=6).collect::<Vec<_>>();
        let wide = with_padding(&values, 3, 5);
        assert_eq!(wide, [1, 2, 3, 0, 0, 4, 5, 6, 0, 0]);
        assert_eq!(without_padding(&wide, 3, 5), values);
        assert_eq!(without_padding(&values, 1, 1), values);
    }
}
