//! Data parallelism: several GPUs with the same weights, each with its part of the micro-batches.

use flotilla_kernels::{Float, gpu::nccl::Communicator};

use super::{Gradient, Learner};
use crate::error::DeviceError;

impl<T: Float, G: Float> Learner<T, G> {
    /// Replaces summed gradients by their sums over all members of a group, between the last [`Self::backward`] and
    /// [`Self::update`]; a member without a micro-batch, or without a picture where others have one, gives zeros. Weights of tokens
    /// in the loss are those of the whole batch, so that sums need no division. All members get the same bits, and with equal weights,
    /// moments and seeds they stay equal: weights are never exchanged. Where no member has a picture, the tower is left as it is.
    pub fn reduce(&mut self, group: &Communicator) -> Result<(), DeviceError> {
        let pictures = self.pictures_of_all(group)?;
        self.clear_unless_summed(pictures)?;
        for tensor in self.summed() {
            match &tensor.gradient {
                Gradient::Matrix(gradient) => group.all_reduce_sum(gradient)?,
                Gradient::Vector(gradient) => group.all_reduce_sum(gradient)?,
            }
        }
        Ok(())
    }

    /// Whether any member has gradients of the tower. Waits for the card where a tower is trained.
    fn pictures_of_all(&self, group: &Communicator) -> Result<bool, DeviceError> {
        let Some(vision) = &self.vision else { return Ok(false) };
        let members = self.gpu().upload(&[f32::from(u8::from(vision.summed))])?;
        group.all_reduce_sum(&members)?;
        Ok(self.gpu().download(&members)?.iter().any(|members| *members > 0.0))
    }
}
