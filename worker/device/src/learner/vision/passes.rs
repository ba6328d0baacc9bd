//! The whole tower: from the gradients by the features of pictures to those of every weight.

use flotilla_kernels::{
    Buffer, Float, Gpu, GpuError,
    activation::{Gelu, bias_gradient, gelu, gelu_backward},
    norm::{RmsNormBackward, rms_norm, rms_norm_backward},
    optimizer::Pace,
    rows,
};
use flotilla_model::{Grid, Visual};

use super::{
    block::Pass,
    buffers::{Activations, Chunk},
    gradients::TowerGradients,
    plan,
};
use crate::{
    error::DeviceError,
    learner::{
        gradients::{Gradient, Sum},
        plan::Settings,
        products::Products,
    },
    vision::{self, Frames, Layout, QwenTower},
};

/// Trains a tower in place.
#[derive(Debug)]
pub(in crate::learner) struct TowerLearner<T, G> {
    tower: QwenTower<T>,
    gradients: TowerGradients<G>,
    activations: Activations<T>,
    /// The most patches of a chunk.
    patches: usize,
    /// Counts the updates that the tower took part in.
    pub pace: Pace,
    /// Whether gradients have been added since the last update.
    pub summed: bool,
}

impl<T: Float, G: Float> TowerLearner<T, G> {
    /// Allocates gradients and activations of the largest chunk.
    pub fn new(gpu: &Gpu, tower: QwenTower<T>, settings: &Settings) -> Result<Self, DeviceError> {
        Ok(Self {
            gradients: TowerGradients::new(gpu, &tower.shape)?,
            activations: Activations::new(gpu, &tower.shape, settings)?,
            patches: settings.patches,
            pace: Pace::new(gpu, 0)?,
            summed: false,
            tower,
        })
    }

    /// The tower.
    pub fn tower(&self) -> &QwenTower<T> {
        &self.tower
    }

    /// Every weight by name, with its gradient.
    pub fn weights(&self) -> impl Iterator<Item = (String, Buffer<T>, Gradient<G>)> {
        let named = self.tower.named().into_iter().zip(self.gradients.ordered());
        named.map(|((name, weight), gradient)| (name, weight, gradient))
    }

    /// How many weights there are.
    pub fn tensors(&self) -> usize {
        self.weights().count()
    }

    /// Adds the gradients of a loss whose gradients by the features of pictures are `slopes`, `[tokens, output]` each.
    pub fn backward(&mut self, gpu: &Gpu, visuals: &[&Visual], slopes: &[Buffer<f32>]) -> Result<(), DeviceError> {
        let grids = visuals.iter().map(|visual| vision::grid_of(visual));
        let grids = grids.collect::<Result<Vec<_>, _>>()?;
        let chunks = vision::chunks(&self.tower.shape, &grids, self.patches)?;
        self.fits(visuals, &grids, slopes)?;
        for frames in chunks {
            if !self.summed {
                self.gradients.begin(gpu)?;
            }
            let chunk = self.load(gpu, (visuals, &grids), slopes, &frames)?;
            self.pass(gpu, &chunk)?;
            self.summed = true;
        }
        Ok(())
    }

    /// Whether pictures have as many values, and slopes, as their grids say.
    fn fits(&self, visuals: &[&Visual], grids: &[Grid], slopes: &[Buffer<f32>]) -> Result<(), DeviceError> {
        let shape = &self.tower.shape;
        if slopes.len() != visuals.len() {
            let (slopes, visuals) = (slopes.len(), visuals.len());
            return Err(DeviceError::Input(format!(
                "gradients of {slopes} pictures for {visuals}"
            )));
        }
        for ((visual, grid), slopes) in visuals.iter().zip(grids).zip(slopes) {
            let values = grid.iter().product::<usize>() * shape.patch_values();
            let numbers = vision::tokens(shape, grid) * shape.output;
            if visual.values.len() != values || slopes.len() != numbers {
                return Err(DeviceError::Input(format!(
                    "{} values and {} gradients of patches {grid:?}, {values} and {numbers} are needed",
                    visual.values.len(),
                    slopes.len()
                )));
            }
        }
        Ok(())
    }

    /// Copies patches and gradients of frames to the card, in the order of their windows.
    fn load(
        &self,
        gpu: &Gpu,
        (visuals, grids): (&[&Visual], &[Grid]),
        slopes: &[Buffer<f32>],
        frames: &[Frames],
    ) -> Result<Chunk<T>, DeviceError> {
        let shape = &self.tower.shape;
        let own = frames.iter().map(|frames| frames.grid(grids)).collect::<Vec<_>>();
        let tokens = own.iter().map(|grid| vision::tokens(shape, grid)).sum();
        let layout = Layout::new(shape, &own, plan::filled(tokens));
        let chunk = self.activations.chunk(gpu, shape, &layout)?;
        let (values, rounded) = self.activations.patches(shape, tokens)?;
        let (mut patches, mut features) = (0, 0);
        for frames in frames {
            let visual = &visuals[frames.visual].values;
            let part = &visual[frames.part(grids, visual.len())];
            gpu.write(&values.slice(patches..patches + part.len())?, part)?;
            patches += part.len();
            let slopes = &slopes[frames.visual];
            let part = slopes.slice(frames.part(grids, slopes.len()))?;
            rows::cast(gpu, &part, &chunk.d_tokens.slice(features..features + part.len())?)?;
            features += part.len();
        }
        rows::cast(gpu, &values, &rounded)?;
        let width = shape.merge * shape.merge * shape.patch_values();
        rows::gather_rows(gpu, width, &rounded, &chunk.order, &chunk.patches)?;
        rows::gather_rows(gpu, shape.output, &chunk.d_tokens, &chunk.order, &chunk.d_features)?;
        Ok(chunk)
    }

    /// Forward, keeping the input of each block, and backward.
    fn pass(&self, gpu: &Gpu, chunk: &Chunk<T>) -> Result<(), GpuError> {
        let (tower, adds) = (&self.tower, self.summed);
        let products = Products { gpu, rows: chunk.rows };
        products.linear(&chunk.patches, &tower.patch_embed, &chunk.inputs[0])?;
        let pass = Pass { gpu, tower, chunk };
        for (index, block) in tower.blocks.iter().enumerate() {
            pass.forward(block, index)?;
        }
        self.merger_backward(gpu, chunk)?;
        for (index, block) in tower.blocks.iter().enumerate().rev() {
            pass.backward(block, index, &self.gradients.blocks[index], adds)?;
        }
        let sum = Sum::new(&self.gradients.patch_embed, adds);
        products.weight_gradient(&chunk.dx, &chunk.patches, &sum)
    }

    /// The gradient of the residual stream after the last block, to `dx`, and those of the merger.
    fn merger_backward(&self, gpu: &Gpu, chunk: &Chunk<T>) -> Result<(), GpuError> {
        let (tower, shape, adds) = (&self.tower, &self.tower.shape, self.summed);
        let (norm, last) = (vision::norm(shape, chunk.rows), &chunk.inputs[shape.depth]);
        let ([first, second], [first_sum, second_sum]) = (&tower.merger, &self.gradients.merger);
        let (tokens, merged) = (chunk.tokens, shape.merged());
        let products = Products { gpu, rows: tokens };
        // Buffers of blocks, none of which is being computed: what goes into the activation, and what comes out of it.
        let (raw, active) = (&chunk.mixed, &chunk.middle);
        let inverse_rms = &chunk.inverse_rms[0];
        rms_norm(
            gpu,
            norm,
            last,
            None,
            &tower.merger_norm,
            &chunk.normed,
            Some(inverse_rms),
        )?;
        products.linear(&chunk.normed, &first.weight, raw)?;
        gelu(gpu, Gelu::Erf, (tokens, merged), raw, Some(&first.bias), active)?;
        let dy = &chunk.d_features;
        bias_gradient(gpu, tokens, shape.output, dy, &second_sum.bias, &chunk.sums)?;
        products.weight_gradient(dy, active, &Sum::new(&second_sum.weight, adds))?;
        products.input_gradient(dy, &second.weight, active)?;
        gelu_backward(gpu, Gelu::Erf, (tokens, merged), raw, Some(&first.bias), active, active)?;
        bias_gradient(gpu, tokens, merged, active, &first_sum.bias, &chunk.sums)?;
        let operands = (&chunk.normed, &first.weight);
        products.linear_backward(active, operands, raw, &Sum::new(&first_sum.weight, adds))?;
        rms_norm_backward(
            gpu,
            norm,
            RmsNormBackward {
                dy: raw,
                x: last,
                weight: &tower.merger_norm,
                inverse_rms,
                dx: &chunk.dx,
                accumulate: false,
                dweight: Some((&self.gradients.merger_norm, &chunk.sums)),
            },
        )
    }
}
