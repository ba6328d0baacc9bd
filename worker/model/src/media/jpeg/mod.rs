//! JPEG to RGB, bit for bit as libjpeg-turbo (and so Pillow) decodes it.
//!
//! The standard leaves the inverse transform and the interpolation of chroma open; other decoders differ by up to ten levels
//! at coloured edges, and the models are sensitive to single levels. Arithmetic coding, 12 bits and lossless modes, which
//! are rare, are left to the `image` crate.
//!
//! | file | what it is |
//! |---|---|
//! | `headers.rs` | markers: tables, frame, scans, EXIF |
//! | `bits.rs` | entropy-coded bits and Huffman codes |
//! | `scan.rs` | one scan, sequential or progressive, to coefficients |
//! | `idct.rs` | coefficients to samples |
//! | `colour.rs` | samples to RGB rows |
//!
//! Sources: ITU-T T.81; the arithmetic is that of libjpeg's `jidctint`, `jdsample` and `jdcolor`, and of Pillow's
//! conversion from CMYK.

mod bits;
mod colour;
mod headers;
mod idct;
mod scan;

use self::headers::{Found, Reader};
use super::{
    limits::{Deadline, ImageLimits},
    picture::Picture,
};
use crate::{ModelError, Result};

/// A decoded picture and its EXIF chunk.
pub(super) struct Decoded {
    pub picture: Picture,
    pub exif: Option<Vec<u8>>,
}

/// Decodes a JPEG; none if it is of a kind that is left to others. The limits are held against the header, the deadline
/// against each row of blocks of each scan.
pub(super) fn decode(bytes: &[u8], limits: &ImageLimits, deadline: Deadline) -> Result<Option<Decoded>> {
    let mut reader = Reader::new(bytes);
    loop {
        match reader.advance()? {
            Found::Unsupported => return Ok(None),
            Found::Frame => {
                let (width, height) = reader.size();
                if let Some(reason) = limits.problem(width as u64, height as u64, bytes.len()) {
                    return Err(ModelError::Image(reason));
                }
                reader.allocate();
            }
            Found::Scan => reader.scan(deadline)?,
            Found::End => break,
        }
    }
    let exif = reader.exif.take();
    let picture = colour::picture(&mut reader, deadline)?;
    Ok(Some(Decoded { picture, exif }))
}

fn problem(reason: impl std::fmt::Display) -> ModelError {
    ModelError::Image(format!("JPEG: {reason}"))
}
