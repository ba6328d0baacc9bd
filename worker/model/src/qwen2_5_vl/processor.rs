//! Messages and pictures to token ids, positions and patch rows.

use std::path::Path;

use candle_core::Tensor;
use serde_json::Value;

use super::{
    config::Config,
    positions::{Grid, VisualSpan, positions},
};
use crate::{
    ModelError, Result,
    batch::Row,
    chat::{ChatTemplate, Message},
    media::Picture,
    rope::Position,
    tokenizer::{Tokenizer, optional_json},
};

/// Longest side over shortest side that the reference accepts.
const MAX_ASPECT: f64 = 200.0;

/// How pictures become patches.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageProcessor {
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

/// A picture as the vision tower reads it.
#[derive(Clone, Debug, PartialEq)]
pub struct ProcessedImage {
    /// `patches x (channels * frames * side * side)` values, groups of merged patches together.
    pub patches: Vec<f32>,
    /// Patches: time, height, width.
    pub grid: Grid,
}

impl ImageProcessor {
    /// Reads `dir/preprocessor_config.json`; what it leaves out has the defaults of the reference.
    pub fn load(dir: &Path, config: &Config) -> Result<Self> {
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
            patch: config.vision.patch_size,
            merge: config.vision.spatial_merge_size,
            frames: config.vision.temporal_patch_size,
        })
    }

    /// Tokens that a picture of this size becomes.
    pub fn tokens(&self, width: usize, height: usize) -> Result<usize> {
        let factor = self.patch * self.merge;
        let (height, width) = smart_resize(height, width, factor, self.min_pixels, self.max_pixels)?;
        Ok(height / factor * (width / factor))
    }

    /// Resizes, normalizes and cuts a picture; it is repeated along time to fill a patch.
    pub fn process(&self, picture: &Picture) -> Result<ProcessedImage> {
        let factor = self.patch * self.merge;
        let (height, width) = smart_resize(picture.height, picture.width, factor, self.min_pixels, self.max_pixels)?;
        let picture = picture.resize(width, height);
        let grid = [1, height / self.patch, width / self.patch];
        Ok(ProcessedImage {
            patches: self.cut(&picture, grid),
            grid,
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

/// Index of the first placeholder of an image, and how many there are.
pub type ImageSpan = (usize, usize);

/// A conversation ready for the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// Token ids, placeholders expanded.
    pub ids: Vec<u32>,
    /// Position of each token.
    pub positions: Vec<Position>,
    /// Largest position plus one, minus the number of tokens.
    pub rope_delta: i64,
    /// The images in the order of their placeholders.
    pub images: Vec<ProcessedImage>,
    /// Index of the first placeholder of each image, and their number.
    pub image_spans: Vec<ImageSpan>,
}

impl Prompt {
    /// The prompt as a row, with the features of its images in order.
    pub fn row(&self, features: &[Tensor]) -> Result<Row> {
        if features.len() != self.image_spans.len() {
            return Err(ModelError::ImageCount {
                expected: self.image_spans.len(),
                given: features.len(),
            });
        }
        let starts = self.image_spans.iter().map(|(start, _)| *start);
        Ok(Row {
            ids: self.ids.clone(),
            positions: self.positions.clone(),
            features: starts.zip(features.iter().cloned()).collect(),
        })
    }
}

/// Tokenizer, chat template and image processor of one checkpoint.
#[derive(Debug)]
pub struct Processor {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    images: ImageProcessor,
    image_token_id: u32,
    merge: usize,
}

impl Processor {
    /// Reads the processor files of a checkpoint directory.
    pub fn load(dir: &Path) -> Result<Self> {
        let config = Config::load(dir)?;
        Ok(Self {
            tokenizer: Tokenizer::load(dir)?,
            template: ChatTemplate::load(dir)?,
            images: ImageProcessor::load(dir, &config)?,
            image_token_id: config.image_token_id,
            merge: config.vision.spatial_merge_size,
        })
    }

    /// Text to ids and back.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Messages to text.
    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// Pictures to patches.
    pub fn images(&self) -> &ImageProcessor {
        &self.images
    }

    /// Renders the conversation, opens the assistant's turn, and expands each placeholder to the tokens of its picture.
    /// A prompt of more than `max_tokens` is refused before any picture is resized.
    pub fn prepare(&self, messages: &[Message], pictures: &[Picture], max_tokens: usize) -> Result<Prompt> {
        let named = messages.iter().map(|message| message.content.images()).sum::<usize>();
        if named != pictures.len() {
            return Err(ModelError::ImageCount {
                expected: named,
                given: pictures.len(),
            });
        }
        let text = self.template.render(messages, true)?;
        let ids = self.tokenizer.encode(&text)?;
        let sizes = pictures
            .iter()
            .map(|p| self.images.tokens(p.width, p.height))
            .collect::<Result<Vec<_>>>()?;
        let (ids, image_spans) = self.expand(&ids, &sizes)?;
        if ids.len() > max_tokens {
            return Err(ModelError::TooLong {
                tokens: ids.len(),
                limit: max_tokens,
            });
        }
        let images = pictures
            .iter()
            .map(|picture| self.images.process(picture))
            .collect::<Result<Vec<_>>>()?;
        self.lay_out(ids, image_spans, images)
    }

    /// A prompt whose placeholders are expanded already, as [`Self::prepare`] left them: the same ids and images give the
    /// same prompt.
    pub fn arrange(&self, ids: Vec<u32>, images: Vec<ProcessedImage>) -> Result<Prompt> {
        let is_placeholder = |id: &u32| *id == self.image_token_id;
        let (mut spans, mut from) = (Vec::with_capacity(images.len()), 0);
        for (number, image) in images.iter().enumerate() {
            let size = image.grid.iter().product::<usize>() / (self.merge * self.merge);
            let rest = ids.get(from..).unwrap_or_default();
            let start = from + rest.iter().position(is_placeholder).unwrap_or(rest.len());
            let span = ids
                .get(start..start + size)
                .filter(|span| span.iter().all(is_placeholder));
            if span.is_none() {
                let problem = format!("image {number} takes {size} placeholders, which the token ids do not have");
                return Err(ModelError::Template(problem));
            }
            spans.push((start, size));
            from = start + size;
        }
        if ids.get(from..).unwrap_or_default().iter().any(is_placeholder) {
            let problem = format!("the token ids have more placeholders than {} images take", images.len());
            return Err(ModelError::Template(problem));
        }
        self.lay_out(ids, spans, images)
    }

    fn lay_out(&self, ids: Vec<u32>, image_spans: Vec<ImageSpan>, images: Vec<ProcessedImage>) -> Result<Prompt> {
        let spans = image_spans.iter().zip(&images).map(|((start, _), image)| VisualSpan {
            start: *start,
            grid: image.grid,
            time_step: 0.0,
        });
        let positions = positions(ids.len(), &spans.collect::<Vec<_>>(), self.merge)?;
        let end = positions.iter().flatten().max().map_or(0, |p| i64::from(*p) + 1);
        Ok(Prompt {
            rope_delta: end - ids.len() as i64,
            ids,
            positions,
            images,
            image_spans,
        })
    }

    /// Repeats the k-th placeholder `sizes[k]` times; also where each begins. More or fewer placeholders than images
    /// (for example one written in a message's text) are refused.
    fn expand(&self, ids: &[u32], sizes: &[usize]) -> Result<(Vec<u32>, Vec<ImageSpan>)> {
        let given = ids.iter().filter(|id| **id == self.image_token_id).count();
        if given != sizes.len() {
            let problem = format!("{given} image placeholders for {} images", sizes.len());
            return Err(ModelError::Template(problem));
        }
        let mut expanded = Vec::with_capacity(ids.len() + sizes.iter().sum::<usize>());
        let mut spans = Vec::with_capacity(sizes.len());
        for id in ids {
            match sizes.get(spans.len()) {
                Some(size) if *id == self.image_token_id => {
                    spans.push((expanded.len(), *size));
                    expanded.extend(std::iter::repeat_n(*id, *size));
                }
                _ => expanded.push(*id),
            }
        }
        Ok((expanded, spans))
    }
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

    fn processor() -> ImageProcessor {
        ImageProcessor {
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
