//! The pieces that towers are made of, taken from the weights.

use candle_core::Tensor;

use crate::{
    ModelError, Result,
    lora::{Factors, Lora},
    ops::Kernels,
    weights::Weights,
};

/// The weights as tensors of one pass: recorded where `trainable` says so.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) weights: &'a Weights,
    pub(crate) adapter: Option<&'a Lora>,
    pub(crate) trainable: &'a dyn Fn(&str) -> bool,
}

impl Source<'_> {
    /// The parameter of that name.
    pub(crate) fn get(&self, name: &str) -> Result<Tensor> {
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

    /// The linear map `name.weight`, `name.bias`, with what an adapter adds to it.
    pub(crate) fn linear(&self, name: &str, bias: bool) -> Result<Linear> {
        Ok(Linear {
            weight: self.get(&format!("{name}.weight"))?,
            bias: bias.then(|| self.get(&format!("{name}.bias"))).transpose()?,
            adapter: self.adapter.and_then(|adapter| adapter.factors(name, self.trainable)),
        })
    }

    /// The layer normalization `name.weight`, `name.bias`.
    pub(crate) fn layer_norm(&self, name: &str, eps: f64) -> Result<LayerNorm> {
        Ok(LayerNorm {
            weight: self.get(&format!("{name}.weight"))?,
            bias: self.get(&format!("{name}.bias"))?,
            eps,
        })
    }
}

/// `x weight^T + bias`, and what an adapter adds.
#[derive(Clone, Debug)]
pub(crate) struct Linear {
    pub(crate) weight: Tensor,
    bias: Option<Tensor>,
    adapter: Option<Factors>,
}

impl Linear {
    /// `[rows, in]` to `[rows, out]`.
    pub(crate) fn forward(&self, x: &Tensor, kernels: Kernels) -> Result<Tensor> {
        let y = kernels.linear(x, &self.weight, self.bias.as_ref())?;
        match &self.adapter {
            Some(adapter) => Ok((y + adapter.forward(x, kernels)?)?),
            None => Ok(y),
        }
    }

    /// A convolution whose windows do not overlap as a map of flattened windows.
    pub(crate) fn flattened(&self) -> Result<Self> {
        Ok(Self {
            weight: self.weight.flatten_from(1)?,
            ..self.clone()
        })
    }

    /// Several maps of one input side by side: `[rows, in]` to `[rows, sum of out]`.
    pub(crate) fn forward_side_by_side<const N: usize>(
        maps: &[Self; N],
        x: &Tensor,
        kernels: Kernels,
    ) -> Result<Tensor> {
        let plain = maps.iter().all(|map| map.adapter.is_none());
        let biases = maps.iter().filter_map(|map| map.bias.as_ref()).collect::<Vec<_>>();
        // Join whichever is smaller: the weights once, or the results of a few rows.
        if plain && x.dim(0)? >= x.dim(1)? && (biases.is_empty() || biases.len() == N) {
            let weight = Tensor::cat(&maps.each_ref().map(|map| &map.weight), 0)?;
            let bias = (!biases.is_empty()).then(|| Tensor::cat(&biases, 0)).transpose()?;
            return kernels.linear(x, &weight, bias.as_ref());
        }
        let parts = maps.iter().map(|map| map.forward(x, kernels));
        Ok(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 1)?)
    }
}

/// Layer normalization of each row.
#[derive(Clone, Debug)]
pub(crate) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// `[rows, width]` to the same.
    pub(crate) fn forward(&self, x: &Tensor, kernels: Kernels) -> Result<Tensor> {
        kernels.layer_norm(x, &self.weight, &self.bias, self.eps)
    }
}
