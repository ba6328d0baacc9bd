//! The vision tower of either family on the card.

use flotilla_kernels::{Buffer, Float, Gpu};
use flotilla_model::{Config, Visual, Vlm, weights::TensorSource};

use crate::{error::DeviceError, siglip::SiglipTower, vision::QwenTower};

/// What encodes pictures.
#[derive(Debug)]
pub enum Vision<T> {
    /// Of Qwen2.5-VL.
    Qwen(Box<QwenTower<T>>),
    /// Of LLaVA-OneVision.
    Siglip(Box<SiglipTower<T>>),
    /// Nothing: text alone, and features that a prompt brings.
    None,
}

impl<T: Float> Vision<T> {
    /// The tower that a learner can train.
    pub fn trainable(&self) -> Option<&QwenTower<T>> {
        match self {
            Self::Qwen(tower) => Some(tower),
            Self::Siglip(_) | Self::None => None,
        }
    }

    /// The tower of a model of the host, on the card.
    pub fn load(gpu: &Gpu, model: &Vlm) -> Result<Self, DeviceError> {
        Self::read(gpu, model.config(), model.weights())
    }

    /// The tower of a configuration, its weights from a source.
    pub fn read(gpu: &Gpu, config: &Config, source: &dyn TensorSource) -> Result<Self, DeviceError> {
        if let Some(tower) = QwenTower::load(gpu, config, source)? {
            return Ok(Self::Qwen(Box::new(tower)));
        }
        let tower = SiglipTower::load(gpu, config, source)?;
        Ok(tower.map_or(Self::None, |tower| Self::Siglip(Box::new(tower))))
    }

    /// Features `[tokens, hidden]` of visuals.
    pub fn encode(&self, visuals: &[&Visual]) -> Result<Vec<Buffer<T>>, DeviceError> {
        if visuals.is_empty() {
            return Ok(Vec::new());
        }
        match self {
            Self::Qwen(tower) => tower.encode(visuals),
            Self::Siglip(tower) => tower.encode(visuals),
            Self::None => Err(DeviceError::Input(
                "this model has no vision tower on the GPU".to_owned(),
            )),
        }
    }
}
