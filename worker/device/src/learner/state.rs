//! What outlives a learner: moments as bytes, and weights back to the host.

use flotilla_kernels::{
    Buffer, Element, Float, Gpu,
    optimizer::{Pace, States},
};
use flotilla_model::{text::TextConfig, weights::Weights};

use super::Learner;
use crate::{
    error::DeviceError,
    weights::{TextWeights, assign, joined, values},
};

/// Name of the number of updates that a tower took part in.
const VISION_UPDATES: &str = "visual.updates";

fn wrong_length(name: &str, found: usize, wanted: usize) -> DeviceError {
    DeviceError::Input(format!("{name} has {found} bytes, {wanted} are needed"))
}

/// Parts of a weight's moments with their names, as bytes on the card.
fn parts(states: &States) -> Result<Vec<(&'static str, Buffer<u8>)>, DeviceError> {
    fn bytes<E: Element>(name: &'static str, buffer: &Buffer<E>) -> Result<(&'static str, Buffer<u8>), DeviceError> {
        Ok((name, buffer.cast()?))
    }
    match states {
        States::F32 { m, v } => Ok(vec![bytes("m", m)?, bytes("v", v)?]),
        States::Bf16 { m, v } => Ok(vec![bytes("m", m)?, bytes("v", v)?]),
        States::Bit8 { m, v, units } => Ok(vec![bytes("m", m)?, bytes("v", v)?, bytes("units", units)?]),
    }
}

impl<T: Float, G: Float> Learner<T, G> {
    /// Gives the moments of every weight to `put`, by a name such as `layers.3.qkv.m` or `visual.blocks.3.qkv.m`, one after
    /// another: all of a 7B model are tens of GB. Returns the number of updates that were applied; where a tower is trained,
    /// `visual.updates` are those that it took part in.
    pub fn save(&self, mut put: impl FnMut(&str, Vec<u8>) -> Result<(), DeviceError>) -> Result<u32, DeviceError> {
        let (states, updates) = self.states()?;
        for (name, states) in states {
            for (part, buffer) in parts(states)? {
                put(&format!("{name}.{part}"), self.gpu().download(&buffer)?)?;
            }
        }
        if let Some(updates) = self.vision_updates()? {
            put(VISION_UPDATES, updates.to_le_bytes().to_vec())?;
        }
        Ok(updates)
    }

    /// Goes on from what [`Self::save`] gave, with the weights of that time: the updates that follow are those that would have
    /// followed then, bit by bit.
    pub fn restore(
        &mut self,
        updates: u32,
        mut get: impl FnMut(&str) -> Result<Vec<u8>, DeviceError>,
    ) -> Result<(), DeviceError> {
        let (states, _) = self.states()?;
        for (name, states) in states {
            for (part, buffer) in parts(states)? {
                let name = format!("{name}.{part}");
                let bytes = get(&name)?;
                if bytes.len() != buffer.len() {
                    return Err(wrong_length(&name, bytes.len(), buffer.len()));
                }
                self.gpu().write(&buffer, &bytes)?;
            }
        }
        let of_vision = match self.tower() {
            Some(_) => {
                let bytes = get(VISION_UPDATES)?;
                let length = bytes.len();
                let bytes = <[u8; 4]>::try_from(bytes);
                let bytes = bytes.map_err(|_| wrong_length(VISION_UPDATES, length, 4))?;
                Some(Pace::new(self.gpu(), u32::from_le_bytes(bytes))?)
            }
            None => None,
        };
        let pace = Pace::new(self.gpu(), updates)?;
        self.resume(pace, of_vision);
        Ok(())
    }
}

/// Names of the host's tensors of which each of [`TextWeights::named`] is made, in its order.
fn sources(config: &TextConfig) -> Vec<Vec<String>> {
    let model = config.names.model;
    let mut sources = vec![vec![format!("{model}embed_tokens.weight")]];
    for index in 0..config.num_hidden_layers {
        let at = format!("{model}layers.{index}");
        let attention = |kind: &str| {
            ["q", "k", "v"]
                .map(|name| format!("{at}.self_attn.{name}_proj.{kind}"))
                .to_vec()
        };
        sources.extend([
            vec![format!("{at}.input_layernorm.weight")],
            attention("weight"),
            attention("bias"),
            vec![format!("{at}.self_attn.o_proj.weight")],
            vec![format!("{at}.post_attention_layernorm.weight")],
            ["gate", "up"]
                .map(|name| format!("{at}.mlp.{name}_proj.weight"))
                .to_vec(),
            vec![format!("{at}.mlp.down_proj.weight")],
        ]);
    }
    sources.push(vec![format!("{model}norm.weight")]);
    if !config.tie_word_embeddings {
        sources.push(vec![config.head_name()]);
    }
    sources
}

impl<T: Float> TextWeights<T> {
    /// Overwrites them by those of a model of the host: whoever shares the buffers sees the new values.
    pub fn assign(&self, gpu: &Gpu, config: &TextConfig, weights: &Weights) -> Result<(), DeviceError> {
        for ((name, buffer), names) in self.named().into_iter().zip(sources(config)) {
            let parts = names.iter().map(|name| values::<T>(weights, name));
            let whole = joined(parts.collect::<Result<Vec<_>, _>>()?);
            if whole.len() != buffer.len() {
                let (given, wanted) = (whole.len(), buffer.len());
                return Err(DeviceError::Input(format!(
                    "{given} numbers for {name}, which has {wanted}"
                )));
            }
            gpu.write(&buffer, &whole)?;
        }
        Ok(())
    }

    /// The inverse of [`Self::load`]: sets the variables of a model of the host, from which a checkpoint is written.
    pub fn store(&self, gpu: &Gpu, config: &TextConfig, weights: &Weights) -> Result<(), DeviceError> {
        for ((_, buffer), names) in self.named().into_iter().zip(sources(config)) {
            let values = gpu.download(&buffer)?;
            let mut rest = values.as_slice();
            for name in names {
                let variable = weights.get(&name).ok_or_else(|| DeviceError::Missing(name.clone()))?;
                let Some((own, others)) = rest.split_at_checked(variable.elem_count()) else {
                    return Err(DeviceError::Input(format!(
                        "{name} is larger on the host than on the card"
                    )));
                };
                rest = others;
                assign(variable, own)?;
            }
        }
        Ok(())
    }
}
