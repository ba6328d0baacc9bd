//! Samples of H.264 to RGB frames.

use openh264::{
    OpenH264API,
    decoder::{DecodedYUV, Decoder, DecoderConfig, Flush},
    formats::YUVSource,
};

use super::{
    super::{limits::VideoLimits, picture::Picture, video::problem},
    mp4::{START_CODE, Track},
};
use crate::Result;

/// Decodes one group of pictures and keeps some of the frames.
pub(super) struct GroupDecoder<'a> {
    decoder: Decoder,
    limits: &'a VideoLimits,
    length_size: usize,
    /// The parameter sets, then the units of the next sample, as a byte stream.
    stream: Vec<u8>,
    kept: Kept,
}

/// Frames come in the order in which they are shown.
struct Kept {
    /// Places of the frames to keep, ascending.
    places: Vec<usize>,
    /// Frames that came.
    shown: usize,
    frames: Vec<Picture>,
}

impl<'a> GroupDecoder<'a> {
    /// A decoder of one group that keeps the frames at these places (ascending) in the order in which they are shown.
    pub(super) fn new(track: &Track, limits: &'a VideoLimits, places: Vec<usize>) -> Result<Self> {
        let config = DecoderConfig::new().flush_after_decode(Flush::NoFlush);
        let decoder = Decoder::with_api_config(OpenH264API::from_source(), config).map_err(problem)?;
        Ok(Self {
            decoder,
            limits,
            length_size: track.length_size,
            stream: track.parameter_sets.clone(),
            kept: Kept {
                places,
                shown: 0,
                frames: Vec::new(),
            },
        })
    }

    /// Whether all frames to keep are there.
    pub(super) fn is_done(&self) -> bool {
        self.kept.frames.len() == self.kept.places.len()
    }

    /// Decodes the next sample.
    pub(super) fn push(&mut self, sample: &[u8]) -> Result<()> {
        let mut rest = sample;
        while let Some((length, behind)) = rest
            .split_at_checked(self.length_size)
            .filter(|(length, _)| !length.is_empty())
        {
            let size = length.iter().fold(0usize, |size, byte| size << 8 | usize::from(*byte));
            let Some((unit, next)) = behind.split_at_checked(size) else {
                return Err(problem("a unit of H.264 is longer than its sample"));
            };
            self.stream.extend(START_CODE);
            self.stream.extend(unit);
            rest = next;
        }
        let frame = self.decoder.decode(&self.stream).map_err(problem)?;
        if let Some(frame) = frame {
            self.kept.take(&frame, self.limits)?;
        }
        self.stream.clear();
        Ok(())
    }

    /// The kept frames, also those that the decoder still held back.
    pub(super) fn finish(mut self) -> Result<Vec<Picture>> {
        if !self.is_done() {
            for frame in self.decoder.flush_remaining().map_err(problem)? {
                self.kept.take(&frame, self.limits)?;
            }
        }
        if !self.is_done() {
            let (got, wanted) = (self.kept.frames.len(), self.kept.places.len());
            return Err(problem(format!(
                "H.264 is damaged: {got} of {wanted} frames of a group were decoded"
            )));
        }
        Ok(self.kept.frames)
    }
}

impl Kept {
    fn take(&mut self, frame: &DecodedYUV<'_>, limits: &VideoLimits) -> Result<()> {
        let place = self.shown;
        self.shown += 1;
        if self.places.get(self.frames.len()) != Some(&place) {
            return Ok(());
        }
        let (width, height) = frame.dimensions();
        if let Some(reason) = limits.problem(width as u64, height as u64, self.places.len()) {
            return Err(problem(reason));
        }
        let mut rgb = vec![0; width * height * 3];
        frame.write_rgb8(&mut rgb);
        self.frames.push(Picture { width, height, rgb });
        Ok(())
    }
}
