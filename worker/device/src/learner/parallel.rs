//! Data parallelism: several GPUs with the same weights, each with its part of the micro-batches.

use flotilla_kernels::{Float, gpu::nccl::Communicator};

use super::{Gradient, Learner};
use crate::error::DeviceError;

impl<T: Float, G: Float> Learner<T, G> {
    /// Replaces summed gradients by their sums over all members of a group, between the last [`Self::backward`] and
    /// [`Self::update`]; a member without a micro-batch gives zeros. Weights of tokens in the loss are those of the whole batch,
    /// so that sums need no division. All members get the same bits, and with equal weights, moments and seeds they stay equal:
    /// weights are never exchanged.
    pub fn reduce(&mut self, group: &Communicator) -> Result<(), DeviceError> {
        self.clear_unless_summed()?;
        for (_, gradient) in self.gradients() {
            match gradient {
                Gradient::Matrix(gradient) => group.all_reduce_sum(gradient)?,
                Gradient::Vector(gradient) => group.all_reduce_sum(gradient)?,
            }
        }
        Ok(())
    }
}
