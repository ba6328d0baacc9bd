//! The runner of a model that several GPUs share: this process leads, the others follow.

use flotilla_engine::Limits;
use flotilla_kernels::{Float, Gpu};
use flotilla_model::{Config, weights::TensorSource};

use super::{DeviceRunner, capacity};
use crate::{
    arena::Capacity,
    error::DeviceError,
    parallel::{Collective, Nccl, Shard},
    readers,
    shape::TextShape,
    text::TextModel,
    tower::Vision,
    weights::TextWeights,
};

impl<T: Float> DeviceRunner<T> {
    /// As [`Self::read`], by rank 0 of a group of GPUs, which share the language model. The others must be in
    /// [`follow`], with the same model and limits; it returns once all of them have their parts.
    pub fn load_in_group(
        gpu: &Gpu,
        config: &Config,
        source: &dyn TensorSource,
        limits: &Limits,
        max_tokens: usize,
        nccl: Nccl,
    ) -> Result<Self, DeviceError> {
        let (vision, text) = readers::beside(
            || Vision::read(gpu, config, source),
            || part(gpu, config, source, capacity(limits, max_tokens), nccl),
        );
        let mut text = text?;
        if let (Err(error), Some(nccl)) = (&vision, text.group()) {
            nccl.control().give_up(&error.to_string());
        }
        let vision = vision?;
        text.lead();
        let least_free = meet(&mut text)?;
        let mut runner = Self::assemble(text, vision, limits)?;
        runner.least_free = least_free;
        Ok(runner)
    }

    /// Why the group of GPUs that shares the model computes nothing any more, if that is so.
    pub fn broken(&mut self) -> Option<String> {
        let nccl = self.text.group()?;
        nccl.control().broken().map(str::to_owned)
    }
}

/// This rank's part of the language model.
fn part<T: Float>(
    gpu: &Gpu,
    config: &Config,
    source: &dyn TensorSource,
    capacity: Capacity,
    mut nccl: Nccl,
) -> Result<TextModel<T>, DeviceError> {
    let shard = Shard::new(&TextShape::from(&config.text), nccl.rank(), nccl.size())?;
    let weights = TextWeights::load_part(gpu, &config.text, source, &shard);
    if let Err(error) = &weights {
        // The others hear why, and not only that this one is gone.
        nccl.control().give_up(&error.to_string());
    }
    Ok(TextModel::in_group(gpu, weights?, capacity, shard, nccl)?)
}

/// Waits until every rank has loaded, and gives the bytes that are free on the fullest GPU.
fn meet<T: Float>(text: &mut TextModel<T>) -> Result<usize, DeviceError> {
    let (free, _) = text.gpu().memory()?;
    let Some(nccl) = text.group() else { return Ok(free) };
    let least = nccl.control().least(free as u64)?;
    Ok(usize::try_from(least).unwrap_or(usize::MAX))
}

/// What every rank but 0 does: holds its part of the language model and repeats the steps of the
/// [leader](DeviceRunner::load_in_group), until that ends.
pub fn follow<T: Float>(
    gpu: &Gpu,
    config: &Config,
    source: &dyn TensorSource,
    limits: &Limits,
    max_tokens: usize,
    nccl: Nccl,
) -> Result<(), DeviceError> {
    let mut text = part::<T>(gpu, config, source, capacity(limits, max_tokens), nccl)?;
    meet(&mut text)?;
    Ok(text.follow()?)
}

/// The others of a group learn that nothing more comes.
impl<T> Drop for DeviceRunner<T> {
    fn drop(&mut self) {
        let _ = self.text.end();
    }
}
