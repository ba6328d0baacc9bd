//! Frames and animations to a video within limits.

use image::{
    AnimationDecoder, Frames, ImageDecoder, ImageFormat, ImageReader, Limits,
    codecs::{gif::GifDecoder, png::PngDecoder},
};

use super::{
    limits::{Deadline, ImageLimits, TimedBytes, VideoLimits},
    picture::{Picture, decode_error},
    sampling::Sampling,
    webp::WebPFrames,
};
use crate::{ModelError, Result};

/// Milliseconds of an animation's frame that gives none, as browsers show it.
const DEFAULT_DELAY: f64 = 100.0;

/// Frames in order, and how fast they follow each other.
#[derive(Clone, Debug, PartialEq)]
pub struct Video {
    /// Frames of equal size.
    pub frames: Vec<Picture>,
    /// Frames per second of [`Self::frames`] (after sampling, not of the file that they come from).
    pub fps: f64,
}

impl Video {
    /// Frames that are sampled already. There must be one, all of one size, and `fps` must be positive.
    pub fn new(frames: Vec<Picture>, fps: f64) -> Result<Self> {
        let video = Self { frames, fps };
        video.check()?;
        Ok(video)
    }

    /// Why this is no video: no frame, frames of different sizes, a rate that is not positive.
    pub fn check(&self) -> Result<()> {
        let Some(first) = self.frames.first() else {
            return Err(problem("it has no frame"));
        };
        if !(self.fps > 0.0 && self.fps.is_finite()) {
            return Err(problem(format!("{} frames a second", self.fps)));
        }
        let size = |frame: &Picture| (frame.width, frame.height);
        match self.frames.iter().position(|frame| size(frame) != size(first)) {
            Some(number) => {
                let ((width, height), other) = (size(first), &self.frames[number]);
                Err(problem(format!(
                    "frame {number} has {}x{} pixels, the first has {width}x{height}",
                    other.width, other.height
                )))
            }
            None => Ok(()),
        }
    }

    /// Decodes a list of pictures that were sampled at `fps` frames a second.
    pub fn decode_frames<B: AsRef<[u8]>>(encoded: &[B], fps: f64, limits: &VideoLimits) -> Result<Self> {
        let bytes = encoded.iter().map(|frame| frame.as_ref().len()).sum::<usize>();
        check_bytes(bytes, limits)?;
        if let Some(reason) = limits.length_problem(encoded.len(), encoded.len() as f64 / fps) {
            return Err(problem(reason));
        }
        let deadline = Deadline::after(limits.time);
        let mut frames = Vec::<Picture>::new();
        for frame in encoded {
            deadline.check().map_err(problem)?;
            let time = limits.frame.time.min(deadline.left());
            let frame = Picture::decode(frame.as_ref(), ImageLimits { time, ..limits.frame })?;
            if let Some(reason) = limits.problem(frame.width as u64, frame.height as u64, encoded.len()) {
                return Err(problem(reason));
            }
            frames.push(frame);
        }
        Self::new(frames, fps)
    }

    /// Decodes an animation ([`Self::decode_animation`]) or, with the feature `video-file`, an MP4 with H.264.
    pub fn decode(bytes: &[u8], sampling: Sampling, limits: &VideoLimits) -> Result<Self> {
        if bytes.get(4..8) != Some(b"ftyp") {
            return Self::decode_animation(bytes, sampling, limits);
        }
        check_bytes(bytes.len(), limits)?;
        decode_file(bytes, sampling, limits)
    }

    /// Decodes an animated GIF, WebP or PNG. Frames are composed as a viewer shows them (alpha is dropped, as for
    /// pictures); the rate is their number over the sum of their delays.
    ///
    /// The animation is decoded twice: how many frames there are shows only at its end, and only the sampled ones are
    /// kept.
    pub fn decode_animation(bytes: &[u8], sampling: Sampling, limits: &VideoLimits) -> Result<Self> {
        check_bytes(bytes.len(), limits)?;
        let deadline = Deadline::after(limits.time);
        let (mut total, mut milliseconds) = (0, 0.0);
        for_each_frame(bytes, deadline, limits, |_, frame| {
            total += 1;
            let delay = frame.milliseconds;
            milliseconds += if delay > 0.0 { delay } else { DEFAULT_DELAY };
            match limits.length_problem(total, milliseconds / 1000.0) {
                Some(reason) => Err(problem(reason)),
                None => Ok(true),
            }
        })?;
        let fps = total as f64 / (milliseconds / 1000.0);
        let indices = sampling.indices(total, fps);
        let mut frames = Vec::<Picture>::new();
        for_each_frame(bytes, deadline, limits, |number, frame| {
            if indices.get(frames.len()) == Some(&number) {
                if let Some(reason) = limits.problem(frame.width as u64, frame.height as u64, indices.len()) {
                    return Err(problem(reason));
                }
                frames.push(frame.into_picture());
            }
            Ok(frames.len() < indices.len())
        })?;
        Self::new(frames, sampling.kept_fps(total, fps))
    }
}

/// Hands each composed frame and its number to `visit` until that says to stop.
fn for_each_frame(
    bytes: &[u8],
    deadline: Deadline,
    limits: &VideoLimits,
    mut visit: impl FnMut(usize, Composed) -> Result<bool>,
) -> Result<()> {
    for (number, frame) in animation(bytes, deadline, limits)?.enumerate() {
        deadline.check().map_err(problem)?;
        if !visit(number, frame?)? {
            break;
        }
    }
    Ok(())
}

/// What a viewer of an animation shows at one time.
pub(super) struct Composed {
    pub width: usize,
    pub height: usize,
    pub rgba: Vec<u8>,
    /// How long it is shown.
    pub milliseconds: f64,
}

impl Composed {
    fn new(frame: image::Frame) -> Self {
        let (numerator, denominator) = frame.delay().numer_denom_ms();
        let buffer = frame.into_buffer();
        Self {
            width: buffer.width() as usize,
            height: buffer.height() as usize,
            rgba: buffer.into_raw(),
            milliseconds: f64::from(numerator) / f64::from(denominator),
        }
    }

    /// Without alpha, as pictures.
    pub(super) fn into_picture(self) -> Picture {
        Picture {
            width: self.width,
            height: self.height,
            rgb: self
                .rgba
                .chunks_exact(4)
                .flat_map(|pixel| [pixel[0], pixel[1], pixel[2]])
                .collect(),
        }
    }
}

type ComposedFrames<'a> = Box<dyn Iterator<Item = Result<Composed>> + 'a>;

fn animation<'a>(bytes: &'a [u8], deadline: Deadline, limits: &VideoLimits) -> Result<ComposedFrames<'a>> {
    let reader = ImageReader::new(TimedBytes::new(bytes, deadline)).with_guessed_format();
    let reader = reader.map_err(problem)?;
    let format = reader.format();
    let source = reader.into_inner();
    let checked = |size: (u32, u32)| match limits.problem(size.0.into(), size.1.into(), 1) {
        Some(reason) => Err(problem(reason)),
        None => Ok(()),
    };
    let mut allocation = Limits::no_limits();
    allocation.max_alloc = Some(limits.frame.pixels.saturating_mul(16).saturating_add(1 << 20));
    match format {
        Some(ImageFormat::Gif) => {
            let mut decoder = GifDecoder::new(source).map_err(decode_error)?;
            checked(decoder.dimensions())?;
            decoder.set_limits(allocation).map_err(decode_error)?;
            Ok(composed(decoder.into_frames()))
        }
        Some(ImageFormat::WebP) => Ok(Box::new(WebPFrames::new(bytes, limits)?)),
        Some(ImageFormat::Png) => {
            let decoder = PngDecoder::with_limits(source, allocation).map_err(decode_error)?;
            checked(decoder.dimensions())?;
            if !decoder.is_apng().map_err(decode_error)? {
                return Err(problem("the PNG is a picture, not an animation"));
            }
            Ok(composed(decoder.apng().map_err(decode_error)?.into_frames()))
        }
        _ => Err(problem(
            "it is no GIF, WebP or PNG animation; pass its frames as a list of pictures",
        )),
    }
}

fn composed(frames: Frames<'_>) -> ComposedFrames<'_> {
    Box::new(frames.map(|frame| frame.map(Composed::new).map_err(decode_error)))
}

#[cfg(feature = "video-file")]
fn decode_file(bytes: &[u8], sampling: Sampling, limits: &VideoLimits) -> Result<Video> {
    super::video_file::decode(bytes, sampling, limits, Deadline::after(limits.time))
}

#[cfg(not(feature = "video-file"))]
fn decode_file(_: &[u8], _: Sampling, _: &VideoLimits) -> Result<Video> {
    Err(problem(
        "MP4 files need a build with the feature video-file; without it pass frames as a list of pictures, or a GIF, WebP \
         or PNG animation",
    ))
}

fn check_bytes(bytes: usize, limits: &VideoLimits) -> Result<()> {
    if bytes > limits.bytes {
        return Err(problem(format!("{bytes} bytes, the limit is {}", limits.bytes)));
    }
    Ok(())
}

pub(super) fn problem(reason: impl std::fmt::Display) -> ModelError {
    ModelError::Video(reason.to_string())
}

#[cfg(test)]
mod tests {
    use std::{io::Cursor, time::Duration};

    use image::{Delay, Frame, Rgba, RgbaImage, codecs::gif::GifEncoder};

    use super::*;

    fn flat(level: u8, width: u32) -> RgbaImage {
        RgbaImage::from_pixel(width, 4, Rgba([level, level, level, 255]))
    }

    fn gif(frames: usize, milliseconds: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = GifEncoder::new_with_speed(&mut bytes, 30);
        for number in 0..frames {
            let delay = Delay::from_numer_denom_ms(milliseconds, 1);
            encoder
                .encode_frame(Frame::from_parts(flat(number as u8, 5), 0, 0, delay))
                .unwrap();
        }
        drop(encoder);
        bytes
    }

    fn png(level: u8, width: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        flat(level, width)
            .write_to(&mut Cursor::new(&mut bytes), ImageFormat::Png)
            .unwrap();
        bytes
    }

    fn levels(video: &Video) -> Vec<u8> {
        video.frames.iter().map(|frame| frame.rgb[0]).collect()
    }

    #[test]
    fn a_list_of_frames_is_taken_as_it_is() {
        let video = Video::decode_frames(&[png(1, 5), png(2, 5)], 1.5, &VideoLimits::DEFAULT).unwrap();
        assert_eq!((levels(&video), video.fps), (vec![1, 2], 1.5));
    }

    #[test]
    fn frames_of_two_sizes_no_frames_and_no_rate_are_refused() {
        let limits = VideoLimits::DEFAULT;
        let refusal = |frames: &[Vec<u8>], fps| Video::decode_frames(frames, fps, &limits).unwrap_err().to_string();
        assert_eq!(refusal(&[], 1.0), "video: it has no frame");
        assert_eq!(
            refusal(&[png(1, 5), png(1, 6)], 1.0),
            "video: frame 1 has 6x4 pixels, the first has 5x4"
        );
        for fps in [0.0, -1.0, f64::NAN] {
            assert!(refusal(&[png(1, 5)], fps).starts_with("video: "), "{fps}");
        }
    }

    #[test]
    fn an_animation_is_sampled_by_its_delays() {
        let bytes = gif(30, 100);
        let video = Video::decode_animation(&bytes, Sampling::QWEN, &VideoLimits::DEFAULT).unwrap();
        assert_eq!((levels(&video), video.fps), (vec![0, 6, 12, 17, 23, 29], 2.0));
        let all = Video::decode_animation(&bytes, Sampling::All, &VideoLimits::DEFAULT).unwrap();
        assert_eq!((all.frames.len(), all.fps.round()), (30, 10.0));
    }

    #[test]
    fn a_frame_without_delay_lasts_a_tenth_of_a_second() {
        let video = Video::decode_animation(&gif(4, 0), Sampling::All, &VideoLimits::DEFAULT).unwrap();
        assert!((video.fps - 10.0).abs() < 1e-9, "{}", video.fps);
    }

    #[test]
    fn too_many_frames_seconds_bytes_and_pixels_are_refused() {
        let bytes = gif(20, 1000);
        let refusal = |limits: VideoLimits| {
            let video = Video::decode_animation(&bytes, Sampling::All, &limits);
            video.unwrap_err().to_string()
        };
        let limits = VideoLimits::DEFAULT;
        assert_eq!(
            refusal(VideoLimits { frames: 19, ..limits }),
            "video: more than 19 frames"
        );
        assert_eq!(
            refusal(VideoLimits { seconds: 5.0, ..limits }),
            "video: 6.0 seconds, the limit is 5 seconds"
        );
        assert!(refusal(VideoLimits { bytes: 9, ..limits }).contains("the limit is 9"));
        assert_eq!(
            refusal(VideoLimits {
                decoded_bytes: 1000,
                ..limits
            }),
            "video: 20 frames of 5x4 pixels are 1200 bytes, the limit is 1000"
        );
        let late = VideoLimits {
            time: Duration::ZERO,
            ..limits
        };
        assert!(refusal(late).contains("decoding takes longer"));
    }

    #[test]
    fn a_still_picture_is_no_animation() {
        let error = Video::decode_animation(&png(1, 5), Sampling::All, &VideoLimits::DEFAULT).unwrap_err();
        assert_eq!(error.to_string(), "video: the PNG is a picture, not an animation");
        let error = Video::decode_animation(b"RIFF", Sampling::All, &VideoLimits::DEFAULT).unwrap_err();
        assert!(error.to_string().contains("pass its frames"), "{error}");
    }

    #[test]
    fn an_animation_of_100_000_frames_is_refused_by_their_number() {
        // One frame block of a GIF, repeated.
        let bytes = gif(1, 10);
        let block = bytes.windows(2).position(|pair| pair == [0x21, 0xF9]).unwrap();
        let frames = bytes[block..bytes.len() - 1].repeat(100_000);
        let many = [&bytes[..block], &frames, &[0x3B]].concat();
        let limits = VideoLimits {
            frames: 5000,
            ..VideoLimits::DEFAULT
        };
        let error = Video::decode_animation(&many, Sampling::QWEN, &limits).unwrap_err();
        assert_eq!(error.to_string(), "video: more than 5000 frames");
    }

    proptest::proptest! {
        #[test]
        fn a_damaged_animation_gives_a_video_or_an_error(
            damage in proptest::collection::vec((0usize..400, proptest::prelude::any::<u8>()), 1..20),
        ) {
            let mut bytes = gif(5, 10);
            for (at, value) in damage {
                let at = at % bytes.len();
                bytes[at] = value;
            }
            if let Ok(video) = Video::decode_animation(&bytes, Sampling::QWEN, &VideoLimits::DEFAULT) {
                video.check().unwrap();
            }
        }
    }
}
