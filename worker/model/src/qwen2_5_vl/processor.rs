//! Messages and pictures to token ids, positions and patch rows.

use std::path::Path;

use candle_core::Tensor;

pub use super::visual_processor::{FrameBudget, QwenVisualProcessor, TimeStep, smart_resize};

use super::{
    config::Config,
    positions::{Grid, VisualSpan, positions},
};
use crate::{
    ModelError, Result,
    batch::Row,
    chat::{ChatTemplate, Message},
    media::{Medium, MediumSize, Picture},
    rope::Position,
    tokenizer::Tokenizer,
    visual::{Layout, VisualProcessor},
};

/// Pictures to patches, one at a time.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageProcessor(QwenVisualProcessor);

/// A picture as the vision tower reads it.
#[derive(Clone, Debug, PartialEq)]
pub struct ProcessedImage {
    /// `patches x (channels * frames * side * side)` values, groups of merged patches together.
    pub patches: Vec<f32>,
    /// Patches: time, height, width.
    pub grid: Grid,
}

impl ImageProcessor {
    /// Reads the preprocessor files of a checkpoint directory.
    pub fn load(dir: &Path, config: &Config) -> Result<Self> {
        Ok(Self(QwenVisualProcessor::load(dir, config)?))
    }

    /// Tokens that a picture of this size becomes.
    pub fn tokens(&self, width: usize, height: usize) -> Result<usize> {
        let layouts = self.0.plan(&[MediumSize::Picture { width, height }])?;
        Ok(layouts.iter().map(|layout| self.0.tokens(layout)).sum())
    }

    /// Resizes, normalizes and cuts a picture.
    pub fn process(&self, picture: &Picture) -> Result<ProcessedImage> {
        let visuals = self.0.process(&[Medium::Picture(picture.clone())])?;
        let image = visuals.into_iter().find_map(|visual| match visual.layout {
            Layout::Patches { grid, .. } => Some(ProcessedImage {
                patches: visual.values,
                grid,
            }),
            _ => None,
        });
        image.ok_or_else(|| ModelError::Image("it has no patches".to_owned()))
    }
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
