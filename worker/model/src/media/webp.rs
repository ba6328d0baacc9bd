//! Frames of an animated WebP, composed as libwebp composes them.
//!
//! The `image` crate decodes each frame; its own composition darkens what is drawn over an earlier frame by one level
//! (image-webp 0.2.4 blends pixels that are opaque), and the models are sensitive to single levels.
//!
//! Source: the WebP container specification, and `anim_decode.c` of libwebp for the arithmetic of blending.

use std::io::Cursor;

use image::{ImageDecoder, codecs::webp::WebPDecoder};

use super::{
    limits::{ImageLimits, VideoLimits},
    picture::{Picture, decode_error},
    video::{Composed, problem},
};
use crate::{ModelError, Result};

/// Bytes of a frame's position, size, delay and flags.
const FRAME_HEADER: usize = 16;

/// The first frame of an animation, and the EXIF chunk; none if the WebP is a picture.
///
/// `image` must not be asked for it: image-webp 0.2.4 panics where a frame with alpha has another size than its header says.
pub(super) fn first_frame(file: &[u8], limits: &ImageLimits) -> Result<Option<(Picture, Option<Vec<u8>>)>> {
    let Some((width, height)) = animation_size(file) else {
        return Ok(None);
    };
    if let Some(reason) = limits.problem(width as u64, height as u64, file.len()) {
        return Err(ModelError::Image(reason));
    }
    let mut frames = WebPFrames::new(
        file,
        &VideoLimits {
            frame: *limits,
            ..VideoLimits::DEFAULT
        },
    )?;
    let first = frames.next().ok_or_else(|| problem("the WebP has no frame"))??;
    let exif = Chunks(file.get(12..).unwrap_or_default()).find(|(kind, _)| *kind == b"EXIF");
    Ok(Some((first.into_picture(), exif.map(|(_, exif)| exif.to_vec()))))
}

/// Width and height of an animation's canvas; none if the file is none.
fn animation_size(file: &[u8]) -> Option<(usize, usize)> {
    let is_webp = file.starts_with(b"RIFF") && file.get(8..12) == Some(b"WEBP");
    match Chunks(file.get(12..)?).next()? {
        (b"VP8X", header) if is_webp && header.len() >= 10 && header[0] & 2 != 0 => {
            Some((u24(&header[4..]) + 1, u24(&header[7..]) + 1))
        }
        _ => None,
    }
}

/// The frames of one file, in order.
pub(super) struct WebPFrames<'a> {
    chunks: Chunks<'a>,
    width: usize,
    height: usize,
    /// RGBA after what the last frame asked to be cleared was cleared.
    canvas: Vec<u8>,
    /// Whether the canvas is clear.
    blank: bool,
}

struct FrameHeader {
    left: usize,
    top: usize,
    width: usize,
    height: usize,
    milliseconds: usize,
    blends: bool,
    clears: bool,
}

impl<'a> WebPFrames<'a> {
    /// Reads the header; nothing is decoded.
    pub(super) fn new(file: &'a [u8], limits: &VideoLimits) -> Result<Self> {
        let size = animation_size(file);
        let (width, height) = size.ok_or_else(|| problem("the WebP is a picture, not an animation"))?;
        if let Some(reason) = limits.problem(width as u64, height as u64, 1) {
            return Err(problem(reason));
        }
        Ok(Self {
            chunks: Chunks(file.get(12..).unwrap_or_default()),
            width,
            height,
            canvas: vec![0; width * height * 4],
            blank: true,
        })
    }

    fn compose(&mut self, chunk: &[u8]) -> Result<Composed> {
        let (header, picture) = chunk
            .split_at_checked(FRAME_HEADER)
            .ok_or_else(|| problem("a frame of the WebP is cut off"))?;
        let header = FrameHeader::read(header);
        if header.left + header.width > self.width || header.top + header.height > self.height {
            return Err(problem("a frame of the WebP lies outside of its canvas"));
        }
        let pixels = decode(&header, picture)?;
        let blends = header.blends && !self.blank;
        for (y, row) in pixels.chunks_exact(header.width * 4).enumerate() {
            let start = ((header.top + y) * self.width + header.left) * 4;
            for (pixel, under) in row.chunks_exact(4).zip(self.canvas[start..].chunks_exact_mut(4)) {
                match pixel[3] {
                    alpha if alpha < 255 && blends => blend(pixel, under),
                    _ => under.copy_from_slice(pixel),
                }
            }
        }
        let composed = Composed {
            width: self.width,
            height: self.height,
            rgba: self.canvas.clone(),
            milliseconds: header.milliseconds as f64,
        };
        self.clear(&header);
        Ok(composed)
    }

    fn clear(&mut self, header: &FrameHeader) {
        let whole = (header.width, header.height) == (self.width, self.height);
        if header.clears {
            for y in header.top..header.top + header.height {
                let start = (y * self.width + header.left) * 4;
                self.canvas[start..start + header.width * 4].fill(0);
            }
        }
        self.blank = header.clears && (whole || self.blank);
    }
}

impl Iterator for WebPFrames<'_> {
    type Item = Result<Composed>;

    fn next(&mut self) -> Option<Self::Item> {
        let (_, chunk) = self.chunks.find(|(kind, _)| *kind == b"ANMF")?;
        Some(self.compose(chunk))
    }
}

impl FrameHeader {
    fn read(header: &[u8]) -> Self {
        Self {
            left: u24(header) * 2,
            top: u24(&header[3..]) * 2,
            width: u24(&header[6..]) + 1,
            height: u24(&header[9..]) + 1,
            milliseconds: u24(&header[12..]),
            blends: header[15] & 2 == 0,
            clears: header[15] & 1 != 0,
        }
    }
}

/// RGBA of one frame: its chunks are those of a file of their own.
fn decode(header: &FrameHeader, picture: &[u8]) -> Result<Vec<u8>> {
    let has_alpha = matches!(Chunks(picture).next(), Some((b"ALPH", _)));
    let mut file = b"RIFF\0\0\0\0WEBP".to_vec();
    if has_alpha {
        file.extend(b"VP8X\x0a\0\0\0\x10\0\0\0");
        file.extend(&((header.width - 1) as u32).to_le_bytes()[..3]);
        file.extend(&((header.height - 1) as u32).to_le_bytes()[..3]);
    }
    file.extend(picture);
    let size = (file.len() - 8) as u32;
    file[4..8].copy_from_slice(&size.to_le_bytes());
    let decoder = WebPDecoder::new(Cursor::new(file)).map_err(decode_error)?;
    let (width, height) = decoder.dimensions();
    if (width as usize, height as usize) != (header.width, header.height) {
        return Err(problem("a frame of the WebP has another size than its header says"));
    }
    let image = image::DynamicImage::from_decoder(decoder).map_err(decode_error)?;
    Ok(image.into_rgba8().into_raw())
}

/// A pixel that is not opaque over another, in the fixed point of libwebp.
fn blend(pixel: &[u8], under: &mut [u8]) {
    let alpha = u64::from(pixel[3]);
    if alpha == 0 {
        return;
    }
    let rest = (u64::from(under[3]) * (256 - alpha)) >> 8;
    let total = alpha + rest;
    let scale = (1 << 24) / total;
    for (over, under) in pixel.iter().zip(under.iter_mut()).take(3) {
        *under = (((u64::from(*over) * alpha + u64::from(*under) * rest) * scale) >> 24) as u8;
    }
    under[3] = total as u8;
}

/// Kind and content of the chunks of some bytes; ends at the first that does not fit.
struct Chunks<'a>(&'a [u8]);

impl<'a> Iterator for Chunks<'a> {
    type Item = (&'a [u8; 4], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (kind, rest) = self.0.split_first_chunk::<4>()?;
        let (size, rest) = rest.split_first_chunk::<4>()?;
        let size = u32::from_le_bytes(*size) as usize;
        let content = rest.get(..size)?;
        // Chunks begin at even places.
        self.0 = rest.get(size + size % 2..).unwrap_or_default();
        Some((kind, content))
    }
}

/// A number of three bytes.
fn u24(bytes: &[u8]) -> usize {
    usize::from(bytes[0]) | usize::from(bytes[1]) << 8 | usize::from(bytes[2]) << 16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transparent_pixel_changes_nothing_and_half_of_one_half() {
        let mut under = [100, 0, 200, 255];
        blend(&[9, 9, 9, 0], &mut under);
        assert_eq!(under, [100, 0, 200, 255]);
        blend(&[200, 0, 200, 128], &mut under);
        assert_eq!(under, [150, 0, 199, 255]);
    }

    #[test]
    fn a_chunk_that_is_longer_than_the_file_is_not_read() {
        assert_eq!(Chunks(b"ABCD\x02\0\0\0xyEFGH\x09\0\0\0").count(), 1);
    }
}
