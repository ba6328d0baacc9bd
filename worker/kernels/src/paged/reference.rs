//! What the kernels compute.

use super::Decode;

/// Outputs `[rows, heads, head_dim]` and logarithms of the sums of exponentials `[rows, heads]`, by [`Decode`]'s shapes:
/// `q` `[rows, heads, head_dim]`; `keys` and `values` `[blocks, kv_heads, block_size, head_dim]`; `tables` `[rows,
/// max_blocks]`; `lengths` `[rows]`; each group a first row, a number of rows and a number of tokens, which all of these rows
/// read by the table of the first one.
pub fn attend(
    decode: &Decode,
    q: &[f32],
    (keys, values): (&[f32], &[f32]),
    tables: &[u32],
    lengths: &[i32],
    groups: &[[i32; 3]],
) -> (Vec<f32>, Vec<f32>) {
    let Decode {
        rows, heads, head_dim, ..
    } = *decode;
    let mut out = vec![0.0; rows * heads * head_dim];
    let mut lse = vec![f32::NEG_INFINITY; rows * heads];
    for (row, length) in lengths.iter().enumerate().take(rows) {
        let length = usize::try_from(*length).unwrap_or(0);
        if length == 0 {
            continue;
        }
        for head in 0..heads {
            let at = row * heads + head;
            let query = &q[at * head_dim..][..head_dim];
            let places = (0..length)
                .map(|token| place(decode, tables, groups, row, head / decode.heads_per_kv(), token))
                .collect::<Vec<_>>();
            let scores = places
                .iter()
                .map(|place| dot(query, &keys[*place..][..head_dim]) * f64::from(decode.scale))
                .collect::<Vec<_>>();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum = scores.iter().map(|score| (score - most).exp()).sum::<f64>();
            let mut mean = vec![0f64; head_dim];
            for (place, score) in places.iter().zip(&scores) {
                let weight = (score - most).exp() / sum;
                for (mean, value) in mean.iter_mut().zip(&values[*place..][..head_dim]) {
                    *mean += weight * f64::from(*value);
                }
            }
            for (out, mean) in out[at * head_dim..][..head_dim].iter_mut().zip(mean) {
                *out = mean as f32;
            }
            lse[at] = (most + sum.ln()) as f32;
        }
    }
    (out, lse)
}

/// Where a token's key and value begin in the pool.
fn place(decode: &Decode, tables: &[u32], groups: &[[i32; 3]], row: usize, kv_head: usize, token: usize) -> usize {
    let group = groups.iter().find(|group| {
        let first = usize::try_from(group[0]).unwrap_or(usize::MAX);
        let count = usize::try_from(group[1]).unwrap_or(0);
        row >= first && row - first < count && token < usize::try_from(group[2]).unwrap_or(0)
    });
    let reader = group.map_or(row, |group| usize::try_from(group[0]).unwrap_or(row));
    let block = tables[reader * decode.max_blocks + token / decode.block_size] as usize;
    ((block * decode.kv_heads + kv_head) * decode.block_size + token % decode.block_size) * decode.head_dim
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DECODE: Decode = Decode {
        rows: 3,
        heads: 2,
        kv_heads: 1,
        head_dim: 8,
        block_size: 8,
        max_blocks: 2,
        groups: 1,
        scale: 0.5,
    };

    fn ramp(length: usize) -> Vec<f32> {
        (0..length).map(|at| ((at * 7919) % 101) as f32 / 50.0 - 1.0).collect()
    }

    #[test]
    fn it_is_a_softmax_over_the_tokens_that_the_table_names() {
        let (q, keys, values) = (ramp(3 * 2 * 8), ramp(4 * 64), ramp(4 * 64 + 5)[5..].to_vec());
        let tables = [3, 1, 0, u32::MAX, u32::MAX, u32::MAX];
        let (out, lse) = attend(&DECODE, &q, (&keys, &values), &tables, &[11, 1, 0], &[]);
        for head in 0..2 {
            let query = &q[head * 8..][..8];
            // The slots of row 0: eight of block 3, three of block 1.
            let slots = (24..32).chain(8..11).collect::<Vec<usize>>();
            let weights = slots
                .iter()
                .map(|slot| {
                    let score: f32 = query.iter().zip(&keys[slot * 8..]).map(|(a, b)| a * b).sum();
                    (0.5 * score).exp()
                })
                .collect::<Vec<_>>();
            let sum: f32 = weights.iter().sum();
            for dim in 0..8 {
                let weighted = slots.iter().zip(&weights).map(|(slot, w)| w * values[slot * 8 + dim]);
                assert!((out[head * 8 + dim] - weighted.sum::<f32>() / sum).abs() < 1e-5);
            }
            assert!((lse[head] - sum.ln()).abs() < 1e-5);
            // Of a single token, the value itself.
            assert_eq!(out[(2 + head) * 8..][..8], values[..8]);
        }
        assert!(out[4 * 8..].iter().all(|number| *number == 0.0));
        assert!(lse[4..].iter().all(|number| *number == f32::NEG_INFINITY));
    }

    #[test]
    fn a_group_reads_its_prefix_by_the_table_of_its_first_row() {
        let (q, keys, values) = (ramp(3 * 2 * 8), ramp(5 * 64), ramp(5 * 64 + 5)[5..].to_vec());
        let whole = attend(&DECODE, &q, (&keys, &values), &[2, 1, 2, 4, 2, 0], &[12, 9, 16], &[]);
        let missing = [2, 1, u32::MAX, 4, u32::MAX, 0];
        let shared = attend(&DECODE, &q, (&keys, &values), &missing, &[12, 9, 16], &[[0, 3, 8]]);
        assert_eq!(whole, shared);
    }
}
