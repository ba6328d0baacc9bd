//! Video files: MP4 with H.264 (feature `video-file`).
//!
//! | file | what it is |
//! |---|---|
//! | `mp4.rs` | where in the file the samples of the first video track are, and when they are shown |
//! | `h264.rs` | samples to RGB frames |

mod h264;
mod mp4;

use self::{
    h264::GroupDecoder,
    mp4::{Sample, Track},
};
use super::{
    limits::{Deadline, VideoLimits},
    picture::Picture,
    sampling::Sampling,
    video::{Video, problem},
};
use crate::Result;

/// Decodes the sampled frames of an MP4 with H.264: whole groups of pictures without one are skipped, and of a group
/// only what comes before its last sampled frame is decoded. Colours are converted as BT.601; a rotation that the
/// container asks for is not applied.
pub(super) fn decode(bytes: &[u8], sampling: Sampling, limits: &VideoLimits, deadline: Deadline) -> Result<Video> {
    let track = Track::read(bytes, limits)?;
    let total = track.samples.len();
    let fps = total as f64 / track.seconds;
    let wanted = sampling.indices(total, fps);
    let (width, height) = (track.width as u64, track.height as u64);
    if let Some(reason) = limits.problem(width, height, wanted.len()) {
        return Err(problem(reason));
    }
    let ranks = ranks(&track.samples);
    let mut is_wanted = vec![false; total];
    for rank in &wanted {
        is_wanted[*rank] = true;
    }
    let mut frames = Vec::new();
    for group in groups(&track.samples) {
        let kept = group.clone().filter(|sample| is_wanted[ranks[*sample]]);
        let mut order = group.clone().collect::<Vec<_>>();
        order.sort_by_key(|sample| ranks[*sample]);
        let places = order
            .iter()
            .enumerate()
            .filter(|(_, sample)| is_wanted[ranks[**sample]]);
        let places = places.map(|(place, _)| place).collect::<Vec<_>>();
        if places.is_empty() {
            continue;
        }
        let mut decoder = GroupDecoder::new(&track, limits, places)?;
        for sample in group.clone() {
            deadline.check().map_err(problem)?;
            decoder.push(track.samples[sample].bytes(bytes))?;
            if decoder.is_done() {
                break;
            }
        }
        let decoded = decoder.finish()?;
        frames.extend(sorted(kept.map(|sample| ranks[sample]), decoded));
    }
    frames.sort_by_key(|(rank, _)| *rank);
    let frames = frames.into_iter().map(|(_, frame)| frame).collect();
    Video::new(frames, sampling.kept_fps(total, fps))
}

/// Frames that come in the order in which they are shown, with their ranks.
fn sorted(ranks: impl Iterator<Item = usize>, frames: Vec<Picture>) -> impl Iterator<Item = (usize, Picture)> {
    let mut ranks = ranks.collect::<Vec<_>>();
    ranks.sort_unstable();
    ranks.into_iter().zip(frames)
}

/// The place of each sample among all in the order in which they are shown.
fn ranks(samples: &[Sample]) -> Vec<usize> {
    let mut order = (0..samples.len()).collect::<Vec<_>>();
    order.sort_by_key(|sample| samples[*sample].shown_at);
    let mut ranks = vec![0; samples.len()];
    for (rank, sample) in order.into_iter().enumerate() {
        ranks[sample] = rank;
    }
    ranks
}

/// Runs of samples that can be decoded without those before.
fn groups(samples: &[Sample]) -> Vec<std::ops::Range<usize>> {
    let mut starts = (0..samples.len())
        .filter(|sample| *sample == 0 || samples[*sample].starts_group)
        .collect::<Vec<_>>();
    starts.push(samples.len());
    starts.windows(2).map(|pair| pair[0]..pair[1]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(shown_at: i64, starts_group: bool) -> Sample {
        Sample {
            offset: 0,
            size: 0,
            shown_at,
            starts_group,
        }
    }

    #[test]
    fn samples_are_ranked_by_when_they_are_shown_and_grouped_by_where_decoding_can_begin() {
        let samples = [(0, true), (3, false), (1, false), (2, false), (4, true), (5, false)];
        let samples = samples.map(|(at, starts)| sample(at, starts));
        assert_eq!(ranks(&samples), [0, 3, 1, 2, 4, 5]);
        assert_eq!(groups(&samples), [0..4, 4..6]);
    }
}
