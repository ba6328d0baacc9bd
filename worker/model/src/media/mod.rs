//! Pictures and videos as users give them: bytes to RGB pixels within limits.
//!
//! # Layout
//!
//! | file | what it is |
//! |---|---|
//! | `picture.rs` | encoded bytes to one RGB picture, refused before decoding when too large |
//! | `resample.rs` | bicubic resizing, bit for bit as Pillow |

mod picture;
mod resample;

pub use picture::{ImageLimits, Picture};

/// Frames in order, and how fast they follow each other.
#[derive(Clone, Debug, PartialEq)]
pub struct Video {
    /// Frames of equal size.
    pub frames: Vec<Picture>,
    /// Frames per second of [`Self::frames`] (after sampling, not of the file that they come from).
    pub fps: f64,
}

/// What a part of a message shows.
#[derive(Clone, Debug, PartialEq)]
pub enum Medium {
    /// One picture.
    Picture(Picture),
    /// Several frames.
    Video(Video),
}

/// All that must be known of a medium to count its tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MediumSize {
    /// One picture.
    Picture {
        /// Pixels of a row.
        width: usize,
        /// Rows.
        height: usize,
    },
    /// Several frames.
    Video {
        /// Frames.
        frames: usize,
        /// Pixels of a row of a frame.
        width: usize,
        /// Rows of a frame.
        height: usize,
        /// Frames per second.
        fps: f64,
    },
}

impl Medium {
    /// The size of the picture, or of the first frame and their number.
    pub fn size(&self) -> MediumSize {
        match self {
            Self::Picture(picture) => MediumSize::Picture {
                width: picture.width,
                height: picture.height,
            },
            Self::Video(video) => MediumSize::Video {
                frames: video.frames.len(),
                width: video.frames.first().map_or(0, |frame| frame.width),
                height: video.frames.first().map_or(0, |frame| frame.height),
                fps: video.fps,
            },
        }
    }
}
