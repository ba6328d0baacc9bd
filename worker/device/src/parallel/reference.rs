//! A Qwen2 language model in plain f32, whole or one rank's part of it.
//!
//! It is what tensor parallelism must compute, written for reading: prompts of one sequence, no cache. The whole model can
//! add its sums in as many parts as there are ranks, in their order; then a group's logits equal it bit for bit.

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{Collective, CollectiveError, Shard, Tcp};
use crate::shape::TextShape;

/// Weights of one layer, packed as on the card: matrices are `[outputs, inputs]`.
#[derive(Clone, Debug, PartialEq)]
pub struct HostLayer {
    /// `[hidden]`.
    pub input_norm: Vec<f32>,
    /// `[(heads + 2 * kv_heads) * head_dim, hidden]`: rows of queries, keys, values.
    pub qkv: Vec<f32>,
    /// `[(heads + 2 * kv_heads) * head_dim]`.
    pub qkv_bias: Vec<f32>,
    /// `[hidden, heads * head_dim]`.
    pub output: Vec<f32>,
    /// `[hidden]`.
    pub post_norm: Vec<f32>,
    /// `[2 * intermediate, hidden]`: rows of the gate, then of the other half.
    pub gate_up: Vec<f32>,
    /// `[hidden, intermediate]`.
    pub down: Vec<f32>,
}

/// A language model of the host, or a rank's part of one, whose shape is then the local one.
#[derive(Clone, Debug, PartialEq)]
pub struct HostModel {
    /// Sizes.
    pub shape: TextShape,
    /// `[vocabulary, hidden]`.
    pub embedding: Vec<f32>,
    /// Layers in order.
    pub layers: Vec<HostLayer>,
    /// `[hidden]`.
    pub norm: Vec<f32>,
    /// `[vocabulary, hidden]`.
    pub head: Vec<f32>,
}

impl HostModel {
    /// Random weights; norms near one, biases that matter.
    pub fn random(shape: &TextShape, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let mut draw = |length: usize, middle: f32, spread: f32| {
            let values = (0..length).map(|_| middle + spread * random.random_range(-1.0..1.0));
            values.collect::<Vec<f32>>()
        };
        let (hidden, queries) = (shape.hidden, shape.query_width());
        let (packed, inner, rows) = (shape.packed_width(), shape.intermediate, shape.vocabulary);
        let mut matrix = |outputs: usize, inputs: usize| draw(outputs * inputs, 0.0, (3.0 / inputs as f32).sqrt());
        let embedding = matrix(rows, hidden);
        let head = if shape.tied {
            embedding.clone()
        } else {
            matrix(rows, hidden)
        };
        let mut layers = (0..shape.layers)
            .map(|_| HostLayer {
                input_norm: Vec::new(),
                qkv: matrix(packed, hidden),
                qkv_bias: Vec::new(),
                output: matrix(hidden, queries),
                post_norm: Vec::new(),
                gate_up: matrix(2 * inner, hidden),
                down: matrix(hidden, inner),
            })
            .collect::<Vec<_>>();
        for layer in &mut layers {
            layer.input_norm = draw(hidden, 1.0, 0.2);
            layer.qkv_bias = draw(packed, 0.0, 0.5);
            layer.post_norm = draw(hidden, 1.0, 0.2);
        }
        Self {
            embedding,
            layers,
            norm: draw(hidden, 1.0, 0.2),
            head,
            shape: shape.clone(),
        }
    }

    /// A rank's part.
    pub fn shard(&self, shard: &Shard) -> Self {
        let layers = self.layers.iter().map(|layer| HostLayer {
            input_norm: layer.input_norm.clone(),
            qkv: shard.qkv(&layer.qkv),
            qkv_bias: shard.qkv_bias(&layer.qkv_bias),
            output: shard.output(&layer.output),
            post_norm: layer.post_norm.clone(),
            gate_up: shard.gate_up(&layer.gate_up),
            down: shard.down(&layer.down),
        });
        Self {
            layers: layers.collect(),
            embedding: shard.table(&self.embedding),
            norm: self.norm.clone(),
            head: shard.table(&self.head),
            shape: shard.local(),
        }
    }

    /// Logits `[tokens, vocabulary]`, with every sum that ranks would share added in `parts` parts.
    pub fn logits(&self, tokens: &[u32], parts: usize) -> Vec<f32> {
        let hidden = self.shape.hidden;
        let row = |token: &u32| &self.embedding[*token as usize * hidden..(*token as usize + 1) * hidden];
        let mut x = tokens.iter().flat_map(row).copied().collect::<Vec<_>>();
        for layer in &self.layers {
            let attended = self.attended(layer, &x);
            add(
                &mut x,
                &linear_in_parts(&attended, &layer.output, self.shape.query_width(), parts),
            );
            let gated = self.gated(layer, &x);
            add(
                &mut x,
                &linear_in_parts(&gated, &layer.down, self.shape.intermediate, parts),
            );
        }
        linear(&normed(&x, &self.norm, self.shape.eps), &self.head, hidden)
    }

    /// The same of the ranks of a group, of which this is the part of one: logits of the whole vocabulary at every rank.
    pub fn logits_of_group(&self, shard: &Shard, tokens: &[u32], group: &mut Tcp) -> Result<Vec<f32>, CollectiveError> {
        let (shape, hidden) = (&self.shape, self.shape.hidden);
        let here = shard.tokens();
        let mut x = vec![0.0; tokens.len() * hidden];
        for (row, token) in x.chunks_exact_mut(hidden).zip(tokens) {
            let token = *token as usize;
            if here.contains(&token) {
                let at = (token - here.start) * hidden;
                row.copy_from_slice(&self.embedding[at..at + hidden]);
            }
        }
        group.all_reduce_sum(&mut x)?;
        for layer in &self.layers {
            let mut sum = linear(&self.attended(layer, &x), &layer.output, shape.query_width());
            group.all_reduce_sum(&mut sum)?;
            add(&mut x, &sum);
            let mut sum = linear(&self.gated(layer, &x), &layer.down, shape.intermediate);
            group.all_reduce_sum(&mut sum)?;
            add(&mut x, &sum);
        }
        let own = linear(&normed(&x, &self.norm, shape.eps), &self.head, hidden);
        let mut parts = vec![0.0; own.len() * shard.size()];
        group.all_gather(&own, &mut parts)?;
        // Rank, token, row of the vocabulary -> token, rank, row.
        let (rows, tokens) = (shape.vocabulary, tokens.len());
        let row = |token: usize, rank: usize| &parts[(rank * tokens + token) * rows..][..rows];
        let logits = (0..tokens).flat_map(|token| (0..shard.size()).flat_map(move |rank| row(token, rank)));
        Ok(logits.copied().collect())
    }

    /// What each query head has attended to, side by side: `[tokens, heads * head_dim]`.
    fn attended(&self, layer: &HostLayer, x: &[f32]) -> Vec<f32> {
        let shape = &self.shape;
        let (dim, width) = (shape.head_dim, shape.packed_width());
        let mut packed = linear(&normed(x, &layer.input_norm, shape.eps), &layer.qkv, shape.hidden);
        for (position, row) in packed.chunks_exact_mut(width).enumerate() {
            add(row, &layer.qkv_bias);
            for head in row[..shape.query_width() + shape.key_width()].chunks_exact_mut(dim) {
                rotate(head, position, shape.theta);
            }
        }
        let tokens = packed.len() / width;
        let head = |token: usize, head: usize| &packed[token * width + head * dim..][..dim];
        let group = shape.heads / shape.kv_heads;
        let mut out = vec![0.0; tokens * shape.query_width()];
        for (index, out) in out.chunks_exact_mut(dim).enumerate() {
            let (token, query) = (index / shape.heads, index % shape.heads);
            let (key, value) = (
                shape.heads + query / group,
                shape.heads + shape.kv_heads + query / group,
            );
            let scores = (0..=token).map(|other| dot(head(token, query), head(other, key)) / (dim as f32).sqrt());
            let scores = scores.collect::<Vec<_>>();
            let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let weights = scores.iter().map(|score| (score - most).exp()).collect::<Vec<_>>();
            let sum = weights.iter().sum::<f32>();
            for (other, weight) in weights.iter().enumerate() {
                for (out, value) in out.iter_mut().zip(head(other, value)) {
                    *out += weight / sum * value;
                }
            }
        }
        out
    }

    /// What the second matrix of the MLP takes: `[tokens, intermediate]`.
    fn gated(&self, layer: &HostLayer, x: &[f32]) -> Vec<f32> {
        let (shape, inner) = (&self.shape, self.shape.intermediate);
        let both = linear(&normed(x, &layer.post_norm, shape.eps), &layer.gate_up, shape.hidden);
        let gated = both.chunks_exact(2 * inner).flat_map(|row| {
            let (gate, up) = row.split_at(inner);
            gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
        });
        gated.collect()
    }
}

fn dot(one: &[f32], other: &[f32]) -> f32 {
    one.iter().zip(other).map(|(one, other)| one * other).sum()
}

fn add(to: &mut [f32], values: &[f32]) {
    to.iter_mut().zip(values).for_each(|(to, value)| *to += value);
}

/// `[rows, outputs]` of `x[rows, inputs]` and `weight[outputs, inputs]`.
fn linear(x: &[f32], weight: &[f32], inputs: usize) -> Vec<f32> {
    linear_in_parts(x, weight, inputs, 1)
}

/// The same, each sum over the inputs added in so many parts of equal length.
fn linear_in_parts(x: &[f32], weight: &[f32], inputs: usize, parts: usize) -> Vec<f32> {
    let sum = |x: &[f32], weight: &[f32]| {
        let length = inputs / parts;
        let parts = x.chunks_exact(length).zip(weight.chunks_exact(length));
        let sums = parts.map(|(x, weight)| dot(x, weight));
        sums.reduce(|sum, part| sum + part).unwrap_or_default()
    };
    let rows = x.chunks_exact(inputs);
    rows.flat_map(|row| weight.chunks_exact(inputs).map(move |weight| sum(row, weight)))
        .collect()
}

/// Rows divided by the root of their mean square, times `weight`.
fn normed(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let rows = x.chunks_exact(weight.len()).flat_map(|row| {
        let scale = (dot(row, row) / row.len() as f32 + eps).sqrt().recip();
        row.iter()
            .zip(weight)
            .map(move |(value, weight)| value * scale * weight)
    });
    rows.collect()
}

/// Rotary positions: pairs of values half a head apart turn with the position.
#[allow(
    clippy::cast_possible_truncation,
    reason = "angles are computed in f64 and used in f32"
)]
fn rotate(head: &mut [f32], position: usize, theta: f64) {
    let half = head.len() / 2;
    let (low, high) = head.split_at_mut(half);
    for (index, (low, high)) in low.iter_mut().zip(high).enumerate() {
        let angle = position as f64 * theta.powf(-(index as f64) / half as f64);
        let (sin, cos) = (angle.sin() as f32, angle.cos() as f32);
        (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> TextShape {
        TextShape {
            hidden: 16,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            intermediate: 24,
            vocabulary: 20,
            eps: 1e-6,
            theta: 1e4,
            sections: [4, 0, 0],
            tied: false,
        }
    }

    #[test]
    fn sums_in_parts_are_the_same_up_to_rounding() {
        let model = HostModel::random(&shape(), 1);
        let whole = model.logits(&[3, 1, 4, 1, 5], 1);
        let size = dot(&whole, &whole).sqrt();
        assert!(size > 1.0);
        for parts in [2, 4] {
            let in_parts = model.logits(&[3, 1, 4, 1, 5], parts);
            let apart = whole
                .iter()
                .zip(&in_parts)
                .map(|(one, other)| (one - other).powi(2))
                .sum::<f32>();
            assert!(apart.sqrt() < 1e-6 * size, "{parts}: {apart}");
        }
    }

    #[test]
    fn a_later_token_changes_nothing_before_it() {
        let model = HostModel::random(&shape(), 2);
        let (short, long) = (model.logits(&[7, 2], 1), model.logits(&[7, 2, 9], 1));
        assert_eq!(short, long[..short.len()]);
    }

    /// Turning both ends of a product by as many positions leaves it as it is.
    #[test]
    fn rotary_products_depend_on_the_distance() {
        let turned = |position: usize| {
            let mut head = [0.3, -1.0, 0.5, 2.0, 0.1, 0.7, -0.4, 1.5];
            rotate(&mut head, position, 1e4);
            head
        };
        let distance = dot(&turned(5), &turned(2));
        assert!((distance - dot(&turned(105), &turned(102))).abs() < 1e-4);
        assert!((distance - dot(&turned(5), &turned(5))).abs() > 1e-2);
    }

    #[test]
    fn the_part_of_a_group_of_one_is_the_whole() {
        let model = HostModel::random(&shape(), 3);
        let shard = Shard::new(&shape(), 0, 1).unwrap();
        assert_eq!(model.shard(&shard), model);
        let group = model.logits_of_group(&shard, &[1, 19, 0], &mut Tcp::alone()).unwrap();
        assert_eq!(group, model.logits(&[1, 19, 0], 1));
    }
}
