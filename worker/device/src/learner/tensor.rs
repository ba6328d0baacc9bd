//! One weight with what its update needs.

use flotilla_kernels::{
    Buffer, Float, Gpu, GpuError,
    optimizer::{self, AdamW, GradientNorm, Pace, StateKind, States},
};

use super::gradients::Gradient;

/// A weight, the sum of its gradients, its moments.
#[derive(Debug)]
pub(super) struct Tensor<T, G> {
    pub name: String,
    pub weight: Buffer<T>,
    pub gradient: Gradient<G>,
    pub states: States,
}

impl<T: Float, G: Float> Tensor<T, G> {
    /// With moments of zero.
    pub fn new(
        gpu: &Gpu,
        kind: StateKind,
        name: String,
        weight: Buffer<T>,
        gradient: Gradient<G>,
    ) -> Result<Self, GpuError> {
        Ok(Self {
            states: States::zeros(gpu, kind, weight.len())?,
            name,
            weight,
            gradient,
        })
    }

    /// Adds the squares of the gradient to a norm.
    pub fn measure(&self, gpu: &Gpu, norm: &mut GradientNorm) -> Result<(), GpuError> {
        match &self.gradient {
            Gradient::Matrix(gradient) => norm.add(gpu, gradient),
            Gradient::Vector(gradient) => norm.add(gpu, gradient),
        }
    }

    /// Zeros in the place of the gradient.
    #[cfg(feature = "nccl")]
    pub fn clear(&self, gpu: &Gpu) -> Result<(), GpuError> {
        match &self.gradient {
            Gradient::Matrix(gradient) => gpu.clear(gradient),
            Gradient::Vector(gradient) => gpu.clear(gradient),
        }
    }

    /// One update, with the number of the tensor among all that round.
    pub fn update(
        &self,
        gpu: &Gpu,
        adamw: &AdamW,
        number: u32,
        clip: &Buffer<f32>,
        pace: &Pace,
    ) -> Result<(), GpuError> {
        match &self.gradient {
            Gradient::Matrix(gradient) => self.update_by(gpu, adamw, gradient, number, (clip, pace)),
            Gradient::Vector(gradient) => self.update_by(gpu, adamw, gradient, number, (clip, pace)),
        }
    }

    fn update_by<D: Float>(
        &self,
        gpu: &Gpu,
        adamw: &AdamW,
        gradients: &Buffer<D>,
        number: u32,
        (clip, pace): (&Buffer<f32>, &Pace),
    ) -> Result<(), GpuError> {
        let update = optimizer::Update {
            parameters: &self.weight,
            gradients,
            states: &self.states,
            tensor: number,
            clip: Some(clip),
            pace: Some(pace),
            zero_gradients: false,
        };
        optimizer::adamw(gpu, adamw, &update)
    }
}
