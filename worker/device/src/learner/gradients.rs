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

/// Gradients of all weights that are trained.
#[derive(Debug)]
pub(super) struct Gradients<G> {
    /// Of the embedding table and the head, unless they are frozen. One buffer where they are one table.
    pub tables: Option<Tables<G>>,
    pub layers: Vec<LayerGradients<G>>,
    pub norm: Buffer<f32>,
    /// Those of norms and biases behind one another.
    vectors: Buffer<f32>,
    tied: bool,
}

#[derive(Debug)]
pub(super) struct Tables<G> {
    pub embedding: Buffer<G>,
    pub head: Buffer<G>,
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
    pub fn new(gpu: &Gpu, shape: &TextShape, tables: bool) -> Result<Self, GpuError> {
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
        let table = || gpu.alloc(shape.vocabulary * hidden);
        let tables = tables.then(|| {
            let embedding = table()?;
            let head = if shape.tied { embedding.clone() } else { table()? };
            Ok::<_, GpuError>(Tables { embedding, head })
        });
        Ok(Self {
            layers,
            norm: vector(hidden)?,
            tables: tables.transpose()?,
            tied: shape.tied,
            vectors,
        })
    }

    /// Zeros where the first micro-batch adds: tables, norms, biases. Products overwrite the other matrices.
    pub fn begin(&self, gpu: &Gpu) -> Result<(), GpuError> {
        gpu.clear(&self.vectors)?;
        let Some(Tables { embedding, head }) = &self.tables else {
            return Ok(());
        };
        gpu.clear(embedding)?;
        if self.tied {
            return Ok(());
        }
        gpu.clear(head)
    }

    /// In the order of [`crate::TextWeights::named`], none for what is frozen.
    pub fn ordered(&self) -> Vec<Option<Gradient<G>>> {
        let table = |pick: fn(&Tables<G>) -> &Buffer<G>| {
            let tables = self.tables.as_ref();
            tables.map(|tables| Gradient::Matrix(pick(tables).clone()))
        };
        let mut all = vec![table(|tables| &tables.embedding)];
        for layer in &self.layers {
            let own = [
                Gradient::Vector(layer.input_norm.clone()),
                Gradient::Matrix(layer.qkv.clone()),
                Gradient::Vector(layer.qkv_bias.clone()),
                Gradient::Matrix(layer.output.clone()),
                Gradient::Vector(layer.post_norm.clone()),
                Gradient::Matrix(layer.gate_up.clone()),
                Gradient::Matrix(layer.down.clone()),
            ];
            all.extend(own.map(Some));
        }
        all.push(Some(Gradient::Vector(self.norm.clone())));
        if !self.tied {
            all.push(table(|tables| &tables.head));
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
