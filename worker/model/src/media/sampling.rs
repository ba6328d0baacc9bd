//! Which frames of a video a model sees.

/// How frames are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sampling {
    /// So many frames a second, spread evenly from the first to the last frame.
    Rate {
        /// Frames a second.
        fps: f64,
        /// Fewest frames (where the video has them).
        min: usize,
        /// Most frames.
        max: usize,
        /// The number of frames is a multiple of this (where the video has as many).
        multiple: usize,
    },
    /// At most so many frames, spread evenly from the first to the last.
    AtMost(usize),
    /// Every frame.
    All,
}

impl Sampling {
    /// Two frames a second, 4 to 768 of them, an even number.
    ///
    /// Source: `smart_nframes` of qwen-vl-utils 0.0.14.
    pub const QWEN: Self = Self::Rate {
        fps: 2.0,
        min: 4,
        max: 768,
        multiple: 2,
    };

    /// 32 frames.
    ///
    /// Source: `frames_upbound` of the LLaVA-OneVision training script.
    pub const ONE_VISION: Self = Self::AtMost(32);

    /// How many of `total` frames are kept from a video that has `fps` frames a second. A video of fewer frames than one
    /// multiple keeps all of them, where qwen-vl-utils refuses it.
    pub fn count(&self, total: usize, video_fps: f64) -> usize {
        match *self {
            Self::All => total,
            Self::AtMost(most) => total.min(most.max(1)),
            Self::Rate {
                fps,
                min,
                max,
                multiple,
            } => {
                let multiple = multiple.max(1);
                let (least, most) = (min.next_multiple_of(multiple), max.min(total) / multiple * multiple);
                let wanted = total as f64 / video_fps * fps;
                let wanted = wanted.max(least as f64).min(most as f64).min(total as f64) as usize;
                let wanted = wanted / multiple * multiple;
                if wanted == 0 { total.min(multiple) } else { wanted }
            }
        }
    }

    /// The frames that are kept, in ascending order.
    pub fn indices(&self, total: usize, video_fps: f64) -> Vec<usize> {
        let count = self.count(total, video_fps);
        match self {
            Self::All => (0..total).collect(),
            Self::AtMost(_) => spread(total, count, |position| position as usize),
            Self::Rate { .. } => linspace(total, count),
        }
    }

    /// Frames a second of what is kept.
    pub fn kept_fps(&self, total: usize, video_fps: f64) -> f64 {
        self.count(total, video_fps) as f64 / total.max(1) as f64 * video_fps
    }
}

/// As `numpy.linspace(0, total - 1, count)` and then `index`.
fn spread(total: usize, count: usize, index: impl Fn(f64) -> usize) -> Vec<usize> {
    let last = total.saturating_sub(1);
    let step = last as f64 / count.saturating_sub(1).max(1) as f64;
    let position = |k: usize| {
        if k + 1 == count && count > 1 {
            last
        } else {
            index(k as f64 * step)
        }
    };
    (0..count).map(position).collect()
}

/// As `torch.linspace(0, total - 1, count).round()`: single precision, from both ends, halves to even.
fn linspace(total: usize, count: usize) -> Vec<usize> {
    let last = total.saturating_sub(1) as f32;
    let step = last / count.saturating_sub(1).max(1) as f32;
    let position = |k: usize| {
        let position = if k < count / 2 || count == 1 {
            step * k as f32
        } else {
            last - step * (count - 1 - k) as f32
        };
        position.round_ties_even() as usize
    };
    (0..count).map(position).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn two_frames_a_second_are_spread_over_the_whole_video() {
        assert_eq!(Sampling::QWEN.indices(30, 10.0), [0, 6, 12, 17, 23, 29]);
        assert_eq!(Sampling::QWEN.kept_fps(30, 10.0), 2.0);
    }

    #[test]
    fn a_short_video_gives_at_least_four_frames_and_an_even_number() {
        assert_eq!(Sampling::QWEN.indices(9, 30.0), [0, 3, 5, 8]);
        assert_eq!(Sampling::QWEN.indices(3, 30.0), [0, 2]);
        assert_eq!(Sampling::QWEN.indices(1, 30.0), [0]);
    }

    #[test]
    fn a_long_video_gives_at_most_768_frames() {
        assert_eq!(Sampling::QWEN.count(100_000, 25.0), 768);
    }

    #[test]
    fn at_most_32_frames_are_spread_and_rounded_down() {
        assert_eq!(Sampling::ONE_VISION.indices(3, 30.0), [0, 1, 2]);
        let indices = Sampling::ONE_VISION.indices(100, 30.0);
        assert_eq!((indices.len(), &indices[..4], indices[31]), (32, &[0, 3, 6, 9][..], 99));
    }

    proptest! {
        #[test]
        fn kept_frames_ascend_within_the_video(total in 1usize..3000, fps in 0.1f64..240.0, most in 1usize..100) {
            let rate = Sampling::Rate { fps: 2.0, min: 4, max: most, multiple: 2 };
            for sampling in [Sampling::QWEN, Sampling::AtMost(most), Sampling::All, rate] {
                let indices = sampling.indices(total, fps);
                prop_assert!(!indices.is_empty() && indices.len() == sampling.count(total, fps));
                prop_assert!(indices.windows(2).all(|pair| pair[0] < pair[1]));
                prop_assert!(indices[indices.len() - 1] < total);
            }
        }
    }
}
