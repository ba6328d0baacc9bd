//! Encoded bytes to RGB pixels, refused before decoding when too large; resizing as Pillow does it.

use std::io::Cursor;

use image::{ImageDecoder, ImageReader, Limits};

use super::resample::bicubic;
use crate::{ModelError, Result};

/// What an encoded image may cost.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ImageLimits {
    /// Largest encoded size, in bytes.
    pub bytes: usize,
    /// Largest number of pixels.
    pub pixels: u64,
}

impl Default for ImageLimits {
    fn default() -> Self {
        Self {
            bytes: 20 << 20,
            pixels: 64 << 20,
        }
    }
}

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
    /// Decodes PNG, JPEG, GIF (first frame), WebP or BMP. Size limits are held against the header, before any pixel is
    /// decoded. Alpha is dropped and grey is repeated; EXIF rotation is not applied, as in the reference.
    pub fn decode(bytes: &[u8], limits: ImageLimits) -> Result<Self> {
        if bytes.len() > limits.bytes {
            let problem = format!("{} bytes, the limit is {}", bytes.len(), limits.bytes);
            return Err(ModelError::Image(problem));
        }
        let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format();
        let mut decoder = reader
            .map_err(|e| ModelError::Image(e.to_string()))?
            .into_decoder()
            .map_err(decode_error)?;
        let (width, height) = decoder.dimensions();
        let pixels = u64::from(width) * u64::from(height);
        if pixels > limits.pixels || pixels == 0 {
            let problem = format!("{width}x{height} pixels, the limit is {} pixels", limits.pixels);
            return Err(ModelError::Image(problem));
        }
        let mut allocation = Limits::no_limits();
        // 16-bit RGBA is the widest format; decoders keep about one more copy.
        allocation.max_alloc = Some(pixels.saturating_mul(16).saturating_add(1 << 20));
        decoder.set_limits(allocation).map_err(decode_error)?;
        let decoded = image::DynamicImage::from_decoder(decoder).map_err(decode_error)?;
        Ok(Self {
            width: width as usize,
            height: height as usize,
            rgb: decoded.into_rgb8().into_raw(),
        })
    }

    /// The picture in another size, by bicubic interpolation with antialiasing: the bytes are those of Pillow.
    pub fn resize(&self, width: usize, height: usize) -> Self {
        Self {
            width,
            height,
            rgb: bicubic(&self.rgb, (self.width, self.height), (width, height)),
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "passed to map_err")]
fn decode_error(error: image::ImageError) -> ModelError {
    ModelError::Image(error.to_string())
}

#[cfg(test)]
mod tests {
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
        let limits = ImageLimits { bytes: 3, pixels: 9 };
        assert!(
            Picture::decode(&[0; 4], limits)
                .unwrap_err()
                .to_string()
                .contains("4 bytes, the limit is 3")
        );
        assert!(Picture::decode(b"abc", limits).is_err());
    }

    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0u32, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
                (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg())
            })
        })
    }
}
