//! How much memory learning the tower takes, computed; the learner allocates by the same numbers.

use flotilla_kernels::Dtype;

use super::super::{batch, plan::Settings};
use crate::shape::QwenVision;

/// Counts of tokens are rounded up to a multiple of this at least.
const ROUND_TOKENS: usize = 64;

/// Tokens that are computed for so many: few different counts, so that shapes of matrix products come again.
pub(in crate::learner) fn filled(tokens: usize) -> usize {
    batch::round(tokens, ROUND_TOKENS)
}

/// Patches that the largest chunk computes, the filling included.
pub(in crate::learner) fn rows(shape: &QwenVision, settings: &Settings) -> usize {
    let unit = shape.merge * shape.merge;
    filled(settings.patches.div_ceil(unit)) * unit
}

/// Bytes of the tower by what they are for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::learner) struct Bytes {
    /// Weights, with the zeros that fill them up.
    pub weights: usize,
    /// Sums of gradients.
    pub gradients: usize,
    /// The optimiser's moments.
    pub moments: usize,
    /// Activations of the largest chunk that is learned from.
    pub chunk: usize,
    /// Activations of as many patches as are encoded together, and their features.
    pub encoding: usize,
    /// The largest gradient of a matrix.
    pub largest: usize,
}

impl Bytes {
    /// Of a tower with weights in `format`.
    pub fn new(shape: &QwenVision, format: Dtype, settings: &Settings) -> Self {
        let (hidden, padded, merged) = (shape.hidden, shape.padded(), shape.merged());
        let block = [
            3 * hidden * hidden,
            hidden * hidden,
            2 * padded * hidden,
            padded * hidden,
        ];
        let once = [hidden * shape.patch_values(), merged * merged, merged * shape.output];
        let matrices = shape.depth * block.iter().sum::<usize>() + once.iter().sum::<usize>();
        let vectors = shape.depth * (7 * hidden + 2 * padded) + hidden + merged + shape.output;
        let largest = block.iter().chain(&once).max().copied().unwrap_or_default();
        Self {
            weights: (matrices + vectors) * format.bytes(),
            gradients: matrices * settings.gradients.bytes() + 4 * vectors,
            moments: settings.states.bytes(matrices + vectors),
            chunk: chunk(shape, format.bytes(), rows(shape, settings)),
            encoding: encoding_bytes(shape, format.bytes(), settings.encoded),
            largest: largest * settings.gradients.bytes(),
        }
    }
}

/// Activations of so many patches, see `buffers.rs`.
fn chunk(shape: &QwenVision, bytes: usize, rows: usize) -> usize {
    let (hidden, unit) = (shape.hidden, shape.merge * shape.merge);
    // Inputs of blocks; six streams, and packed rows before they are turned, after it, and their gradients.
    let streams = (shape.depth + 1 + 6 + 9) * hidden;
    let mlp = 3 * shape.padded();
    // As they come, rounded, and in the order of windows.
    let patches = shape.patch_values() * (4 + 2 * bytes);
    let sums = 4 * (2 * shape.heads + 2);
    let positions = 2 * 4;
    let row = (streams + mlp) * bytes + patches + sums + positions;
    // Gradients of features in two orders, the order, two lists of segments.
    let token = 2 * shape.output * bytes + 3 * 4;
    rows * row + rows / unit * token + 512 * hidden * 4
}

/// What encoding so many patches takes while it lasts, with numbers of `bytes` bytes; see `vision/tower.rs`.
pub fn encoding_bytes(shape: &QwenVision, bytes: usize, rows: usize) -> usize {
    // Stream, its norm, what a block adds, packed and turned queries, keys and values, attention's output; the merger's first layer.
    let streams = (3 + 6 + 1 + 1) * shape.hidden;
    let row = streams + 3 * shape.padded() + shape.patch_values();
    let tokens = rows / (shape.merge * shape.merge);
    (rows * row + 3 * tokens * shape.output) * bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::VisionShape;

    #[test]
    fn bytes_of_the_7b_tower_are_what_arithmetic_says() {
        let Some(VisionShape::Qwen(shape)) = VisionShape::named("qwen2.5-vl-7b") else {
            unreachable!("a released shape")
        };
        let settings = Settings {
            patches: 16_384,
            ..Settings::new(8192)
        };
        let bytes = Bytes::new(&shape, Dtype::Bf16, &settings);
        // 36 columns of zeros in each of 32 gated MLPs.
        let zeros = 32 * 36 * (3 * 1280 + 2);
        assert_eq!(bytes.weights, 2 * (shape.parameters() + zeros));
        assert_eq!(bytes.largest, 2 * 5120 * 5120);
        assert!(bytes.gradients > bytes.weights && bytes.gradients < bytes.weights + (2 << 20));
        assert_eq!(rows(&shape, &settings), 16_384);
        // 33 inputs of 1,280 numbers are 84 KB of the 157 that a patch takes.
        assert_eq!((bytes.chunk as f64 / 16_384e3).round(), 157.0, "{bytes:?}");
        assert_eq!((bytes.encoding as f64 / 24_576e3).round(), 57.0, "{bytes:?}");
    }

    #[test]
    fn tokens_are_filled_up_by_an_eighth_at_most() {
        assert_eq!(
            [1, 64, 65, 1369, 4096, 5476].map(filled),
            [64, 64, 128, 1408, 4096, 5632]
        );
        for tokens in 1024..9000 {
            assert!((tokens..=tokens * 9 / 8 + 8).contains(&filled(tokens)), "{tokens}");
        }
    }
}
