//! Grey levels to the values that a vision tower reads.

use super::resample::Resampler;

/// The value of each of the 256 levels of each channel.
#[derive(Clone, Debug, PartialEq)]
pub struct Levels {
    table: Box<[[f32; 256]; 3]>,
}

/// What happens to a level, `(level * scale - mean) / std`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normalization {
    /// Multiplies each level; none leaves it as it is.
    pub scale: Option<f64>,
    /// Mean and standard deviation of each channel; none leaves the values as they are.
    pub channels: Option<([f64; 3], [f64; 3])>,
}

impl Levels {
    /// In the order of operations of that implementation of the reference, so that the last bit is the same: NumPy scales
    /// in double precision and then normalizes, torchvision multiplies mean and deviation instead of the pixels.
    pub fn new(normalization: &Normalization, arithmetic: Resampler) -> Self {
        let value = |channel: usize, level: usize| {
            let channels = normalization.channels;
            let channels = channels.map(|(mean, std)| (mean[channel] as f32, std[channel] as f32));
            match (arithmetic, normalization.scale, channels) {
                (Resampler::Torchvision, Some(scale), Some((mean, std))) => {
                    let inverse = (1.0 / scale) as f32;
                    (level as f32 - mean * inverse) / (std * inverse)
                }
                (Resampler::Torchvision, Some(scale), None) => level as f32 * scale as f32,
                (_, scale, None) => (level as f64 * scale.unwrap_or(1.0)) as f32,
                (_, scale, Some((mean, std))) => ((level as f64 * scale.unwrap_or(1.0)) as f32 - mean) / std,
            }
        };
        let mut table = Box::new([[0.0; 256]; 3]);
        for (channel, row) in table.iter_mut().enumerate() {
            for (level, entry) in row.iter_mut().enumerate() {
                *entry = value(channel, level);
            }
        }
        Self { table }
    }

    /// The values of one channel by level.
    pub fn channel(&self, channel: usize) -> &[f32; 256] {
        &self.table[channel]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn levels(scale: Option<f64>, channels: Option<([f64; 3], [f64; 3])>, arithmetic: Resampler) -> Levels {
        Levels::new(&Normalization { scale, channels }, arithmetic)
    }

    #[test]
    fn both_orders_of_operations_agree_to_the_last_bits() {
        let channels = Some((
            [0.481_454_66, 0.457_827_5, 0.408_210_73],
            [0.268_629_54, 0.261_302_58, 0.275_777_11],
        ));
        let [a, b] = [Resampler::Pillow, Resampler::Torchvision].map(|by| levels(Some(1.0 / 255.0), channels, by));
        assert_ne!(a, b);
        for channel in 0..3 {
            let pairs = a.channel(channel).iter().zip(b.channel(channel));
            assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-6));
        }
    }

    #[test]
    fn what_is_left_out_does_nothing() {
        assert_eq!(levels(None, None, Resampler::Pillow).channel(0)[255], 255.0);
        assert_eq!(levels(Some(0.5), None, Resampler::Torchvision).channel(1)[255], 127.5);
        assert_eq!(
            levels(None, Some(([5.0; 3], [2.0; 3])), Resampler::Pillow).channel(2)[255],
            125.0
        );
    }
}
