//! The language model in f64 on the host, as plainly as it can be written: what the passes on the card are compared with. It
//! has no backward pass: gradients are compared with differences of its results.

use super::batch::Batch;
use crate::shape::TextShape;

/// Weights in the order of `TextWeights::named`.
#[derive(Clone, Debug)]
pub struct Reference {
    /// Sizes.
    pub shape: TextShape,
    /// Embedding, seven tensors of each layer, last norm, and the head where it is not tied.
    pub tensors: Vec<Vec<f64>>,
}

/// Tensors of one layer.
const OF_LAYER: usize = 7;

/// `x[rows, inputs] · weight[outputs, inputs]ᵀ`.
fn linear(x: &[f64], weight: &[f64], inputs: usize) -> Vec<f64> {
    let rows = x.chunks_exact(inputs);
    rows.flat_map(|row| {
        let outputs = weight.chunks_exact(inputs);
        outputs.map(|weight| row.iter().zip(weight).map(|(x, w)| x * w).sum::<f64>())
    })
    .collect()
}

fn rms_norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let rows = x.chunks_exact(weight.len());
    rows.flat_map(|row| {
        let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
        let scale = (mean + eps).sqrt().recip();
        row.iter().zip(weight).map(move |(x, weight)| x * scale * weight)
    })
    .collect()
}

fn add(x: &mut [f64], other: &[f64]) {
    for (x, other) in x.iter_mut().zip(other) {
        *x += other;
    }
}

impl Reference {
    /// Lengths of the tensors of a shape.
    pub fn lengths(shape: &TextShape) -> Vec<usize> {
        let (hidden, packed) = (shape.hidden, shape.packed_width());
        let table = shape.vocabulary * hidden;
        let layer = [
            hidden,
            packed * hidden,
            packed,
            hidden * shape.query_width(),
            hidden,
            2 * shape.intermediate * hidden,
            hidden * shape.intermediate,
        ];
        let mut lengths = vec![table];
        lengths.extend(layer.repeat(shape.layers));
        lengths.push(hidden);
        lengths.extend((!shape.tied).then_some(table));
        lengths
    }

    /// Log-probability of each target of a batch. `features` `[placeholders, hidden]`.
    pub fn log_probs(&self, batch: &Batch, features: &[f64], temperature: f64) -> Vec<f64> {
        let shape = &self.shape;
        let (hidden, eps) = (shape.hidden, f64::from(shape.eps));
        let mut x = Vec::new();
        for id in &batch.ids {
            let begin = *id as usize * hidden;
            x.extend_from_slice(&self.tensors[0][begin..begin + hidden]);
        }
        for (row, feature) in batch.placeholders.iter().zip(features.chunks_exact(hidden)) {
            let begin = *row as usize * hidden;
            x[begin..begin + hidden].copy_from_slice(feature);
        }
        let angles = self.angles(batch);
        for layer in self.tensors[1..].chunks_exact(OF_LAYER).take(shape.layers) {
            let [input_norm, qkv, bias, output, post_norm, gate_up, down] = layer else {
                continue;
            };
            let mut packed = linear(&rms_norm(&x, input_norm, eps), qkv, hidden);
            for row in packed.chunks_exact_mut(bias.len()) {
                add(row, bias);
            }
            self.turn(&mut packed, &angles);
            let mixed = self.attend(&packed, &batch.offsets);
            add(&mut x, &linear(&mixed, output, shape.query_width()));
            let both = linear(&rms_norm(&x, post_norm, eps), gate_up, hidden);
            let gated = both.chunks_exact(2 * shape.intermediate).flat_map(|row| {
                let (gate, up) = row.split_at(shape.intermediate);
                gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
            });
            let gated = gated.collect::<Vec<_>>();
            add(&mut x, &linear(&gated, down, shape.intermediate));
        }
        let norm = &self.tensors[1 + OF_LAYER * shape.layers];
        let head = if shape.tied {
            &self.tensors[0]
        } else {
            &self.tensors[2 + OF_LAYER * shape.layers]
        };
        let scored = batch.scored.iter().zip(&batch.targets);
        scored
            .map(|(row, target)| {
                let begin = *row as usize * hidden;
                let normed = rms_norm(&x[begin..begin + hidden], norm, eps);
                let logits = linear(&normed, head, hidden);
                let highest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum = logits
                    .iter()
                    .map(|logit| ((logit - highest) / temperature).exp())
                    .sum::<f64>();
                (logits[*target as usize] - highest) / temperature - sum.ln()
            })
            .collect()
    }

    /// `[tokens, head_dim / 2]`. A product of f32 numbers, as the kernel's.
    fn angles(&self, batch: &Batch) -> Vec<f64> {
        let half = self.shape.head_dim / 2;
        let frequencies = (0..half).map(|pair| {
            #[allow(clippy::cast_possible_truncation, reason = "the kernel has the base in f32")]
            let theta = self.shape.theta as f32;
            1.0 / theta.powf((2 * pair) as f32 / self.shape.head_dim as f32)
        });
        let frequencies = frequencies.collect::<Vec<_>>();
        let axes = self.shape.axes();
        let tokens = batch.positions.iter();
        tokens
            .flat_map(|position| {
                let pairs = frequencies.iter().zip(&axes);
                pairs.map(|(frequency, axis)| {
                    f64::from(position[usize::try_from(*axis).unwrap_or(0)] as f32 * frequency)
                })
            })
            .collect()
    }

    /// Turns queries and keys of packed rows.
    fn turn(&self, packed: &mut [f64], angles: &[f64]) {
        let shape = &self.shape;
        let half = shape.head_dim / 2;
        let rows = packed.chunks_exact_mut(shape.packed_width());
        for (row, angles) in rows.zip(angles.chunks_exact(half)) {
            for head in row.chunks_exact_mut(shape.head_dim).take(shape.heads + shape.kv_heads) {
                for (pair, angle) in angles.iter().enumerate() {
                    let (x, y) = (head[pair], head[pair + half]);
                    head[pair] = x * angle.cos() - y * angle.sin();
                    head[pair + half] = y * angle.cos() + x * angle.sin();
                }
            }
        }
    }

    /// Causal attention in each sequence, `[tokens, heads * head_dim]`.
    fn attend(&self, packed: &[f64], offsets: &[u32]) -> Vec<f64> {
        let shape = &self.shape;
        let (width, dim) = (shape.packed_width(), shape.head_dim);
        let part = |token: usize, column: usize| &packed[token * width + column..token * width + column + dim];
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let scale = (dim as f64).sqrt().recip();
        let mut out = Vec::new();
        for pair in offsets.windows(2) {
            let (begin, end) = (pair[0] as usize, pair[1] as usize);
            for token in begin..end {
                for head in 0..shape.heads {
                    let key = shape.query_width() + head / (shape.heads / shape.kv_heads) * dim;
                    let query = part(token, head * dim);
                    let scores = (begin..=token).map(|other| scale * dot(query, part(other, key)));
                    let scores = scores.collect::<Vec<_>>();
                    let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let weights = scores.iter().map(|score| (score - highest).exp()).collect::<Vec<_>>();
                    let sum = weights.iter().sum::<f64>();
                    let mut mixed = vec![0.0; dim];
                    for (other, weight) in (begin..=token).zip(&weights) {
                        let value = part(other, key + shape.key_width());
                        for (mixed, value) in mixed.iter_mut().zip(value) {
                            *mixed += weight / sum * value;
                        }
                    }
                    out.extend(mixed);
                }
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn model(tied: bool) -> Reference {
        let shape = TextShape {
            hidden: 8,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            head_dim: 4,
            intermediate: 6,
            vocabulary: 11,
            eps: 1e-6,
            theta: 1e4,
            sections: [1, 1, 0],
            tied,
        };
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let tensors = Reference::lengths(&shape).into_iter();
        Reference {
            tensors: tensors
                .map(|length| (0..length).map(|_| random.random_range(-0.7..0.7)).collect())
                .collect(),
            shape,
        }
    }

    fn batch(ids: &[u32], offsets: &[u32], scored: &[u32], targets: &[u32]) -> Batch {
        Batch {
            ids: ids.to_vec(),
            positions: (0..3).chain(0..4).take(ids.len()).map(|p| [p, p + 1, 0]).collect(),
            offsets: offsets.to_vec(),
            scored: scored.to_vec(),
            targets: targets.to_vec(),
            placeholders: Vec::new(),
        }
    }

    #[test]
    fn probabilities_of_all_targets_sum_to_one() {
        for tied in [true, false] {
            let model = model(tied);
            let targets = (0..11).collect::<Vec<_>>();
            let batch = batch(&[3, 5, 7], &[0, 3], &[2; 11], &targets);
            let sum = model.log_probs(&batch, &[], 0.8).into_iter().map(f64::exp).sum::<f64>();
            assert!((sum - 1.0).abs() < 1e-12, "{sum}");
        }
    }

    #[test]
    fn a_token_sees_those_before_it_in_its_sequence_alone() {
        let model = model(false);
        let of = |ids: &[u32]| model.log_probs(&batch(ids, &[0, 3, 7], &[1, 4, 5], &[1, 2, 3]), &[], 1.0);
        let first = of(&[1, 2, 3, 4, 5, 6, 7]);
        let other = of(&[1, 2, 9, 4, 5, 6, 8]);
        assert_eq!(first, other, "later tokens and other sequences");
        assert_ne!(first[1..], of(&[1, 2, 3, 5, 5, 6, 7])[1..]);
    }
}
