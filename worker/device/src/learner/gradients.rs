//! One gradient per weight.

use flotilla_kernels::{Buffer, Float, Gpu, GpuError};

use crate::shape::TextShape;

/// Gradients of one layer. Those of matrices are summed in `G`, those of norms and biases in f32.
#[derive(Debug)]
pub(super) struct LayerGradients<G> {
    pub input_norm: Buffer<f32>,
    pub qkv: Buffer<G>,
    pub qkv_bias: Buffer<f32>,
    pub output: Buffer<G>,
    pub post_norm: Buffer<f32>,
    pub gate_up: Buffer<G>,
    pub down: Buffer<G>,
}

/// Gradients of all weights. Where the head is the embedding table, `head` is `embedding`.
#[derive(Debug)]
pub(super) struct Gradients<G> {
    pub embedding: Buffer<G>,
    pub layers: Vec<LayerGradients<G>>,
    pub norm: Buffer<f32>,
    pub head: Buffer<G>,
    /// Those of norms and biases behind one another.
    vectors: Buffer<f32>,
    tied: bool,
}

/// A gradient of either format.
#[derive(Clone, Debug)]
pub enum Gradient<G> {
    /// Of a matrix.
    Matrix(Buffer<G>),
    /// Of a norm or a bias.
    Vector(Buffer<f32>),
}

/// Where a product goes: over what is there in the first micro-batch, onto it in the others.
#[derive(Debug)]
pub(super) struct Sum<'a, G> {
    pub buffer: &'a Buffer<G>,
    pub adds: bool,
}

impl<'a, G> Sum<'a, G> {
    pub fn new(buffer: &'a Buffer<G>, adds: bool) -> Self {
        Self { buffer, adds }
    }
}

impl<G: Float> Gradients<G> {
    pub fn new(gpu: &Gpu, shape: &TextShape) -> Result<Self, GpuError> {
        let (hidden, packed) = (shape.hidden, shape.packed_width());
        // Each begins at an address that vectors of 16 bytes can be read from.
        let room = |length: usize| length.next_multiple_of(4);
        let vectors = gpu.zeros(shape.layers * (2 * room(hidden) + room(packed)) + room(hidden))?;
        let mut used = 0;
        let mut vector = |length: usize| {
            let begin = used;
            used += room(length);
            vectors.slice(begin..begin + length)
        };
        let layers = (0..shape.layers).map(|_| {
            Ok(LayerGradients {
                input_norm: vector(hidden)?,
                qkv: gpu.alloc(packed * hidden)?,
                qkv_bias: vector(packed)?,
                output: gpu.alloc(hidden * shape.query_width())?,
                post_norm: vector(hidden)?,
                gate_up: gpu.alloc(2 * shape.intermediate * hidden)?,
                down: gpu.alloc(hidden * shape.intermediate)?,
            })
        });
        let layers = layers.collect::<Result<_, GpuError>>()?;
        let embedding = gpu.alloc(shape.vocabulary * hidden)?;
        let head = if shape.tied {
            embedding.clone()
        } else {
            gpu.alloc(shape.vocabulary * hidden)?
        };
        Ok(Self {
            layers,
            norm: vector(hidden)?,
            embedding,
            head,
            tied: shape.tied,
            vectors,
        })
    }

    /// Zeros where the first micro-batch adds: tables, norms, biases. Products overwrite the other matrices.
    pub fn begin(&self, gpu: &Gpu) -> Result<(), GpuError> {
        gpu.clear(&self.vectors)?;
        gpu.clear(&self.embedding)?;
        if self.tied {
            return Ok(());
        }
        gpu.clear(&self.head)
    }

    /// In the order of [`crate::TextWeights::named`].
    pub fn ordered(&self) -> Vec<Gradient<G>> {
        let mut all = vec![Gradient::Matrix(self.embedding.clone())];
        for layer in &self.layers {
            all.extend([
                Gradient::Vector(layer.input_norm.clone()),
                Gradient::Matrix(layer.qkv.clone()),
                Gradient::Vector(layer.qkv_bias.clone()),
                Gradient::Matrix(layer.output.clone()),
                Gradient::Vector(layer.post_norm.clone()),
                Gradient::Matrix(layer.gate_up.clone()),
                Gradient::Matrix(layer.down.clone()),
            ]);
        }
        all.push(Gradient::Vector(self.norm.clone()));
        if !self.tied {
            all.push(Gradient::Matrix(self.head.clone()));
        }
        all
    }
}

impl<G: Float> Gradient<G> {
    /// On the host.
    pub fn download(&self, gpu: &Gpu) -> Result<Vec<f32>, GpuError> {
        Ok(match self {
            Self::Matrix(buffer) => gpu.download(buffer)?.into_iter().map(Float::to_f32).collect(),
            Self::Vector(buffer) => gpu.download(buffer)?,
        })
    }
}
