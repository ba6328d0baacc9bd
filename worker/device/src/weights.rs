//! Packed weights on the card: one copy, which the engine reads and the learner updates in place.

use candle_core::{DType, Tensor, Var};
use flotilla_kernels::{Buffer, Float, Gpu, GpuError, rows};
use flotilla_model::{
    text::TextConfig,
    weights::{Portion, TensorSource},
};
use half::bf16;

use crate::{
    error::DeviceError,
    parallel::{Shard, reference::HostModel},
    readers,
    shape::TextShape,
};

/// One layer. Matrices are `[outputs, inputs]`.
#[derive(Clone, Debug)]
pub struct Layer<T> {
    /// `[hidden]`.
    pub input_norm: Buffer<T>,
    /// `[(heads + 2 * kv_heads) * head_dim, hidden]`: rows of queries, keys, values.
    pub qkv: Buffer<T>,
    /// `[(heads + 2 * kv_heads) * head_dim]`.
    pub qkv_bias: Buffer<T>,
    /// `[hidden, heads * head_dim]`.
    pub output: Buffer<T>,
    /// `[hidden]`.
    pub post_norm: Buffer<T>,
    /// `[2 * intermediate, hidden]`: rows of the gate, then of the other half.
    pub gate_up: Buffer<T>,
    /// `[hidden, intermediate]`.
    pub down: Buffer<T>,
}

/// A language model.
#[derive(Clone, Debug)]
pub struct TextWeights<T> {
    /// Sizes.
    pub shape: TextShape,
    /// `[vocabulary, hidden]`.
    pub embedding: Buffer<T>,
    /// Layers in order.
    pub layers: Vec<Layer<T>>,
    /// `[hidden]`.
    pub norm: Buffer<T>,
    /// `[vocabulary, hidden]`; the embedding table itself where it is tied.
    pub head: Buffer<T>,
}

impl<T: Float> TextWeights<T> {
    /// Random weights of the deviations that checkpoints begin with, drawn on the card: for measuring.
    pub fn random(gpu: &Gpu, shape: &TextShape, seed: u64) -> Result<Self, GpuError> {
        let mut seed = seed;
        let mut draw = |rows: usize, inputs: usize| {
            seed += 1;
            let buffer = gpu.alloc(rows * inputs)?;
            rows::fill_normal(gpu, &buffer, (inputs as f32).sqrt().recip(), seed)?;
            Ok::<_, GpuError>(buffer)
        };
        let ones = |width: usize| gpu.upload(&vec![T::from_f32(1.0); width]);
        let (hidden, packed) = (shape.hidden, shape.packed_width());
        let embedding = draw(shape.vocabulary, hidden)?;
        let head = if shape.tied {
            embedding.clone()
        } else {
            draw(shape.vocabulary, hidden)?
        };
        let layers = (0..shape.layers).map(|_| {
            Ok(Layer {
                input_norm: ones(hidden)?,
                qkv: draw(packed, hidden)?,
                qkv_bias: gpu.zeros(packed)?,
                output: draw(hidden, shape.query_width())?,
                post_norm: ones(hidden)?,
                gate_up: draw(2 * shape.intermediate, hidden)?,
                down: draw(hidden, shape.intermediate)?,
            })
        });
        Ok(Self {
            layers: layers.collect::<Result<_, GpuError>>()?,
            embedding,
            norm: ones(hidden)?,
            head,
            shape: shape.clone(),
        })
    }

    /// Those of a source, packed.
    pub fn load(gpu: &Gpu, config: &TextConfig, source: &dyn TensorSource) -> Result<Self, DeviceError> {
        let whole = Shard::new(&TextShape::from(config), 0, 1)?;
        Self::load_part(gpu, config, source, &whole)
    }

    /// One rank's part of them. No more of the source is read than that, and no more than one packed matrix of the part by each
    /// of eight threads is in the host's memory at once.
    pub fn load_part(
        gpu: &Gpu,
        config: &TextConfig,
        source: &dyn TensorSource,
        shard: &Shard,
    ) -> Result<Self, DeviceError> {
        let shape = shard.local();
        let pack = |portions: &[(String, Portion)]| -> Result<Buffer<T>, DeviceError> {
            let mut packed = Vec::new();
            for (name, portion) in portions {
                let mut values = portion_values(source, name, portion)?;
                match packed.is_empty() {
                    true => packed = values,
                    false => packed.append(&mut values),
                }
            }
            Ok(gpu.upload(&packed)?)
        };
        let model = config.names.model;
        let norm = |name: String| pack(&[(name, Portion::Whole)]);
        let table = |name: String| pack(&[(name, Portion::Rows(shard.tokens()))]);
        let embedding = table(format!("{model}embed_tokens.weight"))?;
        let head = if shape.tied {
            embedding.clone()
        } else {
            table(config.head_name())?
        };
        let inner = Portion::Rows(shard.down_columns());
        let layers = readers::in_order(shape.layers, |index| {
            let at = format!("{model}layers.{index}");
            let attention = |kind: &str| {
                [
                    ("q", shard.query_rows()),
                    ("k", shard.key_rows()),
                    ("v", shard.key_rows()),
                ]
                .map(|(name, rows)| (format!("{at}.self_attn.{name}_proj.{kind}"), Portion::Rows(rows)))
            };
            let gate_up = ["gate", "up"].map(|name| (format!("{at}.mlp.{name}_proj.weight"), inner.clone()));
            let output = format!("{at}.self_attn.o_proj.weight");
            let down = format!("{at}.mlp.down_proj.weight");
            Ok::<_, DeviceError>(Layer {
                input_norm: norm(format!("{at}.input_layernorm.weight"))?,
                qkv: pack(&attention("weight"))?,
                qkv_bias: pack(&attention("bias"))?,
                output: pack(&[(output, Portion::Columns(shard.output_columns()))])?,
                post_norm: norm(format!("{at}.post_attention_layernorm.weight"))?,
                gate_up: pack(&gate_up)?,
                down: pack(&[(down, Portion::Columns(shard.down_columns()))])?,
            })
        })?;
        Ok(Self {
            layers,
            embedding,
            norm: norm(format!("{model}norm.weight"))?,
            head,
            shape,
        })
    }

    /// Those of a reference, rounded.
    pub fn of_host(gpu: &Gpu, model: &HostModel) -> Result<Self, GpuError> {
        let put = |values: &[f32]| gpu.upload(&values.iter().map(|value| T::from_f32(*value)).collect::<Vec<_>>());
        let layers = model.layers.iter().map(|layer| {
            Ok(Layer {
                input_norm: put(&layer.input_norm)?,
                qkv: put(&layer.qkv)?,
                qkv_bias: put(&layer.qkv_bias)?,
                output: put(&layer.output)?,
                post_norm: put(&layer.post_norm)?,
                gate_up: put(&layer.gate_up)?,
                down: put(&layer.down)?,
            })
        });
        Ok(Self {
            shape: model.shape.clone(),
            layers: layers.collect::<Result<_, GpuError>>()?,
            embedding: put(&model.embedding)?,
            norm: put(&model.norm)?,
            head: put(&model.head)?,
        })
    }

    /// Every buffer with its name: what an optimiser updates and a checkpoint holds. A tied head is not named twice.
    pub fn named(&self) -> Vec<(String, Buffer<T>)> {
        let mut named = vec![("embedding".to_owned(), self.embedding.clone())];
        for (index, layer) in self.layers.iter().enumerate() {
            let parts = [
                ("input_norm", &layer.input_norm),
                ("qkv", &layer.qkv),
                ("qkv_bias", &layer.qkv_bias),
                ("output", &layer.output),
                ("post_norm", &layer.post_norm),
                ("gate_up", &layer.gate_up),
                ("down", &layer.down),
            ];
            named.extend(parts.map(|(name, buffer)| (format!("layers.{index}.{name}"), buffer.clone())));
        }
        named.push(("norm".to_owned(), self.norm.clone()));
        if !self.shape.tied {
            named.push(("head".to_owned(), self.head.clone()));
        }
        named
    }
}

/// Parts behind one another; a single one is not copied.
pub(crate) fn joined<T: Float>(mut parts: Vec<Vec<T>>) -> Vec<T> {
    match parts.len() {
        1 => parts.remove(0),
        _ => parts.concat(),
    }
}

/// Values of a tensor of a source, rounded to `T`.
pub(crate) fn values<T: Float>(source: &dyn TensorSource, name: &str) -> Result<Vec<T>, DeviceError> {
    portion_values(source, name, &Portion::Whole)
}

/// Values of a portion of it, row by row.
fn portion_values<T: Float>(source: &dyn TensorSource, name: &str, portion: &Portion) -> Result<Vec<T>, DeviceError> {
    let tensor = source.tensor(name, portion)?;
    let flat = tensor
        .ok_or_else(|| DeviceError::Missing(name.to_owned()))?
        .flatten_all()?;
    // Without a detour over f32, a vector of the card's own format is not copied again.
    if flat.dtype() == DType::BF16 {
        return Ok(flat.to_vec1::<bf16>()?.into_iter().map(T::from_bf16).collect());
    }
    let values = flat.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    Ok(values.into_iter().map(T::from_f32).collect())
}

/// Sets a variable of the host: the inverse of [`values`].
pub(crate) fn assign<T: Float>(variable: &Var, values: &[T]) -> Result<(), DeviceError> {
    let (shape, device) = (variable.shape(), variable.device());
    if variable.dtype() == DType::BF16 {
        let values = values.iter().map(|value| value.to_bf16()).collect::<Vec<_>>();
        return Ok(variable.set(&Tensor::from_vec(values, shape, device)?)?);
    }
    let values = values.iter().map(|value| value.to_f32()).collect::<Vec<_>>();
    let values = Tensor::from_vec(values, shape, device)?;
    Ok(variable.set(&values.to_dtype(variable.dtype())?)?)
}
