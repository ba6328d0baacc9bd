//! What an encoded picture or video may cost, and a clock that decoders cannot outrun.

use std::{
    io::{BufRead, Cursor, Error, ErrorKind, Read, Result, Seek, SeekFrom},
    time::{Duration, Instant},
};

/// What one encoded picture may cost. All but the time are held against its header, before any pixel is decoded.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ImageLimits {
    /// Largest encoded size, in bytes.
    pub bytes: usize,
    /// Largest number of pixels.
    pub pixels: u64,
    /// Largest ratio of the longer side to the shorter side.
    pub aspect: u32,
    /// Largest ratio of RGB bytes to encoded bytes, for pictures of more than [`Self::FREE_PIXELS`] pixels.
    pub expansion: u64,
    /// Longest time to decode it. PNG, GIF and BMP are read as they are decoded and stop when it is over, JPEG stops
    /// after any row of blocks; WebP is decoded in one go, so that for it the number of pixels bounds the time.
    pub time: Duration,
}

impl ImageLimits {
    /// 20 MiB, 64 Mi pixels, sides of 1:200, 1500 bytes from one, 10 seconds.
    pub const DEFAULT: Self = Self {
        bytes: 20 << 20,
        pixels: 64 << 20,
        aspect: 200,
        expansion: 1500,
        time: Duration::from_secs(10),
    };
    /// Pictures of so few pixels may be as well compressed as they are: drawings and tests are.
    pub const FREE_PIXELS: u64 = 4 << 20;

    /// Why a picture of this header is too expensive, if it is.
    pub(super) fn problem(&self, width: u64, height: u64, encoded: usize) -> Option<String> {
        let pixels = width.saturating_mul(height);
        let (longer, shorter) = (width.max(height), width.min(height));
        if pixels == 0 || pixels > self.pixels {
            Some(format!("{width}x{height} pixels, the limit is {} pixels", self.pixels))
        } else if longer > shorter.saturating_mul(u64::from(self.aspect)) {
            let limit = self.aspect;
            Some(format!("{width}x{height} pixels: the aspect ratio exceeds {limit}"))
        } else if pixels > Self::FREE_PIXELS && pixels.saturating_mul(3) > self.expansion.saturating_mul(encoded as u64)
        {
            let limit = self.expansion;
            Some(format!(
                "{width}x{height} pixels from {encoded} bytes: more than {limit} bytes of pixels from each"
            ))
        } else {
            None
        }
    }
}

impl Default for ImageLimits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What one video may cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VideoLimits {
    /// What a frame may cost; its `bytes` hold for each frame of a list and `expansion` for pictures alone.
    pub frame: ImageLimits,
    /// Largest encoded size of the whole, in bytes.
    pub bytes: usize,
    /// Most frames of the file, sampled or not.
    pub frames: usize,
    /// Longest duration, in seconds.
    pub seconds: f64,
    /// Most RGB bytes of the frames that are kept.
    pub decoded_bytes: u64,
    /// Longest time to decode all of it; checked before each frame, and within frames as for a picture.
    pub time: Duration,
}

impl VideoLimits {
    /// 256 MiB, 108,000 frames, an hour, 2 GiB of pixels, two minutes; frames as [`ImageLimits::DEFAULT`].
    pub const DEFAULT: Self = Self {
        frame: ImageLimits::DEFAULT,
        bytes: 256 << 20,
        frames: 108_000,
        seconds: 3600.0,
        decoded_bytes: 2 << 30,
        time: Duration::from_secs(120),
    };

    /// Why a video of this header is too expensive, if it is. `kept` is the number of frames that will be kept.
    pub(super) fn problem(&self, width: u64, height: u64, kept: usize) -> Option<String> {
        let decoded = width
            .saturating_mul(height)
            .saturating_mul(3)
            .saturating_mul(kept as u64);
        let unbounded = ImageLimits {
            expansion: u64::MAX,
            ..self.frame
        };
        let too_much = || {
            let limit = self.decoded_bytes;
            format!("{kept} frames of {width}x{height} pixels are {decoded} bytes, the limit is {limit}")
        };
        unbounded
            .problem(width, height, usize::MAX)
            .or_else(|| (decoded > self.decoded_bytes).then(too_much))
    }

    /// Why a video of so many frames and seconds is too long, if it is.
    pub(super) fn length_problem(&self, frames: usize, seconds: f64) -> Option<String> {
        if frames > self.frames {
            Some(format!("more than {} frames", self.frames))
        } else if seconds > self.seconds {
            Some(format!("{seconds:.1} seconds, the limit is {} seconds", self.seconds))
        } else {
            None
        }
    }
}

impl Default for VideoLimits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// When work has to end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline {
    at: Option<Instant>,
    allowed: Duration,
}

impl Deadline {
    pub(super) fn after(allowed: Duration) -> Self {
        Self {
            at: Instant::now().checked_add(allowed),
            allowed,
        }
    }

    /// What is left, nothing if it has passed.
    pub(super) fn left(&self) -> Duration {
        self.at
            .map_or(self.allowed, |at| at.saturating_duration_since(Instant::now()))
    }

    /// Fails when it has passed.
    pub(super) fn check(&self) -> Result<()> {
        if self.left().is_zero() {
            let problem = format!("decoding takes longer than {:?}", self.allowed);
            return Err(Error::new(ErrorKind::TimedOut, problem));
        }
        Ok(())
    }
}

/// Bytes that cannot be read any more once a deadline has passed.
#[derive(Debug)]
pub(super) struct TimedBytes<'a> {
    bytes: Cursor<&'a [u8]>,
    deadline: Deadline,
}

impl<'a> TimedBytes<'a> {
    /// Small enough that a decoder asks often, even one that makes a thousand bytes from each.
    const PIECE: usize = 4096;

    pub(super) fn new(bytes: &'a [u8], deadline: Deadline) -> Self {
        Self {
            bytes: Cursor::new(bytes),
            deadline,
        }
    }
}

impl Read for TimedBytes<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        self.deadline.check()?;
        let piece = buffer.len().min(Self::PIECE);
        self.bytes.read(&mut buffer[..piece])
    }
}

impl BufRead for TimedBytes<'_> {
    fn fill_buf(&mut self) -> Result<&[u8]> {
        self.deadline.check()?;
        let rest = self.bytes.fill_buf()?;
        Ok(&rest[..rest.len().min(Self::PIECE)])
    }

    fn consume(&mut self, amount: usize) {
        self.bytes.consume(amount);
    }
}

impl Seek for TimedBytes<'_> {
    fn seek(&mut self, position: SeekFrom) -> Result<u64> {
        self.bytes.seek(position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_read_after_the_deadline() {
        let mut buffer = Vec::new();
        let mut late = TimedBytes::new(b"abc", Deadline::after(Duration::ZERO));
        assert_eq!(late.read_to_end(&mut buffer).unwrap_err().kind(), ErrorKind::TimedOut);
        let mut early = TimedBytes::new(b"abc", Deadline::after(Duration::MAX));
        assert_eq!(early.read_to_end(&mut buffer).unwrap(), 3);
    }

    #[test]
    fn a_small_picture_may_be_compressed_at_will_and_a_large_one_not() {
        let limits = ImageLimits::DEFAULT;
        assert_eq!(limits.problem(2048, 2048, 10), None);
        let problem = limits.problem(8192, 8192, 1000).unwrap();
        assert!(problem.contains("more than 1500 bytes"), "{problem}");
        assert_eq!(limits.problem(8192, 8192, 1 << 20), None);
    }
}
