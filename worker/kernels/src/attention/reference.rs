//! Attention in plain Rust: sums in f64, one query after the other.

use std::ops::Range;

use super::Attention;

/// Queries and keys of one sequence, and how many keys query `i` sees.
struct Segment {
    queries: Range<usize>,
    keys: Range<usize>,
}

impl Segment {
    fn all(q_offsets: &[u32], k_offsets: &[u32]) -> Vec<Self> {
        let ranges = |offsets: &[u32]| {
            let pairs = offsets.windows(2);
            pairs.map(|pair| pair[0] as usize..pair[1] as usize).collect::<Vec<_>>()
        };
        let both = ranges(q_offsets).into_iter().zip(ranges(k_offsets));
        both.map(|(queries, keys)| Self { queries, keys }).collect()
    }

    fn seen(&self, attention: &Attention, query: usize) -> Range<usize> {
        let (queries, keys) = (self.queries.len(), self.keys.len());
        let seen = if attention.causal {
            (keys + query - self.queries.start + 1).saturating_sub(queries)
        } else {
            keys
        };
        self.keys.start..self.keys.start + seen.min(keys)
    }
}

fn row(matrix: &[f32], token: usize, heads: usize, head: usize, head_dim: usize) -> &[f32] {
    &matrix[(token * heads + head) * head_dim..][..head_dim]
}

/// Eight sums at once: one would wait for itself.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut sums = [0.0; 8];
    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += f64::from(*a) * f64::from(*b);
        }
    }
    sums.iter().sum()
}

fn add(sum: &mut [f64], row: &[f32], factor: f64) {
    for (sum, value) in sum.iter_mut().zip(row) {
        *sum += factor * f64::from(*value);
    }
}

/// Weights of the keys that a query sees, and the logarithm of the sum of exponentials.
fn weights(
    attention: &Attention,
    q: &[f32],
    k: &[f32],
    query: usize,
    head: usize,
    seen: Range<usize>,
) -> (Vec<f64>, f64) {
    let Attention {
        heads,
        kv_heads,
        head_dim,
        ..
    } = *attention;
    let asking = row(q, query, heads, head, head_dim);
    let scores = seen
        .map(|key| dot(asking, row(k, key, kv_heads, head / (heads / kv_heads), head_dim)) * f64::from(attention.scale))
        .collect::<Vec<_>>();
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total = scores.iter().map(|score| (score - most).exp()).sum::<f64>();
    let lse = if scores.is_empty() {
        f64::NEG_INFINITY
    } else {
        most + total.ln()
    };
    (scores.iter().map(|score| (score - lse).exp()).collect(), lse)
}

/// `out` `[queries, heads, head_dim]` and `lse` `[heads, queries]`. Offsets are prefix sums, one more than segments.
#[allow(clippy::cast_possible_truncation, reason = "sums of f64 are given as f32")]
pub fn forward(
    attention: &Attention,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    q_offsets: &[u32],
    k_offsets: &[u32],
) -> (Vec<f32>, Vec<f32>) {
    let Attention {
        heads,
        kv_heads,
        head_dim,
        ..
    } = *attention;
    let tokens = q.len() / (heads * head_dim);
    let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; heads * tokens]);
    for segment in Segment::all(q_offsets, k_offsets) {
        for query in segment.queries.clone() {
            let seen = segment.seen(attention, query);
            for head in 0..heads {
                let (weights, norm) = weights(attention, q, k, query, head, seen.clone());
                let mut sum = vec![0.0; head_dim];
                for (key, weight) in seen.clone().zip(weights) {
                    add(
                        &mut sum,
                        row(v, key, kv_heads, head / (heads / kv_heads), head_dim),
                        weight,
                    );
                }
                let at = (query * heads + head) * head_dim;
                for (out, sum) in out[at..].iter_mut().zip(sum) {
                    *out = sum as f32;
                }
                lse[head * tokens + query] = norm as f32;
            }
        }
    }
    (out, lse)
}

/// Gradients `dq`, `dk`, `dv` of the sum of `dout · out`.
#[allow(clippy::cast_possible_truncation, reason = "sums of f64 are given as f32")]
pub fn backward(
    attention: &Attention,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    q_offsets: &[u32],
    k_offsets: &[u32],
    dout: &[f32],
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let Attention {
        heads,
        kv_heads,
        head_dim,
        ..
    } = *attention;
    let scale = f64::from(attention.scale);
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    for segment in Segment::all(q_offsets, k_offsets) {
        for query in segment.queries.clone() {
            let seen = segment.seen(attention, query);
            for head in 0..heads {
                let kv_head = head / (heads / kv_heads);
                let (weights, _) = weights(attention, q, k, query, head, seen.clone());
                let gradient = row(dout, query, heads, head, head_dim);
                let changes = seen
                    .clone()
                    .map(|key| dot(gradient, row(v, key, kv_heads, kv_head, head_dim)))
                    .collect::<Vec<_>>();
                let mean = weights.iter().zip(&changes).map(|(w, change)| w * change).sum::<f64>();
                let at = (query * heads + head) * head_dim;
                for ((key, weight), change) in seen.clone().zip(weights).zip(changes) {
                    let of_score = weight * (change - mean) * scale;
                    let key_at = (key * kv_heads + kv_head) * head_dim;
                    add(&mut dv[key_at..key_at + head_dim], gradient, weight);
                    add(
                        &mut dk[key_at..key_at + head_dim],
                        row(q, query, heads, head, head_dim),
                        of_score,
                    );
                    add(
                        &mut dq[at..at + head_dim],
                        row(k, key, kv_heads, kv_head, head_dim),
                        of_score,
                    );
                }
            }
        }
    }
    let narrow = |values: Vec<f64>| values.into_iter().map(|value| value as f32).collect();
    (narrow(dq), narrow(dk), narrow(dv))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(length: usize, seed: usize) -> Vec<f32> {
        (0..length)
            .map(|i| ((i * 37 + seed * 11) as f32 * 0.731).sin())
            .collect()
    }

    fn small(causal: bool) -> Attention {
        Attention {
            heads: 4,
            kv_heads: 2,
            head_dim: 3,
            scale: 0.7,
            causal,
        }
    }

    #[test]
    fn one_key_gives_its_value() {
        let attention = small(true);
        let (q, k, v) = (numbers(12, 1), numbers(6, 2), numbers(6, 3));
        let (out, lse) = forward(&attention, &q, &k, &v, &[0, 1], &[0, 1]);
        for head in 0..4 {
            for d in 0..3 {
                assert!((out[head * 3 + d] - v[head / 2 * 3 + d]).abs() < 1e-6);
            }
            let score = (0..3).map(|d| q[head * 3 + d] * k[head / 2 * 3 + d]).sum::<f32>() * 0.7;
            assert!((lse[head] - score).abs() < 1e-6);
        }
    }

    #[test]
    fn equal_keys_give_the_mean_of_what_is_seen() {
        // Two cached keys and three new ones: query i sees 3 + i.
        let attention = small(true);
        let (q, k, v) = (numbers(36, 1), vec![0.5; 30], numbers(30, 3));
        let (out, _) = forward(&attention, &q, &k, &v, &[0, 3], &[0, 5]);
        for query in 0..3 {
            let seen = 3 + query;
            let mean = (0..seen).map(|key| v[key * 6]).sum::<f32>() / seen as f32;
            assert!((out[query * 12] - mean).abs() < 1e-6);
        }
    }

    #[test]
    fn a_query_that_sees_nothing_gets_zeros() {
        let attention = small(true);
        let (q, k, v) = (numbers(24, 1), numbers(6, 2), numbers(6, 3));
        let (out, lse) = forward(&attention, &q, &k, &v, &[0, 2], &[0, 1]);
        assert!(out[..12].iter().all(|value| *value == 0.0) && lse[0] == f32::NEG_INFINITY);
        assert!(out[12..].iter().all(|value| *value != 0.0));
    }

    #[test]
    fn gradients_are_finite_differences() {
        for causal in [false, true] {
            let attention = small(causal);
            let (q_offsets, k_offsets) = ([0, 3, 3, 5], [0, 4, 5, 7]);
            let inputs = [numbers(60, 1), numbers(42, 2), numbers(42, 3)];
            let dout = numbers(60, 4);
            let value = |inputs: &[Vec<f32>; 3]| {
                let (out, _) = forward(&attention, &inputs[0], &inputs[1], &inputs[2], &q_offsets, &k_offsets);
                dot(&out, &dout)
            };
            let (dq, dk, dv) = backward(
                &attention, &inputs[0], &inputs[1], &inputs[2], &q_offsets, &k_offsets, &dout,
            );
            for (which, gradient) in [dq, dk, dv].iter().enumerate() {
                for at in 0..gradient.len() {
                    let step = 1.0 / 128.0;
                    let (mut up, mut down) = (inputs.clone(), inputs.clone());
                    up[which][at] += step;
                    down[which][at] -= step;
                    let width = f64::from(up[which][at]) - f64::from(down[which][at]);
                    let slope = (value(&up) - value(&down)) / width;
                    assert!(
                        (slope - f64::from(gradient[at])).abs() < 2e-4,
                        "{which} {at}: {slope} {}",
                        gradient[at]
                    );
                }
            }
        }
    }
}
