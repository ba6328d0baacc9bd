//! One gradient per weight of the tower.

use flotilla_kernels::{Buffer, Float, Gpu, GpuError};

use super::super::gradients::Gradient;
use crate::shape::QwenVision;

/// Of a linear layer: the matrix is summed in `G`, the bias in f32.
#[derive(Debug)]
pub(super) struct LinearGradients<G> {
    pub weight: Buffer<G>,
    pub bias: Buffer<f32>,
}

/// Of one block.
#[derive(Debug)]
pub(super) struct BlockGradients<G> {
    pub norm1: Buffer<f32>,
    pub qkv: LinearGradients<G>,
    pub proj: LinearGradients<G>,
    pub norm2: Buffer<f32>,
    pub gate_up: LinearGradients<G>,
    pub down: LinearGradients<G>,
}

/// Of all weights.
#[derive(Debug)]
pub(super) struct TowerGradients<G> {
    pub patch_embed: Buffer<G>,
    pub blocks: Vec<BlockGradients<G>>,
    pub merger_norm: Buffer<f32>,
    pub merger: [LinearGradients<G>; 2],
    /// Norms and biases behind one another.
    vectors: Buffer<f32>,
}

/// Cuts norms and biases from one buffer.
struct Vectors {
    all: Buffer<f32>,
    used: usize,
}

impl Vectors {
    /// Each begins at an address that vectors of 16 bytes can be read from.
    fn room(length: usize) -> usize {
        length.next_multiple_of(4)
    }

    fn next(&mut self, length: usize) -> Result<Buffer<f32>, GpuError> {
        let begin = self.used;
        self.used += Self::room(length);
        self.all.slice(begin..begin + length)
    }

    fn linear<G: Float>(&mut self, gpu: &Gpu, outputs: usize, inputs: usize) -> Result<LinearGradients<G>, GpuError> {
        Ok(LinearGradients {
            weight: gpu.alloc(outputs * inputs)?,
            bias: self.next(outputs)?,
        })
    }
}

impl<G: Float> TowerGradients<G> {
    pub fn new(gpu: &Gpu, shape: &QwenVision) -> Result<Self, GpuError> {
        let (hidden, padded, merged) = (shape.hidden, shape.padded(), shape.merged());
        let block = [hidden, 3 * hidden, hidden, hidden, 2 * padded, hidden];
        let once = [hidden, merged, shape.output];
        let room = |lengths: &[usize]| lengths.iter().map(|length| Vectors::room(*length)).sum::<usize>();
        let all = gpu.zeros(shape.depth * room(&block) + room(&once))?;
        let mut vectors = Vectors {
            all: all.clone(),
            used: 0,
        };
        let mut blocks = Vec::with_capacity(shape.depth);
        for _ in 0..shape.depth {
            blocks.push(BlockGradients {
                norm1: vectors.next(hidden)?,
                qkv: vectors.linear(gpu, 3 * hidden, hidden)?,
                proj: vectors.linear(gpu, hidden, hidden)?,
                norm2: vectors.next(hidden)?,
                gate_up: vectors.linear(gpu, 2 * padded, hidden)?,
                down: vectors.linear(gpu, hidden, padded)?,
            });
        }
        Ok(Self {
            patch_embed: gpu.alloc(hidden * shape.patch_values())?,
            blocks,
            merger_norm: vectors.next(hidden)?,
            merger: [
                vectors.linear(gpu, merged, merged)?,
                vectors.linear(gpu, shape.output, merged)?,
            ],
            vectors: all,
        })
    }

    /// Zeros where the first chunk adds: norms and biases. Products overwrite the matrices.
    pub fn begin(&self, gpu: &Gpu) -> Result<(), GpuError> {
        gpu.clear(&self.vectors)
    }

    /// In the order of [`crate::vision::QwenTower::named`].
    pub fn ordered(&self) -> Vec<Gradient<G>> {
        let vector = |buffer: &Buffer<f32>| Gradient::Vector(buffer.clone());
        let linear = |layer: &LinearGradients<G>| [Gradient::Matrix(layer.weight.clone()), vector(&layer.bias)];
        let mut all = vec![Gradient::Matrix(self.patch_embed.clone())];
        for block in &self.blocks {
            all.push(vector(&block.norm1));
            all.extend(linear(&block.qkv));
            all.extend(linear(&block.proj));
            all.push(vector(&block.norm2));
            all.extend(linear(&block.gate_up));
            all.extend(linear(&block.down));
        }
        all.push(vector(&self.merger_norm));
        all.extend(self.merger.iter().flat_map(linear));
        all
    }
}
