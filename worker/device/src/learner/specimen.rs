//! Random models, batches and slopes that checks compute with.

use flotilla_kernels::{
    Float, Gpu,
    check::{CheckError, Draw, widen},
    optimizer::StateKind,
};
use half::bf16;

use super::{Batch, Sequence, Settings, reference::Reference};
use crate::{
    shape::TextShape,
    weights::{Layer, TextWeights},
};

/// Two layers and an odd vocabulary.
pub(super) fn small(tied: bool) -> TextShape {
    TextShape {
        hidden: 64,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        intermediate: 88,
        vocabulary: 131,
        eps: 1e-6,
        theta: 1e4,
        sections: [2, 3, 3],
        tied,
    }
}

/// Heads as released models have them.
pub(super) fn medium() -> TextShape {
    TextShape {
        hidden: 512,
        layers: 3,
        heads: 4,
        kv_heads: 2,
        head_dim: 128,
        intermediate: 768,
        vocabulary: 1003,
        eps: 1e-6,
        theta: 1e6,
        sections: [16, 24, 24],
        tied: false,
    }
}

/// Weights that both formats can hold, of every kind random.
pub(super) fn draw_tensors(draw: &mut Draw, shape: &TextShape) -> Vec<Vec<f32>> {
    let lengths = Reference::lengths(shape);
    let vector = |length: usize| length == shape.hidden;
    let tensors = lengths.into_iter().map(|length| {
        if vector(length) {
            let numbers = draw.normal::<bf16>(length, 0.2);
            return numbers
                .iter()
                .map(|number| bf16::from_f32(1.0 + number.to_f32()).to_f32())
                .collect();
        }
        let deviation = if length == shape.packed_width() {
            0.3
        } else {
            (shape.hidden as f32).sqrt().recip()
        };
        widen(&draw.normal::<bf16>(length, deviation))
    });
    tensors.collect()
}

pub(super) fn upload<T: Float>(
    gpu: &Gpu,
    shape: &TextShape,
    tensors: &[Vec<f32>],
) -> Result<TextWeights<T>, CheckError> {
    let buffers = tensors.iter().map(|values| {
        let values = values.iter().map(|value| T::from_f32(*value)).collect::<Vec<_>>();
        gpu.upload(&values)
    });
    let buffers = buffers.collect::<Result<Vec<_>, _>>()?;
    let layers = buffers[1..].chunks_exact(7).take(shape.layers).map(|layer| Layer {
        input_norm: layer[0].clone(),
        qkv: layer[1].clone(),
        qkv_bias: layer[2].clone(),
        output: layer[3].clone(),
        post_norm: layer[4].clone(),
        gate_up: layer[5].clone(),
        down: layer[6].clone(),
    });
    let last = buffers.len() - 1;
    Ok(TextWeights {
        layers: layers.collect(),
        embedding: buffers[0].clone(),
        norm: buffers[1 + 7 * shape.layers].clone(),
        head: if shape.tied {
            buffers[0].clone()
        } else {
            buffers[last].clone()
        },
        shape: shape.clone(),
    })
}

/// Sequences of these lengths with random tokens, the later two thirds of each scored, and placeholders in the first.
pub(super) fn draw_batch(draw: &mut Draw, shape: &TextShape, lengths: &[usize]) -> Result<Batch, CheckError> {
    let vocabulary = shape.vocabulary;
    let parts = lengths.iter().enumerate().map(|(index, length)| {
        let ids = (0..*length)
            .map(|_| small_number(draw.below(vocabulary)))
            .collect::<Vec<_>>();
        let positions = (0..small_number(*length))
            .map(|at| [at, at / 2 + 3, at % 5])
            .collect::<Vec<_>>();
        let placeholders = if index == 0 { vec![2, 3, 5] } else { Vec::new() };
        (ids, positions, (length / 3).max(1)..*length, placeholders)
    });
    let parts = parts.collect::<Vec<_>>();
    let sequences = parts.iter().map(|(ids, positions, scored, placeholders)| Sequence {
        ids,
        positions,
        scored,
        placeholders,
    });
    Batch::pack(sequences).map_err(|error| CheckError::Differs(error.to_string()))
}

pub(super) fn small_number(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Slopes of a random loss.
pub(super) fn draw_slopes(draw: &mut Draw, batch: &Batch) -> Vec<f32> {
    let deviation = (batch.scored.len() as f32).recip();
    draw.normal::<f32>(batch.scored.len(), deviation)
}

pub(super) fn settings<T: Float>(tokens: usize) -> Settings {
    Settings {
        gradients: T::DTYPE,
        states: StateKind::Bf16,
        logit_rows: 128,
        ..Settings::new(tokens)
    }
}
