//! The split with rotation in plain Rust.

/// How pairs are turned, as [`Turn`](super::Turn) on the card.
#[derive(Clone, Debug, Default)]
pub struct Angles {
    /// `[axes, tokens]`.
    pub positions: Vec<i32>,
    /// Of each pair.
    pub frequencies: Vec<f32>,
    /// Of each pair.
    pub axis_of: Vec<u8>,
}

impl Angles {
    /// cos and sin of an f32 angle, without an error of their own.
    pub fn at(&self, token: usize, tokens: usize, pair: usize) -> (f64, f64) {
        let position = self.positions[usize::from(self.axis_of[pair]) * tokens + token] as f32;
        let angle = f64::from(position * self.frequencies[pair]);
        (angle.cos(), angle.sin())
    }

    /// Turns the heads of `rows` `[tokens, heads, 2 * pairs]`; back, if `direction` is -1.
    pub fn turn(&self, rows: &mut [f32], tokens: usize, direction: f64) {
        let pairs = self.frequencies.len();
        if rows.is_empty() {
            return;
        }
        let row = rows.len() / tokens;
        for (token, row) in rows.chunks_exact_mut(row).enumerate() {
            for pair in 0..pairs {
                let (cos, sin) = self.at(token, tokens, pair);
                let sin = direction * sin;
                for head in row.chunks_exact_mut(2 * pairs) {
                    let (low, high) = (f64::from(head[pair]), f64::from(head[pair + pairs]));
                    head[pair] = (low * cos - high * sin) as f32;
                    head[pair + pairs] = (high * cos + low * sin) as f32;
                }
            }
        }
    }
}

/// Queries, keys and values of packed rows, after adding the bias; `sizes` are numbers of a token's queries and of its keys.
pub fn unpack(qkv: &[f32], bias: Option<&[f32]>, sizes: (usize, usize)) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let row = sizes.0 + 2 * sizes.1;
    let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
    for token in qkv.chunks_exact(row) {
        let number = |i: usize| token[i] + bias.map_or(0.0, |bias| bias[i]);
        q.extend((0..sizes.0).map(number));
        k.extend((sizes.0..sizes.0 + sizes.1).map(number));
        v.extend((sizes.0 + sizes.1..row).map(number));
    }
    (q, k, v)
}

/// The inverse of [`unpack`] without bias.
pub fn repack(q: &[f32], k: &[f32], v: &[f32], sizes: (usize, usize)) -> Vec<f32> {
    let keys = k.chunks_exact(sizes.1).zip(v.chunks_exact(sizes.1));
    let tokens = q.chunks_exact(sizes.0).zip(keys);
    tokens.flat_map(|(q, (k, v))| [q, k, v].concat()).collect()
}

/// Where number `i` of a head of a slot is in a pool `[blocks, kv_heads, block_size, head_dim]`.
pub fn pool_index(
    slot: usize,
    head: usize,
    i: usize,
    (kv_heads, block_size, head_dim): (usize, usize, usize),
) -> usize {
    let (block, offset) = (slot / block_size, slot % block_size);
    ((block * kv_heads + head) * block_size + offset) * head_dim + i
}

/// Frequencies of a rotary embedding: `base^(-i / pairs)`.
pub fn frequencies(base: f64, pairs: usize) -> Vec<f32> {
    (0..pairs)
        .map(|i| base.powf(-(i as f64) / pairs as f64) as f32)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn angles(tokens: i32) -> Angles {
        Angles {
            positions: (0..2 * tokens).map(|at| 3 * at - 2).collect(),
            frequencies: frequencies(10_000.0, 3),
            axis_of: vec![0, 1, 1],
        }
    }

    #[test]
    fn turning_back_gives_what_was_there() {
        let rows = (0..4 * 2 * 6).map(|i| (i as f32).sin()).collect::<Vec<_>>();
        let mut turned = rows.clone();
        angles(4).turn(&mut turned, 4, 1.0);
        assert!(rows.iter().zip(&turned).any(|(a, b)| (a - b).abs() > 0.1));
        angles(4).turn(&mut turned, 4, -1.0);
        assert!(rows.iter().zip(&turned).all(|(a, b)| (a - b).abs() < 1e-6));
    }

    #[test]
    fn a_pair_is_a_complex_number_times_its_phase() {
        let mut rows = vec![1.0, 0.0, 0.0, 0.0, 0.0, 2.0];
        let angles = Angles {
            positions: vec![1, 5],
            frequencies: vec![0.5, 1.0, 0.25],
            axis_of: vec![0, 0, 1],
        };
        angles.turn(&mut rows, 1, 1.0);
        let near = |a: f32, b: f64| assert!((f64::from(a) - b).abs() < 1e-6, "{a} {b}");
        // (1 + 0i) e^(0.5 i)
        near(rows[0], 0.5f64.cos());
        near(rows[3], 0.5f64.sin());
        // (0 + 2i) e^(1.25 i)
        near(rows[2], -2.0 * 1.25f64.sin());
        near(rows[5], 2.0 * 1.25f64.cos());
    }

    #[test]
    fn unpacked_and_repacked_is_the_same() {
        let qkv = (0..2 * 10).map(|i| i as f32).collect::<Vec<_>>();
        let (q, k, v) = unpack(&qkv, None, (6, 2));
        assert_eq!(q[6..], [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]);
        assert_eq!((k[2], v[3]), (16.0, 19.0));
        assert_eq!(repack(&q, &k, &v, (6, 2)), qkv);
    }

    #[test]
    fn a_pool_is_by_block_head_offset() {
        assert_eq!(pool_index(37, 1, 5, (4, 16, 128)), ((2 * 4 + 1) * 16 + 5) * 128 + 5);
    }
}
