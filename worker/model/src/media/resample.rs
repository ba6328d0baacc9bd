//! Bicubic resampling with antialiasing, bit for bit as Pillow before 13 computes it on 8-bit channels.
//!
//! Source: `Resample.c` of Pillow (the algorithm: convolution with a kernel that widens when shrinking, columns first
//! rounded to 8 bits, then rows, in fixed point with 22 fractional bits). Pillow 13 does rows first where that is
//! cheaper, which moves some levels when one side grows and the other shrinks. The models were trained on the former, and
//! their outputs are sensitive to single grey levels.

/// Fractional bits of a kernel weight.
const PRECISION: u32 = 22;
/// Half-width of the kernel at scale one.
const SUPPORT: f64 = 2.0;
/// Colour channels of a pixel.
const CHANNELS: usize = 3;

/// Where the kernel of one output position begins, and its weights.
struct Window {
    first: usize,
    weights: Vec<i32>,
}

/// An RGB picture of `from` (width, height) in the size `to`.
pub fn bicubic(rgb: &[u8], from: (usize, usize), to: (usize, usize)) -> Vec<u8> {
    let mut picture = rgb.to_vec();
    if to.0 != from.0 {
        picture = columns(&picture, from.0, &windows(from.0, to.0));
    }
    if to.1 != from.1 {
        picture = rows(&picture, to.0 * CHANNELS, &windows(from.1, to.1));
    }
    picture
}

/// The kernel `a = -0.5` of Keys.
fn kernel(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

fn windows(input: usize, output: usize) -> Vec<Window> {
    let scale = input as f64 / output as f64;
    let widening = scale.max(1.0);
    let support = SUPPORT * widening;
    let narrowing = 1.0 / widening;
    let window = |at: usize| {
        let center = (at as f64 + 0.5) * scale;
        let first = (center - support + 0.5).max(0.0) as usize;
        let end = ((center + support + 0.5) as usize).min(input);
        let weights = (first..end)
            .map(|x| kernel((x as f64 - center + 0.5) * narrowing))
            .collect::<Vec<_>>();
        let total = weights.iter().sum::<f64>();
        let fixed = |weight: &f64| (weight / total * f64::from(1u32 << PRECISION)).round() as i32;
        Window {
            first,
            weights: weights.iter().map(fixed).collect(),
        }
    };
    (0..output).map(window).collect()
}

/// A weighted sum in fixed point as a grey level.
fn level(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

/// Half of the last bit that is dropped: sums start with it to be rounded.
const HALF: i32 = 1 << (PRECISION - 1);

fn columns(picture: &[u8], width: usize, windows: &[Window]) -> Vec<u8> {
    let mut output = Vec::with_capacity(picture.len() / width * windows.len());
    for row in picture.chunks_exact(width * CHANNELS) {
        for window in windows {
            let mut sums = [HALF; CHANNELS];
            for (pixel, weight) in row[window.first * CHANNELS..]
                .chunks_exact(CHANNELS)
                .zip(&window.weights)
            {
                for (sum, value) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(*value) * weight;
                }
            }
            output.extend(sums.map(level));
        }
    }
    output
}

fn rows(picture: &[u8], stride: usize, windows: &[Window]) -> Vec<u8> {
    let mut output = Vec::with_capacity(stride * windows.len());
    let mut sums = vec![HALF; stride];
    for window in windows {
        sums.fill(HALF);
        for (row, weight) in picture[window.first * stride..]
            .chunks_exact(stride)
            .zip(&window.weights)
        {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += i32::from(*value) * weight;
            }
        }
        output.extend(sums.iter().map(|sum| level(*sum)));
    }
    output
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_flat_picture_stays_flat(level: u8, from in (1usize..40, 1usize..40), to in (1usize..40, 1usize..40)) {
            let resized = bicubic(&vec![level; from.0 * from.1 * 3], from, to);
            prop_assert_eq!(resized, vec![level; to.0 * to.1 * 3]);
        }
    }

    #[test]
    fn an_edge_overshoots_and_is_clamped() {
        let row = [0, 0, 0, 255, 255, 255].map(|v| [v; 3]).concat();
        let wide = bicubic(&row, (6, 1), (24, 1));
        assert_eq!((wide.iter().min(), wide.iter().max()), (Some(&0), Some(&255)));
    }
}
