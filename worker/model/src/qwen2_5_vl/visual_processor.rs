//! Pictures to patches.

use std::path::Path;

use serde_json::Value;

use super::VisionConfig;
use crate::{
    ModelError, Result,
    media::{Medium, MediumSize, Picture},
    tokenizer::optional_json,
    visual::{Grid, Layout, Visual, VisualProcessor},
};

/// Longest side over shortest side that the reference accepts.
const MAX_ASPECT: f64 = 200.0;

/// How pictures become patches.
#[derive(Clone, Debug, PartialEq)]
pub struct PatchProcessor {
    /// Fewest pixels after resizing.
    pub min_pixels: usize,
    /// Most pixels after resizing.
    pub max_pixels: usize,
    /// Subtracted from each channel (of values 0 to 1).
    pub mean: [f32; 3],
    /// Divides each channel after that.
    pub std: [f32; 3],
    patch: usize,
    merge: usize,
    frames: usize,
}

impl PatchProcessor {
    /// Reads `dir/preprocessor_config.json`; what it leaves out has the defaults of the reference.
    pub fn load(dir: &Path, config: &VisionConfig) -> Result<Self> {
        let json = optional_json(&dir.join("preprocessor_config.json"))?.unwrap_or(Value::Null);
        let pixels = |key: &str, side: &str| {
            let size = json.get("size").and_then(|size| size.get(side));
            json.get(key)
                .filter(|v| !v.is_null())
                .or(size)
                .and_then(Value::as_u64)
                .map(|n| n as usize)
        };
        let channels = |key: &str, default: [f32; 3]| match json.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => serde_json::from_value::<[f32; 3]>(value.clone())
                .map_err(|error| ModelError::Config(format!("preprocessor_config.json: {key}: {error}"))),
        };
        Ok(Self {
            min_pixels: pixels("min_pixels", "shortest_edge").unwrap_or(56 * 56),
            max_pixels: pixels("max_pixels", "longest_edge").unwrap_or(28 * 28 * 1280),
            mean: channels("image_mean", [0.481_454_66, 0.457_827_5, 0.408_210_73])?,
            std: channels("image_std", [0.268_629_54, 0.261_302_6, 0.275_777_1])?,
            patch: config.patch_size,
            merge: config.spatial_merge_size,
            frames: config.temporal_patch_size,
        })
    }

    /// Tokens that a picture of this size becomes.
    pub fn tokens(&self, width: usize, height: usize) -> Result<usize> {
        let factor = self.patch * self.merge;
        let (height, width) = smart_resize(height, width, factor, self.min_pixels, self.max_pixels)?;
        Ok(height / factor * (width / factor))
    }

    /// Resizes, normalizes and cuts a picture; it is repeated along time to fill a patch.
    pub fn process(&self, picture: &Picture) -> Result<Visual> {
        let factor = self.patch * self.merge;
        let (height, width) = smart_resize(picture.height, picture.width, factor, self.min_pixels, self.max_pixels)?;
        let picture = picture.resize(width, height);
        let grid = [1, height / self.patch, width / self.patch];
        Ok(Visual {
            values: self.cut(&picture, grid),
            layout: Layout::Patches {
                grid,
                time_step: 0.0,
                video: false,
            },
        })
    }

    /// Rows in the order (row group, column group, row, column), each of channel, frame, y, x.
    fn cut(&self, picture: &Picture, [_, rows, columns]: Grid) -> Vec<f32> {
        let (side, width) = (self.patch, picture.width);
        let mut patches = Vec::with_capacity(rows * columns * 3 * self.frames * side * side);
        for (row, column) in super::window::patch_coordinates(rows, columns, self.merge) {
            for channel in 0..3 {
                let (mean, std) = (self.mean[channel], self.std[channel]);
                let start = patches.len();
                for y in row * side..(row + 1) * side {
                    let pixels =
                        (column * side..(column + 1) * side).map(|x| picture.rgb[(y * width + x) * 3 + channel]);
                    patches.extend(pixels.map(|value| (f32::from(value) / 255.0 - mean) / std));
                }
                for _ in 1..self.frames {
                    patches.extend_from_within(start..start + side * side);
                }
            }
        }
        patches
    }
}

impl VisualProcessor for PatchProcessor {
    fn plan(&self, sizes: &[MediumSize]) -> Result<Vec<Layout>> {
        sizes
            .iter()
            .map(|size| match *size {
                MediumSize::Picture { width, height } => {
                    let factor = self.patch * self.merge;
                    let (height, width) = smart_resize(height, width, factor, self.min_pixels, self.max_pixels)?;
                    Ok(Layout::Patches {
                        grid: [1, height / self.patch, width / self.patch],
                        time_step: 0.0,
                        video: false,
                    })
                }
                MediumSize::Video { .. } => Err(ModelError::Image("interim".into())),
            })
            .collect()
    }
    fn process(&self, media: &[Medium]) -> Result<Vec<Visual>> {
        media
            .iter()
            .map(|m| match m {
                Medium::Picture(p) => Self::process(self, p),
                Medium::Video(_) => Err(ModelError::Image("interim".into())),
            })
            .collect()
    }
    fn tokens(&self, layout: &Layout) -> usize {
        match layout {
            Layout::Patches { grid, .. } => grid.iter().product::<usize>() / (self.merge * self.merge),
            _ => 0,
        }
    }
}

/// Height and width, both multiples of `factor`, near the given ones and within the pixel bounds.
///
/// Source: `smart_resize` of the reference; halves round to even, as Python's `round` does.
pub fn smart_resize(height: usize, width: usize, factor: usize, min: usize, max: usize) -> Result<(usize, usize)> {
    let (h, w, f) = (height as f64, width as f64, factor as f64);
    if height == 0 || width == 0 || h.max(w) / h.min(w) > MAX_ASPECT {
        return Err(ModelError::Image(format!(
            "{width}x{height} pixels: the aspect ratio exceeds {MAX_ASPECT}"
        )));
    }
    let round = |side: f64| (side / f).round_ties_even() * f;
    let (mut new_h, mut new_w) = (round(h), round(w));
    if new_h * new_w > max as f64 {
        let beta = (h * w / max as f64).sqrt();
        let shrink = |side: f64| ((side / beta / f).floor() * f).max(f);
        (new_h, new_w) = (shrink(h), shrink(w));
    } else if new_h * new_w < min as f64 {
        let beta = (min as f64 / (h * w)).sqrt();
        let grow = |side: f64| (side * beta / f).ceil() * f;
        (new_h, new_w) = (grow(h), grow(w));
    }
    Ok((new_h as usize, new_w as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resized_sides_are_those_of_the_reference() {
        let bounds = [(3136, 12_845_056), (224 * 224, 1280 * 784), (262_144, 4_194_304)];
        let cases = [
            ((480, 640), [(476, 644); 3]),
            ((28, 28), [(56, 56), (224, 224), (532, 532)]),
            ((1080, 1920), [(1092, 1932), (728, 1316), (1092, 1932)]),
            ((100, 3000), [(112, 2996); 3]),
            ((1000, 1000), [(1008, 1008), (980, 980), (1008, 1008)]),
            ((37, 53), [(56, 84), (196, 280), (448, 616)]),
            ((4032, 3024), [(4032, 3024), (1148, 840), (2352, 1764)]),
        ];
        for ((height, width), expected) in cases {
            for ((min, max), expected) in bounds.iter().zip(expected) {
                assert_eq!(
                    smart_resize(height, width, 28, *min, *max).unwrap(),
                    expected,
                    "{height}x{width}"
                );
            }
        }
    }

    #[test]
    fn a_half_rounds_to_the_even_multiple() {
        assert_eq!(smart_resize(70, 98, 28, 1, 1 << 20).unwrap(), (56, 112));
    }

    #[test]
    fn a_strip_is_refused() {
        assert!(
            smart_resize(1, 201, 28, 3136, 1 << 20)
                .unwrap_err()
                .to_string()
                .contains("aspect ratio")
        );
    }

    fn processor() -> PatchProcessor {
        PatchProcessor {
            min_pixels: 3136,
            max_pixels: 12_845_056,
            mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
            patch: 14,
            merge: 2,
            frames: 2,
        }
    }

    #[test]
    fn pixels_of_a_gradient_are_those_of_the_reference() {
        let rgb = (0..50).flat_map(|y| (0..70).flat_map(move |x| [1, 2, 3].map(|k| ((y + x) * k % 256) as u8)));
        let picture = Picture {
            width: 70,
            height: 50,
            rgb: rgb.collect(),
        };
        let image = processor().process(&picture).unwrap();
        assert_eq!((image.grid, image.patches.len()), ([1, 4, 4], 16 * 1176));
        let count = image.patches.len() as f64;
        let mean = image.patches.iter().map(|v| f64::from(*v)).sum::<f64>() / count;
        let variance = image
            .patches
            .iter()
            .map(|v| (f64::from(*v) - mean).powi(2))
            .sum::<f64>()
            / (count - 1.0);
        assert!((mean + 0.153_079_4).abs() < 1e-4, "{mean}");
        assert!((variance.sqrt() - 0.946_957_6).abs() < 1e-4, "{}", variance.sqrt());
        let first = [-1.792_262_5, -1.777_664_1, -1.748_467_2, -1.733_868_8];
        let last = [-0.200_413_8, -0.143_533_5, -0.086_653_3];
        for (got, want) in image
            .patches
            .iter()
            .zip(first)
            .chain(image.patches[16 * 1176 - 3..].iter().zip(last))
        {
            assert!((got - want).abs() < 1e-5, "{got} {want}");
        }
    }

    #[test]
    fn both_frames_of_a_picture_are_equal() {
        let picture = Picture {
            width: 56,
            height: 56,
            rgb: (0..56 * 56 * 3).map(|i| (i % 251) as u8).collect(),
        };
        let image = processor().process(&picture).unwrap();
        let row = &image.patches[..1176];
        assert!((0..3).all(|c| row[c * 392..c * 392 + 196] == row[c * 392 + 196..(c + 1) * 392]));
    }
}
