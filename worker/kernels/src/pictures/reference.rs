//! Squares cut and rows mixed in plain Rust.

use super::{Squares, TAPS};

/// Patches of squares, each a row of `width` numbers with zeros behind the patch's own.
pub fn patches(squares: Squares, pixels: &[f32], width: usize) -> Vec<f32> {
    let Squares {
        channels, side, patch, ..
    } = squares;
    let grid = squares.grid();
    let mut rows = Vec::with_capacity(squares.patches() * width);
    for square in pixels.chunks_exact(channels * side * side) {
        for (down, across) in (0..grid).flat_map(|down| (0..grid).map(move |across| (down, across))) {
            for channel in 0..channels {
                for y in down * patch..(down + 1) * patch {
                    let start = (channel * side + y) * side + across * patch;
                    rows.extend_from_slice(&square[start..start + patch]);
                }
            }
            rows.resize(rows.len() + width - squares.patch_values(), 0.0);
        }
    }
    rows
}

/// `Σ weights[i][t] * from[at[i][t]]` for each row `i`, over the indices that `from` has.
pub fn mix_rows(from: &[f32], width: usize, at: &[i32], weights: &[f32]) -> Vec<f32> {
    let rows = from.len() / width;
    let mut out = Vec::with_capacity(at.len() / TAPS * width);
    for (at, weights) in at.chunks_exact(TAPS).zip(weights.chunks_exact(TAPS)) {
        let taps = at.iter().zip(weights).filter_map(|(at, weight)| {
            let row = usize::try_from(*at).ok().filter(|row| *row < rows)?;
            Some((row * width, f64::from(*weight)))
        });
        let taps = taps.collect::<Vec<_>>();
        let number = |column: usize| {
            let parts = taps
                .iter()
                .map(|(start, weight)| weight * f64::from(from[start + column]));
            parts.sum::<f64>() as f32
        };
        out.extend((0..width).map(number));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_are_rows_of_pixels_channel_after_channel() {
        let squares = Squares {
            count: 1,
            channels: 2,
            side: 5,
            patch: 2,
        };
        // Channel, row and column as digits.
        let pixels = (0..2).flat_map(|channel| (0..25).map(move |at| (100 * channel + at / 5 * 10 + at % 5) as f32));
        let rows = patches(squares, &pixels.collect::<Vec<_>>(), 10);
        assert_eq!((squares.patches(), rows.len()), (4, 40));
        assert_eq!(rows[..10], [0.0, 1.0, 10.0, 11.0, 100.0, 101.0, 110.0, 111.0, 0.0, 0.0]);
        assert_eq!(rows[30..38], [22.0, 23.0, 32.0, 33.0, 122.0, 123.0, 132.0, 133.0]);
    }

    #[test]
    fn rows_are_mixed_by_weight_and_missing_ones_add_nothing() {
        let from = [1.0, 2.0, 10.0, 20.0, 100.0, 200.0];
        let at = [2, -1, -1, -1, 0, 1, 2, 3, -1, 7, i32::MAX, i32::MIN];
        let weights = [1.0, 9.0, 9.0, 9.0, 0.5, 0.25, 0.25, 9.0, 1.0, 1.0, 1.0, 1.0];
        let out = mix_rows(&from, 2, &at, &weights);
        assert_eq!(out, [100.0, 200.0, 28.0, 56.0, 0.0, 0.0]);
    }
}
