//! Pictures and videos as users give them: bytes to RGB pixels within limits.
//!
//! # Layout
//!
//! | file | what it is |
//! |---|---|
//! | `limits.rs` | what an encoded picture or video may cost |
//! | `picture.rs` | encoded bytes to one RGB picture, refused before decoding when too expensive |
//! | `jpeg/` | JPEG, bit for bit as libjpeg-turbo |
//! | `sampling.rs` | which frames of a video are kept |
//! | `video.rs` | frames, an animation or a file to a video |
//! | `webp.rs` | frames of an animated WebP |
//! | `video_file/` | MP4 files with H.264, behind the feature `video-file` |
//! | `resample.rs` | bicubic resizing, bit for bit as the reference |
//! | `levels.rs` | grey levels to what a vision tower reads |
//! | `preprocessor.rs` | what a checkpoint's preprocessor files say |

mod jpeg;
mod levels;
mod limits;
mod picture;
mod preprocessor;
mod resample;
mod sampling;
mod video;
#[cfg(feature = "video-file")]
mod video_file;
mod webp;

pub use levels::{Levels, Normalization};
pub use limits::{ImageLimits, VideoLimits};
pub use picture::Picture;
pub use preprocessor::{PreprocessorFile, SizeFields};
pub use resample::{Canvas, Resampler};
pub use sampling::Sampling;
pub use video::Video;

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
