//! What an encoded image is: checked by its header before any pixel is decoded, then by decoding it once.

use std::io::Cursor;

use image::{ImageFormat, ImageReader, Limits};

use crate::digest::sha256_hex;

/// An encoded image that was decoded once without error.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Picture {
    /// Hex SHA-256 of the encoded bytes.
    pub sha256: String,
    /// Usual file ending of its format.
    pub extension: &'static str,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
}

impl Picture {
    /// File name that the same bytes always have.
    pub fn file_name(&self) -> String {
        format!("{}.{}", self.sha256, self.extension)
    }
}

/// Why bytes are refused as an image.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PictureError {
    /// More bytes than allowed.
    #[error("image has {bytes} bytes, the limit is {limit}")]
    TooManyBytes {
        /// Bytes.
        bytes: u64,
        /// Limit.
        limit: u64,
    },
    /// More pixels than allowed.
    #[error("image has {width}x{height} pixels, the limit is {limit}")]
    TooManyPixels {
        /// Width.
        width: u32,
        /// Height.
        height: u32,
        /// Limit.
        limit: u64,
    },
    /// Not an image that can be decoded.
    #[error("image cannot be decoded: {0}")]
    Corrupt(String),
}

/// Checks size, then dimensions, then decodes.
pub fn inspect(bytes: &[u8], max_bytes: u64, max_pixels: u64) -> Result<Picture, PictureError> {
    let corrupt = |error: &dyn std::fmt::Display| PictureError::Corrupt(error.to_string());
    if bytes.len() as u64 > max_bytes {
        return Err(PictureError::TooManyBytes {
            bytes: bytes.len() as u64,
            limit: max_bytes,
        });
    }
    let format = image::guess_format(bytes).map_err(|error| corrupt(&error))?;
    let (width, height) = ImageReader::with_format(Cursor::new(bytes), format)
        .into_dimensions()
        .map_err(|error| corrupt(&error))?;
    if u64::from(width) * u64::from(height) > max_pixels {
        return Err(PictureError::TooManyPixels {
            width,
            height,
            limit: max_pixels,
        });
    }
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::default();
    limits.max_image_width = Some(width);
    limits.max_image_height = Some(height);
    reader.limits(limits);
    reader.decode().map_err(|error| corrupt(&error))?;
    Ok(Picture {
        sha256: sha256_hex(bytes),
        extension: extension(format),
        width,
        height,
    })
}

fn extension(format: ImageFormat) -> &'static str {
    format.extensions_str().first().copied().unwrap_or("bin")
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn png(width: u32, height: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        image::RgbImage::new(width, height)
            .write_to(&mut Cursor::new(&mut bytes), ImageFormat::Png)
            .expect("png");
        bytes
    }

    #[test]
    fn a_whole_image_passes_and_a_cut_one_does_not() {
        let bytes = png(8, 6);
        let picture = inspect(&bytes, 1000, 48).expect("whole");
        assert_eq!((picture.width, picture.height, picture.extension), (8, 6, "png"));
        let cut = inspect(&bytes[..bytes.len() / 2], 1000, 48);
        assert!(matches!(cut, Err(PictureError::Corrupt(_))), "{cut:?}");
        assert!(matches!(inspect(b"text", 10, 10), Err(PictureError::Corrupt(_))));
    }

    #[test]
    fn pixels_are_counted_before_they_are_decoded() {
        let bytes = png(8, 6);
        assert_eq!(
            inspect(&bytes, 1000, 47),
            Err(PictureError::TooManyPixels {
                width: 8,
                height: 6,
                limit: 47
            })
        );
        assert!(matches!(
            inspect(&bytes, 10, 48),
            Err(PictureError::TooManyBytes { .. })
        ));
    }
}
