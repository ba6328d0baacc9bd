//! Encoded bytes to RGB pixels, refused before decoding when too expensive; resizing as the reference does it.

use image::{ColorType, DynamicImage, ImageDecoder, ImageReader, Limits, RgbImage, metadata::Orientation};

use super::{
    jpeg,
    limits::{Deadline, ImageLimits, TimedBytes},
    resample::{Canvas, Resampler},
    webp,
};
use crate::{ModelError, Result};

/// An RGB picture, eight bits a channel, rows from the top.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Picture {
    /// Pixels of a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `width * height * 3` bytes.
    pub rgb: Vec<u8>,
}

impl Picture {
    /// Decodes PNG, JPEG, GIF (first frame), WebP or BMP to what Pillow's `Image.open(..).convert("RGB")` gives: alpha is
    /// dropped, not blended, grey is repeated, palettes are looked up, 16-bit colours keep their upper byte and 16-bit grey
    /// is **clipped** to 255. An EXIF orientation is not applied ([`Self::decode_upright`]), as the reference processors
    /// do not.
    ///
    /// The bytes are Pillow's, with two exceptions: arithmetically coded, lossless and 12-bit JPEGs are refused, and outside its
    /// first frame a GIF is black.
    pub fn decode(bytes: &[u8], limits: ImageLimits) -> Result<Self> {
        decode(bytes, &limits, false)
    }

    /// [`Self::decode`], then turned and mirrored as the picture's EXIF orientation says: what a person sees. The
    /// reference does this when it fetches a picture by its address, not when it is given one.
    pub fn decode_upright(bytes: &[u8], limits: ImageLimits) -> Result<Self> {
        decode(bytes, &limits, true)
    }

    /// The picture in another size, by bicubic interpolation with antialiasing: the bytes are those of Pillow.
    pub fn resize(&self, width: usize, height: usize) -> Self {
        self.resize_with(Resampler::Pillow, width, height)
    }

    /// The picture in another size as that implementation of the reference computes it.
    pub fn resize_with(&self, resampler: Resampler, width: usize, height: usize) -> Self {
        Self {
            width,
            height,
            rgb: resampler.resize(&self.rgb, (self.width, self.height), (width, height)),
        }
    }

    /// The picture on a canvas, and that in another size: the canvas is not made first.
    pub fn on_canvas(&self, canvas: Canvas, width: usize, height: usize) -> Self {
        let from = (self.width, self.height);
        Self {
            width,
            height,
            rgb: Resampler::Pillow.resize_on_canvas(&self.rgb, from, canvas, (width, height)),
        }
    }
}

fn decode(bytes: &[u8], limits: &ImageLimits, upright: bool) -> Result<Picture> {
    if bytes.len() > limits.bytes {
        let problem = format!("{} bytes, the limit is {}", bytes.len(), limits.bytes);
        return Err(ModelError::Image(problem));
    }
    let deadline = Deadline::after(limits.time);
    if bytes.starts_with(&[0xFF, 0xD8])
        && let Some(decoded) = jpeg::decode(bytes, limits, deadline)?
    {
        return oriented(decoded.picture, decoded.exif.filter(|_| upright));
    }
    if let Some((picture, exif)) = webp::first_frame(bytes, limits)? {
        return oriented(picture, exif.filter(|_| upright));
    }
    let reader = ImageReader::new(TimedBytes::new(bytes, deadline)).with_guessed_format();
    let mut decoder = reader
        .map_err(|e| ModelError::Image(e.to_string()))?
        .into_decoder()
        .map_err(decode_error)?;
    let (width, height) = decoder.dimensions();
    if let Some(problem) = limits.problem(width.into(), height.into(), bytes.len()) {
        return Err(ModelError::Image(problem));
    }
    let mut allocation = Limits::no_limits();
    // 16-bit RGBA is the widest format; decoders keep about one more copy.
    let pixels = u64::from(width) * u64::from(height);
    allocation.max_alloc = Some(pixels.saturating_mul(16).saturating_add(1 << 20));
    decoder.set_limits(allocation).map_err(decode_error)?;
    let orientation = upright
        .then(|| decoder.orientation())
        .transpose()
        .map_err(decode_error)?;
    let color = decoder.color_type();
    let total = usize::try_from(decoder.total_bytes()).unwrap_or(usize::MAX);
    if total as u64 > pixels * 8 {
        return Err(ModelError::Image(format!("{color:?} pixels are not supported")));
    }
    let mut raw = vec![0; total];
    decoder.read_image(&mut raw).map_err(decode_error)?;
    deadline.check().map_err(|e| ModelError::Image(e.to_string()))?;
    let picture = Picture {
        width: width as usize,
        height: height as usize,
        rgb: rgb(raw, color, is_deep_grey(bytes))?,
    };
    match orientation {
        Some(orientation) => turned(picture, orientation),
        None => Ok(picture),
    }
}

/// Whether it is a PNG of 16-bit grey. With a transparent level it is decoded with alpha, but stays grey to Pillow.
fn is_deep_grey(bytes: &[u8]) -> bool {
    // Bit depth and colour type follow width and height in the first chunk.
    bytes.starts_with(b"\x89PNG") && bytes.get(24..26) == Some(&[16, 0])
}

/// Decoded samples (native byte order) as Pillow converts them to RGB.
fn rgb(raw: Vec<u8>, color: ColorType, deep_grey: bool) -> Result<Vec<u8>> {
    let upper = |sample: &[u8]| (u16::from_ne_bytes([sample[0], sample[1]]) >> 8) as u8;
    let clipped = |sample: &[u8]| u16::from_ne_bytes([sample[0], sample[1]]).min(255) as u8;
    Ok(match color {
        ColorType::Rgb8 => raw,
        ColorType::L8 => raw.iter().flat_map(|level| [*level; 3]).collect(),
        ColorType::La8 => raw.chunks_exact(2).flat_map(|pixel| [pixel[0]; 3]).collect(),
        ColorType::Rgba8 => raw
            .chunks_exact(4)
            .flat_map(|pixel| [pixel[0], pixel[1], pixel[2]])
            .collect(),
        ColorType::L16 => raw.chunks_exact(2).flat_map(|pixel| [clipped(pixel); 3]).collect(),
        ColorType::La16 if deep_grey => raw.chunks_exact(4).flat_map(|pixel| [clipped(pixel); 3]).collect(),
        ColorType::La16 => raw.chunks_exact(4).flat_map(|pixel| [upper(pixel); 3]).collect(),
        ColorType::Rgb16 => raw.chunks_exact(2).map(upper).collect(),
        ColorType::Rgba16 => raw
            .chunks_exact(8)
            .flat_map(|pixel| [upper(pixel), upper(&pixel[2..]), upper(&pixel[4..])])
            .collect(),
        other => return Err(ModelError::Image(format!("{other:?} pixels are not supported"))),
    })
}

fn oriented(picture: Picture, exif: Option<Vec<u8>>) -> Result<Picture> {
    match exif.and_then(|exif| Orientation::from_exif_chunk(&exif)) {
        Some(orientation) => turned(picture, orientation),
        None => Ok(picture),
    }
}

fn turned(picture: Picture, orientation: Orientation) -> Result<Picture> {
    let (width, height) = (picture.width as u32, picture.height as u32);
    let Some(buffer) = RgbImage::from_raw(width, height, picture.rgb) else {
        return Err(ModelError::Image("fewer pixels than the header says".to_owned()));
    };
    let mut image = DynamicImage::ImageRgb8(buffer);
    image.apply_orientation(orientation);
    Ok(Picture {
        width: image.width() as usize,
        height: image.height() as usize,
        rgb: image.into_rgb8().into_raw(),
    })
}

#[expect(clippy::needless_pass_by_value, reason = "passed to map_err")]
pub(super) fn decode_error(error: image::ImageError) -> ModelError {
    ModelError::Image(error.to_string())
}

#[cfg(test)]
mod tests {
    use std::{io::Cursor, time::Duration};

    use super::*;

    fn png(image: &image::DynamicImage) -> Vec<u8> {
        let mut bytes = Vec::new();
        image
            .write_to(&mut Cursor::new(&mut bytes), image::ImageFormat::Png)
            .unwrap();
        bytes
    }

    #[test]
    fn alpha_is_dropped_and_grey_repeated() {
        let rgba = image::RgbaImage::from_pixel(2, 1, image::Rgba([10, 20, 30, 0]));
        let picture = Picture::decode(&png(&rgba.into()), ImageLimits::default()).unwrap();
        assert_eq!(
            (picture.width, picture.height, picture.rgb),
            (2, 1, vec![10, 20, 30, 10, 20, 30])
        );
        let grey = image::GrayImage::from_pixel(1, 1, image::Luma([7]));
        assert_eq!(
            Picture::decode(&png(&grey.into()), ImageLimits::default()).unwrap().rgb,
            [7, 7, 7]
        );
    }

    #[test]
    fn a_large_image_is_refused_by_its_header_alone() {
        // The header says 60000 x 60000; there is no pixel data at all.
        let mut bytes = png(&image::GrayImage::new(1, 1).into());
        bytes[16..24].copy_from_slice(&[0, 0, 0xEA, 0x60, 0, 0, 0xEA, 0x60]);
        let crc = crc32(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&crc.to_be_bytes());
        let error = Picture::decode(&bytes, ImageLimits::default()).unwrap_err();
        assert!(error.to_string().contains("60000x60000"), "{error}");
    }

    #[test]
    fn too_many_bytes_and_no_image_are_refused() {
        let limits = ImageLimits {
            bytes: 3,
            ..ImageLimits::DEFAULT
        };
        assert!(
            Picture::decode(&[0; 4], limits)
                .unwrap_err()
                .to_string()
                .contains("4 bytes, the limit is 3")
        );
        assert!(Picture::decode(b"abc", limits).is_err());
    }

    /// An RGB PNG of that size without any pixel, followed by `padding` bytes.
    fn header(width: u32, height: u32, padding: usize) -> Vec<u8> {
        let mut bytes = png(&image::RgbImage::new(1, 1).into());
        bytes[16..20].copy_from_slice(&width.to_be_bytes());
        bytes[20..24].copy_from_slice(&height.to_be_bytes());
        let crc = crc32(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&crc.to_be_bytes());
        bytes.resize(bytes.len() + padding, 0);
        bytes
    }

    #[test]
    fn a_small_file_that_claims_many_pixels_is_refused_before_decoding() {
        let refusal = |bytes: &[u8]| Picture::decode(bytes, ImageLimits::DEFAULT).unwrap_err().to_string();
        let error = refusal(&header(8000, 8000, 0));
        assert!(error.contains("more than 1500 bytes of pixels from each"), "{error}");
        assert!(!refusal(&header(8000, 8000, 1 << 20)).contains("of pixels from each"));
        let error = refusal(&header(2000, 3, 0));
        assert!(error.contains("the aspect ratio exceeds 200"), "{error}");
    }

    #[test]
    fn a_truncated_picture_and_a_late_one_are_refused() {
        let noise = image::RgbImage::from_fn(64, 64, |x, y| image::Rgb([(x * y) as u8, (x ^ y) as u8, (x * 7) as u8]));
        let bytes = png(&noise.into());
        assert!(Picture::decode(&bytes[..bytes.len() / 2], ImageLimits::DEFAULT).is_err());
        let late = ImageLimits {
            time: Duration::ZERO,
            ..ImageLimits::DEFAULT
        };
        let error = Picture::decode(&bytes, late).unwrap_err().to_string();
        assert!(error.contains("decoding takes longer"), "{error}");
    }

    #[test]
    fn deep_grey_is_clipped_and_deep_colour_keeps_its_upper_byte() {
        let grey =
            image::ImageBuffer::<image::Luma<u16>, _>::from_fn(3, 1, |x, _| image::Luma([[7, 256, 65535][x as usize]]));
        let picture = Picture::decode(&png(&DynamicImage::ImageLuma16(grey)), ImageLimits::DEFAULT).unwrap();
        assert_eq!(picture.rgb, [7, 7, 7, 255, 255, 255, 255, 255, 255]);
        let colour = image::ImageBuffer::from_pixel(1, 1, image::Rgb([255u16, 511, 65535]));
        let picture = Picture::decode(&png(&DynamicImage::ImageRgb16(colour)), ImageLimits::DEFAULT).unwrap();
        assert_eq!(picture.rgb, [0, 1, 255]);
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_bytes_give_a_picture_or_an_error(
            format in 0usize..6,
            tail in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400),
        ) {
            let magic: [&[u8]; 6] = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF\x20\0\0\0WEBPVP8L", b"BM", b""];
            let bytes = [magic[format], &tail].concat();
            let _ = Picture::decode(&bytes, ImageLimits::DEFAULT);
            let _ = Picture::decode_upright(&bytes, ImageLimits::DEFAULT);
        }
    }

    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0u32, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
                (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg())
            })
        })
    }
}
