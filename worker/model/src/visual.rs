//! A picture or video as a vision tower reads it, and what a family offers to make one.

use serde::{Deserialize, Serialize};

use crate::{
    Result,
    media::{Medium, MediumSize},
};

/// Patches of an image or video: time, height, width.
pub type Grid = [usize; 3];

/// What a processor made of one picture or video.
#[derive(Clone, Debug, PartialEq)]
pub struct Visual {
    /// Values for the vision tower, as many as the layout says.
    pub values: Vec<f32>,
    /// What the values are.
    pub layout: Layout,
}

/// What the values of a [`Visual`] are, and so how many tokens they become.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Layout {
    /// Qwen2.5-VL: one row of `channels * frames * side * side` values for each patch, groups of merged patches together.
    Patches {
        /// Patches: time, height, width.
        grid: Grid,
        /// Positions between two time slices, `second_per_grid * tokens_per_second`; 0 for a picture.
        time_step: f64,
        /// Whether the patches are those of a video.
        video: bool,
    },
    /// LLaVA-OneVision, the only picture of its sample: `[tiles, channels, side, side]`, the whole picture first, then
    /// its tiles row by row.
    Anyres {
        /// Squares, the whole picture included.
        tiles: usize,
        /// Rows of the picture before resizing.
        height: usize,
        /// Pixels of a row before resizing.
        width: usize,
    },
    /// LLaVA-OneVision, one of several pictures: `[channels, side, side]`.
    Square,
    /// LLaVA-OneVision, a video: `[frames, channels, side, side]`.
    Frames {
        /// Frames.
        frames: usize,
    },
}

impl Layout {
    /// Whether it stands for a video placeholder rather than an image placeholder.
    pub fn is_video(&self) -> bool {
        matches!(self, Self::Frames { .. } | Self::Patches { video: true, .. })
    }
}

/// How a family turns the pictures and videos of one sample into what its vision tower reads.
pub trait VisualProcessor: std::fmt::Debug + Send + Sync {
    /// The layout of each medium, from sizes alone: nothing is decoded, resized or allocated for pixels.
    fn plan(&self, sizes: &[MediumSize]) -> Result<Vec<Layout>>;

    /// Resizes, normalizes and cuts each medium; the layouts are those of [`Self::plan`].
    fn process(&self, media: &[Medium]) -> Result<Vec<Visual>>;

    /// As [`Self::process`] for one medium whose layout is known; the layout must be one that [`Self::plan`] gave it.
    fn make(&self, medium: &Medium, layout: &Layout) -> Result<Visual>;

    /// Tokens that a visual of this layout becomes.
    fn tokens(&self, layout: &Layout) -> usize;
}
