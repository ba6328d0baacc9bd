//! Bicubic resampling with antialiasing, bit for bit as the reference computes it on 8-bit channels.
//!
//! Both of its implementations convolve with a kernel that widens when shrinking: columns first, rounded to 8 bits, then
//! rows, in fixed point. They differ in the precision of the weights, which moves some levels by one, and the models are
//! sensitive to single levels.
//!
//! Sources: `Resample.c` of Pillow before 13 (Pillow 13 does rows first where that is cheaper, which moves some levels
//! when one side grows and the other shrinks); `UpSampleKernel.cpp` of PyTorch.

use super::picture::Picture;

/// Which implementation of the reference is followed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Resampler {
    /// Pictures: Pillow, weights of 22 fractional bits.
    #[default]
    Pillow,
    /// Frames of videos: torchvision on bytes, weights of as many fractional bits as 16-bit integers hold.
    Torchvision,
}

/// Fractional bits of a weight in Pillow, and the most that PyTorch tries.
const PRECISION: u32 = 22;
/// Half-width of the kernel at scale one.
const SUPPORT: f64 = 2.0;
/// Colour channels of a pixel.
const CHANNELS: usize = 3;

/// A picture's place among pixels of one colour.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Canvas {
    /// Pixels of a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Column of the picture's first pixel.
    pub left: usize,
    /// Row of the picture's first pixel.
    pub top: usize,
    /// The colour around the picture.
    pub fill: [u8; 3],
}

impl Canvas {
    /// A canvas of (rows, columns) with the picture, which must fit, in its middle; an odd pixel is left below and at the
    /// right.
    pub fn around(picture: &Picture, (rows, columns): (usize, usize), fill: [u8; 3]) -> Self {
        Self {
            width: columns,
            height: rows,
            left: columns.saturating_sub(picture.width) / 2,
            top: rows.saturating_sub(picture.height) / 2,
            fill,
        }
    }
}

/// Where the kernel of one output position begins, and its weights.
struct Window<T> {
    first: usize,
    weights: Vec<T>,
}

/// The kernels of all output positions of one axis, and the fractional bits of their weights.
struct Axis {
    windows: Vec<Window<i32>>,
    precision: u32,
}

impl Resampler {
    /// An RGB picture of `from` (width, height) in the size `to`.
    pub fn resize(self, rgb: &[u8], from: (usize, usize), to: (usize, usize)) -> Vec<u8> {
        if from == to {
            return rgb.to_vec();
        }
        if to.0 == from.0 {
            return rows(rgb, to.0 * CHANNELS, &self.axis(from.1, to.1));
        }
        let wide = columns(rgb, from.0, &self.axis(from.0, to.0));
        if to.1 == from.1 {
            return wide;
        }
        rows(&wide, to.0 * CHANNELS, &self.axis(from.1, to.1))
    }

    /// A picture of `from` (width, height) on a canvas, and that in the size `to`. The canvas, which may be two hundred
    /// times as large as the picture, is not made.
    pub fn resize_on_canvas(self, rgb: &[u8], from: (usize, usize), canvas: Canvas, to: (usize, usize)) -> Vec<u8> {
        let axis = self.axis(canvas.width, to.0);
        let narrow = |row: &[u8]| {
            if to.0 == canvas.width {
                row.to_vec()
            } else {
                columns(row, canvas.width, &axis)
            }
        };
        let mut row = canvas.fill.repeat(canvas.width);
        let empty = narrow(&row);
        let mut narrowed = Vec::with_capacity(empty.len() * canvas.height);
        for y in 0..canvas.height {
            let pixels = y
                .checked_sub(canvas.top)
                .and_then(|y| rgb.chunks_exact(from.0 * CHANNELS).nth(y));
            match pixels {
                Some(pixels) => {
                    row[canvas.left * CHANNELS..][..pixels.len()].copy_from_slice(pixels);
                    narrowed.extend(narrow(&row));
                }
                None => narrowed.extend(&empty),
            }
        }
        if to.1 == canvas.height {
            return narrowed;
        }
        rows(&narrowed, to.0 * CHANNELS, &self.axis(canvas.height, to.1))
    }

    fn axis(self, input: usize, output: usize) -> Axis {
        let windows = windows(input, output);
        let precision = match self {
            Self::Pillow => PRECISION,
            Self::Torchvision => {
                let largest = windows
                    .iter()
                    .flat_map(|window| &window.weights)
                    .fold(0.0, |a: f64, b| a.max(*b));
                let fits = |bits: &u32| largest * f64::from(1u32 << (bits + 1)) + 0.5 < f64::from(1u32 << 15);
                (0..PRECISION).find(|bits| !fits(bits)).unwrap_or(PRECISION)
            }
        };
        let fixed = |weight: &f64| (weight * f64::from(1u32 << precision)).round() as i32;
        let fix = |window: Window<f64>| Window {
            first: window.first,
            weights: window.weights.iter().map(fixed).collect(),
        };
        Axis {
            windows: windows.into_iter().map(fix).collect(),
            precision,
        }
    }
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

fn windows(input: usize, output: usize) -> Vec<Window<f64>> {
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
        Window {
            first,
            weights: weights.iter().map(|weight| weight / total).collect(),
        }
    };
    (0..output).map(window).collect()
}

/// A weighted sum in fixed point, which began with half of its last kept bit, as a grey level.
fn level(sum: i32, precision: u32) -> u8 {
    (sum >> precision).clamp(0, 255) as u8
}

fn columns(picture: &[u8], width: usize, axis: &Axis) -> Vec<u8> {
    let mut output = Vec::with_capacity(picture.len() / width * axis.windows.len());
    let half = 1 << (axis.precision - 1);
    for row in picture.chunks_exact(width * CHANNELS) {
        for window in &axis.windows {
            let mut sums = [half; CHANNELS];
            for (pixel, weight) in row[window.first * CHANNELS..]
                .chunks_exact(CHANNELS)
                .zip(&window.weights)
            {
                for (sum, value) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(*value) * weight;
                }
            }
            output.extend(sums.map(|sum| level(sum, axis.precision)));
        }
    }
    output
}

fn rows(picture: &[u8], stride: usize, axis: &Axis) -> Vec<u8> {
    let mut output = Vec::with_capacity(stride * axis.windows.len());
    let mut sums = vec![0; stride];
    for window in &axis.windows {
        sums.fill(1 << (axis.precision - 1));
        for (row, weight) in picture[window.first * stride..]
            .chunks_exact(stride)
            .zip(&window.weights)
        {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += i32::from(*value) * weight;
            }
        }
        output.extend(sums.iter().map(|sum| level(*sum, axis.precision)));
    }
    output
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOTH: [Resampler; 2] = [Resampler::Pillow, Resampler::Torchvision];

    proptest! {
        #[test]
        fn a_flat_picture_stays_flat(level: u8, from in (1usize..40, 1usize..40), to in (1usize..40, 1usize..40)) {
            for resampler in BOTH {
                let resized = resampler.resize(&vec![level; from.0 * from.1 * 3], from, to);
                let expected = vec![level; to.0 * to.1 * 3];
                prop_assert!(resized.iter().zip(&expected).all(|(a, b)| a.abs_diff(*b) <= 1));
                prop_assert_eq!(resized.len(), expected.len());
            }
        }
    }

    proptest! {
        #[test]
        fn a_canvas_need_not_be_made(
            from in (1usize..20, 1usize..20),
            more in (0usize..20, 0usize..20),
            to in (1usize..30, 1usize..30),
        ) {
            let rgb = (0..from.0 * from.1 * 3).map(|i| (i * 37 % 251) as u8).collect::<Vec<_>>();
            let picture = Picture { width: from.0, height: from.1, rgb };
            let size = (from.1 + more.1, from.0 + more.0);
            let canvas = Canvas::around(&picture, size, [9, 99, 199]);
            let mut made = canvas.fill.repeat(size.0 * size.1);
            for (y, row) in picture.rgb.chunks_exact(from.0 * 3).enumerate() {
                made[((canvas.top + y) * size.1 + canvas.left) * 3..][..row.len()].copy_from_slice(row);
            }
            let expected = Resampler::Pillow.resize(&made, (size.1, size.0), to);
            prop_assert_eq!(Resampler::Pillow.resize_on_canvas(&picture.rgb, from, canvas, to), expected);
        }
    }

    #[test]
    fn an_edge_overshoots_and_is_clamped() {
        let row = [0, 0, 0, 255, 255, 255].map(|v| [v; 3]).concat();
        for resampler in BOTH {
            let wide = resampler.resize(&row, (6, 1), (24, 1));
            assert_eq!((wide.iter().min(), wide.iter().max()), (Some(&0), Some(&255)));
        }
    }
}
