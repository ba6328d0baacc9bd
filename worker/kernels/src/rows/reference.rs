//! Rows moved, summed and filled in plain Rust.

use super::Groups;

/// `out[i] = from[at[i]]`; zeros where there is no such row.
pub fn gather_rows<T: Copy + Default>(from: &[T], at: &[i32], width: usize) -> Vec<T> {
    let row = |at: &i32| match usize::try_from(*at) {
        Ok(at) if (at + 1) * width <= from.len() => from[at * width..(at + 1) * width].to_vec(),
        _ => vec![T::default(); width],
    };
    at.iter().flat_map(row).collect()
}

/// `out[at[i]] = features[i]`, where there is such a row.
pub fn place<T: Copy>(features: &[T], at: &[i32], out: &mut [T], width: usize) {
    for (feature, at) in features.chunks_exact(width).zip(at) {
        if let Ok(at) = usize::try_from(*at)
            && (at + 1) * width <= out.len()
        {
            out[at * width..(at + 1) * width].copy_from_slice(feature);
        }
    }
}

/// `dtable[id] += Σ dy[token]`.
pub fn embedding_gradient(groups: &Groups, dy: &[f32], dtable: &mut [f32], width: usize) {
    for (id, span) in groups.ids.iter().zip(groups.starts.windows(2)) {
        let tokens = &groups.order[span[0] as usize..span[1] as usize];
        for column in 0..width {
            let sum = tokens
                .iter()
                .map(|token| f64::from(dy[*token as usize * width + column]));
            dtable[*id as usize * width + column] += sum.sum::<f64>() as f32;
        }
    }
}

/// Sums of columns.
pub fn column_sums(x: &[f32], width: usize) -> Vec<f32> {
    let column = |column: usize| x.iter().skip(column).step_by(width).map(|x| f64::from(*x)).sum::<f64>() as f32;
    (0..width).map(column).collect()
}

/// Four numbers of Philox 4x32-10.
pub fn philox(counter: u64, stream: u64, seed: u64) -> [u32; 4] {
    let halves = |x: u64| [(x & 0xffff_ffff) as u32, (x >> 32) as u32];
    let ([mut c0, mut c1], [mut c2, mut c3]) = (halves(counter), halves(stream));
    let [mut k0, mut k1] = halves(seed);
    for _ in 0..10 {
        let [l0, h0] = halves(0xD251_1F53 * u64::from(c0));
        let [l1, h1] = halves(0xCD9E_8D57 * u64::from(c2));
        (c0, c1, c2, c3) = (h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

/// Number `index` of a seed, of a normal distribution with deviation 1.
pub fn normal(index: u64, seed: u64) -> f32 {
    let bits = philox(index / 4, 0, seed);
    let pair = if index % 4 < 2 { 0 } else { 2 };
    let radius = (-2.0 * (f64::from((bits[pair] >> 8) + 1) / f64::from(1 << 24)).ln()).sqrt();
    let angle = std::f64::consts::TAU * f64::from(bits[pair + 1] >> 8) / f64::from(1 << 24);
    let of_pair = if index.is_multiple_of(2) {
        angle.cos()
    } else {
        angle.sin()
    };
    (radius * of_pair) as f32
}

/// Number `index` of a seed, from 0 to 1.
pub fn uniform(index: u64, seed: u64) -> f32 {
    (philox(index / 4, 0, seed)[(index % 4) as usize] >> 8) as f32 / (1 << 24) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_is_that_of_its_authors() {
        // Of the known answers in Random123.
        assert_eq!(philox(0, 0, 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox(u64::MAX, u64::MAX, u64::MAX),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
    }

    #[test]
    fn normal_numbers_have_mean_0_and_deviation_1() {
        let numbers = (0..20_000).map(|index| f64::from(normal(index, 3))).collect::<Vec<_>>();
        let mean = numbers.iter().sum::<f64>() / 2e4;
        let variance = numbers.iter().map(|x| x * x).sum::<f64>() / 2e4;
        let fourth = numbers.iter().map(|x| x.powi(4)).sum::<f64>() / 2e4;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.05 && (fourth - 3.0).abs() < 0.4);
        let neighbours = numbers.windows(2).map(|pair| pair[0] * pair[1]).sum::<f64>() / 2e4;
        assert!(neighbours.abs() < 0.03);
    }

    #[test]
    fn uniform_numbers_fill_the_interval() {
        let numbers = (0..20_000).map(|index| uniform(index, 3)).collect::<Vec<_>>();
        assert!(numbers.iter().all(|x| (0.0..1.0).contains(x)));
        for tenth in 0..10 {
            let low = tenth as f32 / 10.0;
            let inside = numbers.iter().filter(|x| (low..low + 0.1).contains(*x)).count();
            assert!((1800..2200).contains(&inside), "{inside}");
        }
    }

    #[test]
    fn what_was_gathered_is_placed_back() {
        let from = (0..12).collect::<Vec<_>>();
        let rows = gather_rows(&from, &[3, -1, 0, 9], 3);
        assert_eq!(rows, [9, 10, 11, 0, 0, 0, 0, 1, 2, 0, 0, 0]);
        let mut out = [0; 12];
        place(&rows, &[3, -1, 0, 9], &mut out, 3);
        assert_eq!(out, [0, 1, 2, 0, 0, 0, 0, 0, 0, 9, 10, 11]);
    }

    #[test]
    fn the_gradient_of_an_id_is_the_sum_of_its_tokens() {
        let groups = Groups::of(&[1, 0, 1], |_| true);
        let mut dtable = [1.0; 4];
        embedding_gradient(&groups, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &mut dtable, 2);
        assert_eq!(dtable, [4.0, 5.0, 7.0, 9.0]);
        assert_eq!(column_sums(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2), [9.0, 12.0]);
    }
}
