//! Samples to RGB rows: chroma is interpolated as `jdsample` does, converted as `jdcolor` and, from CMYK, Pillow do.

use super::{
    super::{limits::Deadline, picture::Picture},
    headers::{Component, Reader},
    idct, problem,
};
use crate::{ModelError, Result};

/// The samples of one component.
struct Plane {
    samples: Vec<u8>,
    /// Samples of a row, also those that do not belong to the picture.
    stride: usize,
    width: usize,
    height: usize,
    /// Pixels of a sample, across and down.
    across: usize,
    down: usize,
}

/// What the components are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Space {
    Grey,
    Rgb,
    YCbCr,
    Cmyk { inverted: bool },
    Ycck { inverted: bool },
}

/// The picture once all scans are decoded.
pub(super) fn picture(reader: &mut Reader<'_>, deadline: Deadline) -> Result<Picture> {
    let space = space(reader)?;
    let ((width, height), most) = (reader.size(), (reader.h_most, reader.v_most));
    let planes = reader.components.iter_mut();
    let planes = planes
        .map(|component| Plane::new(component, most, deadline))
        .collect::<Result<Vec<_>>>()?;
    let mut rows = vec![vec![0; width]; planes.len()];
    let mut sums = Vec::new();
    let mut rgb = vec![0; width * height * 3];
    for y in 0..height {
        for (plane, row) in planes.iter().zip(&mut rows) {
            plane.row(y, row, &mut sums);
        }
        fill_row(&mut rgb[y * width * 3..][..width * 3], &rows, space);
    }
    Ok(Picture { width, height, rgb })
}

/// A row of pixels from a row of each component.
fn fill_row(rgb: &mut [u8], rows: &[Vec<u8>], space: Space) {
    match (space, rows) {
        (Space::Grey, [grey, ..]) => {
            for (pixel, level) in rgb.chunks_exact_mut(3).zip(grey) {
                pixel.fill(*level);
            }
        }
        (Space::Rgb, _) => fill(rgb, rows, |levels, _| levels),
        (Space::YCbCr, _) => fill(rgb, rows, |levels, _| ycc(levels)),
        (Space::Cmyk { inverted }, _) => fill(rgb, rows, |ink, black| cmyk(ink, black, inverted)),
        (Space::Ycck { inverted }, _) => fill(rgb, rows, |levels, black| {
            cmyk(ycc(levels).map(|level| 255 - level), black, inverted)
        }),
        (Space::Grey, []) => {}
    }
}

fn fill(rgb: &mut [u8], rows: &[Vec<u8>], convert: impl Fn([u8; 3], u8) -> [u8; 3]) {
    let [first, second, third, rest @ ..] = rows else {
        return;
    };
    let fourth = rest.first().unwrap_or(first);
    let levels = first.iter().zip(second).zip(third).zip(fourth);
    for (pixel, (((a, b), c), d)) in rgb.chunks_exact_mut(3).zip(levels) {
        pixel.copy_from_slice(&convert([*a, *b, *c], *d));
    }
}

/// As libjpeg guesses it from markers and component ids.
fn space(reader: &Reader<'_>) -> Result<Space> {
    let ids = reader
        .components
        .iter()
        .map(|component| component.id)
        .collect::<Vec<_>>();
    let inverted = reader.adobe.is_some();
    Ok(match (ids.as_slice(), reader.adobe) {
        ([_], _) => Space::Grey,
        ([_, _, _], _) if reader.is_jfif => Space::YCbCr,
        ([_, _, _], Some(0)) | ([b'R', b'G', b'B'], None) => Space::Rgb,
        ([_, _, _], _) => Space::YCbCr,
        ([_, _, _, _], Some(2)) => Space::Ycck { inverted },
        ([_, _, _, _], _) => Space::Cmyk { inverted },
        _ => return Err(problem("it has no frame")),
    })
}

impl Plane {
    fn new(component: &mut Component, most: (usize, usize), deadline: Deadline) -> Result<Self> {
        let quantization = component
            .quantization
            .ok_or_else(|| problem("a component without scan or table"))?;
        let stride = component.columns * 8;
        // They are as large as everything else together, and not needed any more.
        let coefficients = std::mem::take(&mut component.coefficients);
        let mut samples = vec![0; stride * component.rows * 8];
        for (row, blocks) in coefficients.chunks_exact(component.columns * 64).enumerate() {
            deadline.check().map_err(|error| ModelError::Image(error.to_string()))?;
            for (column, block) in blocks.chunks_exact(64).enumerate() {
                let block = idct::samples(block, &quantization);
                for (y, line) in block.chunks_exact(8).enumerate() {
                    samples[(row * 8 + y) * stride + column * 8..][..8].copy_from_slice(line);
                }
            }
        }
        Ok(Self {
            samples,
            stride,
            width: component.width,
            height: component.height,
            across: most.0 / component.h,
            down: most.1 / component.v,
        })
    }

    fn line(&self, y: usize) -> &[u8] {
        &self.samples[y * self.stride..][..self.width]
    }

    /// Row `y` of the picture; `sums` is room to work.
    fn row(&self, y: usize, output: &mut [u8], sums: &mut Vec<i32>) {
        let near = (y / self.down).min(self.height - 1);
        let far = if y.is_multiple_of(2) {
            near.saturating_sub(1)
        } else {
            (near + 1).min(self.height - 1)
        };
        let (near, far) = (self.line(near), self.line(far));
        let vertical = |near: &u8, far: &u8| 3 * i32::from(*near) + i32::from(*far);
        match (self.across, self.down) {
            (1, 1) => output.copy_from_slice(&near[..output.len()]),
            (1, 2) => {
                let bias = if y.is_multiple_of(2) { 1 } else { 2 };
                for (output, (near, far)) in output.iter_mut().zip(near.iter().zip(far)) {
                    *output = ((vertical(near, far) + bias) >> 2) as u8;
                }
            }
            (2, 1) if self.width > 2 => {
                sums.clear();
                sums.extend(near.iter().map(|sample| i32::from(*sample)));
                spread(sums, output, (1, 2), 2);
            }
            (2, 2) if self.width > 2 => {
                sums.clear();
                sums.extend(near.iter().zip(far).map(|(near, far)| vertical(near, far)));
                spread(sums, output, (8, 7), 4);
            }
            (across, _) => {
                for (x, output) in output.iter_mut().enumerate() {
                    *output = near[x / across];
                }
            }
        }
    }
}

/// Two pixels from each value: three quarters of it and one of its neighbour. The biases of the left and the right one
/// differ, so that roundings do not add up.
fn spread(values: &[i32], output: &mut [u8], (left, right): (i32, i32), shift: u32) {
    for (x, output) in output.iter_mut().enumerate() {
        let (at, bias) = (x / 2, if x.is_multiple_of(2) { left } else { right });
        let neighbour = if x.is_multiple_of(2) {
            at.checked_sub(1)
        } else {
            Some(at + 1)
        };
        let neighbour = neighbour.and_then(|at| values.get(at)).unwrap_or(&values[at]);
        *output = ((3 * values[at] + neighbour + bias) >> shift) as u8;
    }
}

fn ycc([y, cb, cr]: [u8; 3]) -> [u8; 3] {
    let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
    let half = 1 << 15;
    let red = y + ((91_881 * cr + half) >> 16);
    let green = y + ((-22_554 * cb - 46_802 * cr + half) >> 16);
    let blue = y + ((116_130 * cb + half) >> 16);
    [red, green, blue].map(|level| level.clamp(0, 255) as u8)
}

/// Adobe writes inks inverted.
fn cmyk(ink: [u8; 3], black: u8, inverted: bool) -> [u8; 3] {
    let level = |value: u8| i32::from(if inverted { 255 - value } else { value });
    let rest = 255 - level(black);
    ink.map(|ink| {
        let product = level(ink) * rest + 128;
        (rest - (((product >> 8) + product) >> 8)).clamp(0, 255) as u8
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chroma_is_interpolated_with_alternating_biases_and_edges_are_kept() {
        let mut output = [0; 6];
        spread(&[10, 20, 31], &mut output, (1, 2), 2);
        assert_eq!(output, [10, 13, 17, 23, 28, 31]);
    }

    #[test]
    fn grey_stays_grey() {
        assert!((0..=255).all(|level| ycc([level, 128, 128]) == [level; 3]));
    }
}
