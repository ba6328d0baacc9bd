//! The policy loss of tokens, and its slope at each log-probability: a few numbers per token, of which a learner makes the
//! gradients of all weights. [`crate::loss`] has the same loss as a tensor.

/// Log-ratios beyond this are cut before the exponential.
pub(crate) const MAX_LOG_RATIO: f64 = 20.0;
/// The k3 estimate is cut at this magnitude.
pub(crate) const MAX_KL: f64 = 10.0;

/// Parameters of the policy loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PolicyLoss {
    /// The ratio is clipped below at `1 - clip_low`.
    pub clip_low: f64,
    /// The ratio is clipped above at `1 + clip_high`.
    pub clip_high: f64,
    /// For negative advantages the loss is at most `-dual_clip * advantage`; None turns it off.
    pub dual_clip: Option<f64>,
    /// Coefficient of the k3 KL estimate.
    pub kl_coefficient: f64,
}

/// What is known about each scored token before the update. Columns of equal length.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// Log-probability under the weights that sampled it.
    pub old: &'a [f32],
    /// Log-probability under the frozen reference; None leaves the KL term out.
    pub reference: Option<&'a [f32]>,
    /// Advantage.
    pub advantage: &'a [f32],
    /// Weight in the loss.
    pub weight: &'a [f32],
}

/// Weighted sums over tokens. Micro-batches add up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PolicyStatistics {
    /// What is minimised: policy loss and KL term.
    pub loss: f64,
    /// PolicyLoss loss without the KL term.
    pub policy_loss: f64,
    /// k3 KL estimate against the reference.
    pub kl: f64,
    /// k1 estimate against the sampling weights: mean of `old - new`.
    pub ppo_kl: f64,
    /// Share of tokens whose ratio was cut.
    pub clipped: f64,
    /// Share of tokens whose loss the dual clip bounded.
    pub dual_clipped: f64,
    /// Largest difference between a token's log-probability now and when it was sampled.
    pub max_log_ratio: f64,
}

impl std::ops::AddAssign for PolicyStatistics {
    fn add_assign(&mut self, other: Self) {
        self.loss += other.loss;
        self.policy_loss += other.policy_loss;
        self.kl += other.kl;
        self.ppo_kl += other.ppo_kl;
        self.clipped += other.clipped;
        self.dual_clipped += other.dual_clipped;
        self.max_log_ratio = self.max_log_ratio.max(other.max_log_ratio);
    }
}

/// A token's share of the loss and its slope.
#[derive(Clone, Copy, Debug, Default)]
struct Term {
    value: f64,
    slope: f64,
}

impl PolicyLoss {
    /// Writes the slope of the loss at each token's log-probability to `slopes`, and sums what metrics show. All slices are of
    /// one length.
    pub fn gradient(&self, log_probs: &[f32], known: Known<'_>, slopes: &mut Vec<f32>) -> PolicyStatistics {
        slopes.clear();
        let mut sums = PolicyStatistics::default();
        for (index, new) in log_probs.iter().enumerate() {
            let of = |column: &[f32]| f64::from(column[index]);
            let (new, old) = (f64::from(*new), of(known.old));
            let (advantage, weight) = (of(known.advantage), of(known.weight));
            let policy = self.token(new - old, advantage, weight, &mut sums);
            let kl = known
                .reference
                .map_or_else(Term::default, |reference| k3(of(reference) - new));
            sums.policy_loss += weight * policy.value;
            sums.kl += weight * kl.value;
            sums.loss += weight * (policy.value + self.kl_coefficient * kl.value);
            #[allow(clippy::cast_possible_truncation, reason = "slopes are kept in f32")]
            slopes.push((weight * (policy.slope + self.kl_coefficient * kl.slope)) as f32);
        }
        sums
    }

    /// The clipped loss of one token at `new - old`.
    fn token(&self, difference: f64, advantage: f64, weight: f64, sums: &mut PolicyStatistics) -> Term {
        let log_ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO);
        sums.ppo_kl -= weight * log_ratio;
        sums.max_log_ratio = sums.max_log_ratio.max(difference.abs());
        let ratio = log_ratio.exp();
        let unclipped = -advantage * ratio;
        let clipped = -advantage * ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high);
        // Beyond a cut the loss is constant.
        let flat = difference.abs() > MAX_LOG_RATIO;
        let mut term = Term {
            value: unclipped,
            slope: if flat { 0.0 } else { unclipped },
        };
        if unclipped < clipped {
            sums.clipped += weight;
            term = Term {
                value: clipped,
                slope: 0.0,
            };
        }
        if let Some(dual_clip) = self.dual_clip.filter(|_| advantage < 0.0) {
            let bound = -advantage * dual_clip;
            if term.value > bound {
                sums.dual_clipped += weight;
                term = Term {
                    value: bound,
                    slope: 0.0,
                };
            }
        }
        term
    }
}

/// `exp(x) - x - 1` with `x = reference - new`, and its slope along `new`.
fn k3(difference: f64) -> Term {
    let x = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO);
    let value = x.exp() - x - 1.0;
    let flat = difference.abs() > MAX_LOG_RATIO || value > MAX_KL;
    Term {
        value: value.min(MAX_KL),
        slope: if flat { 0.0 } else { 1.0 - x.exp() },
    }
}

/// Cross-entropy of given tokens: the weighted sum of their negative log-probabilities, whose slopes are written to `slopes`.
pub fn cross_entropy_slopes(log_probs: &[f32], weight: &[f32], slopes: &mut Vec<f32>) -> f64 {
    slopes.clear();
    slopes.extend(weight.iter().map(|weight| -weight));
    let terms = log_probs.iter().zip(weight);
    -terms
        .map(|(log_prob, weight)| f64::from(*log_prob) * f64::from(*weight))
        .sum::<f64>()
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const RELEASED: PolicyLoss = PolicyLoss {
        clip_low: 0.2,
        clip_high: 0.3,
        dual_clip: Some(3.0),
        kl_coefficient: 0.01,
    };

    /// The golden group of `crate::loss`: ten tokens of four completions, token mean.
    #[test]
    fn loss_slopes_and_statistics_equal_those_of_the_fork() {
        let old = [-1.0, -0.5, -2.0, -0.7, -1.2, -0.3, -0.9, -1.1, -0.2, -2.5_f32];
        let step = [0.3, -0.1, 0.05, 0.5, -0.4, 1.5, 0.0, -0.25, 0.2, -0.6_f32];
        let reference = [-1.1, -0.4, -2.2, -0.6, -1.5, -0.5, -0.9, -1.0, -0.4, -2.0_f32];
        let rewards = [1.0, 0.1, 0.0, 1.0_f64];
        let mean = rewards.iter().sum::<f64>() / 4.0;
        let deviation = (rewards.iter().map(|reward| (reward - mean).powi(2)).sum::<f64>() / 3.0).sqrt();
        let spread = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3_usize];
        let advantage = spread.map(|row| ((rewards[row] - mean) / (deviation + 1e-6)) as f32);
        let new: Vec<f32> = old.iter().zip(step).map(|(old, step)| old + step).collect();
        let known = Known {
            old: &old,
            reference: Some(&reference),
            advantage: &advantage,
            weight: &[0.1; 10],
        };
        let mut slopes = Vec::new();
        let sums = RELEASED.gradient(&new, known, &mut slopes);
        let expected = [
            0.000_329_68,
            -0.078_366_31,
            -0.090_570_23,
            0.127_730_62,
            -0.000_105_17,
            0.000_817_32,
            0.095_454_37,
            -0.000_419_07,
            0.116_917_91,
            -0.049_401_45_f32,
        ];
        for (found, expected) in slopes.iter().zip(expected) {
            assert!((found - expected).abs() < 2e-6, "{found} {expected}");
        }
        for (name, found, expected) in [
            ("loss", sums.loss, 0.437_504_29),
            ("pg_loss", sums.policy_loss, 0.435_382_04),
            ("k3", sums.kl, 0.212_225_15),
            ("ppo_kl", sums.ppo_kl, -0.12),
            ("pg_clipfrac_higher", sums.clipped, 0.3),
            ("pg_clipfrac_lower", sums.dual_clipped, 0.1),
        ] {
            assert!((found - expected).abs() < 2e-6, "{name} {found} {expected}");
        }
    }

    /// Wherever the loss is smooth, its slope is that of a chord.
    #[test]
    fn slopes_are_those_of_the_loss() {
        let mut random = ChaCha8Rng::seed_from_u64(5);
        let mut compared = 0;
        for _ in 0..4000 {
            let mut draw = |low: f32, high: f32| random.random_range(low..high);
            // One in four far apart, where cuts of log-ratio and KL hold.
            let reach = if draw(0.0, 1.0) < 0.25 { 30.0 } else { 2.0 };
            let (new, old, reference) = (draw(-reach, 0.0), draw(-reach, 0.0), draw(-reach, 0.0));
            let (advantage, weight) = (draw(-2.0, 2.0), draw(0.1, 1.0));
            let known = Known {
                old: &[old],
                reference: Some(&[reference]),
                advantage: &[advantage],
                weight: &[weight],
            };
            let at = |new: f32| {
                let mut slopes = Vec::new();
                let sums = RELEASED.gradient(&[new], known, &mut slopes);
                (sums, f64::from(slopes[0]))
            };
            let step = 1.0 / 1024.0;
            let ((below, _), (here, slope), (above, _)) = (at(new - step), at(new), at(new + step));
            let kinds = |sums: &PolicyStatistics| (sums.clipped > 0.0, sums.dual_clipped > 0.0);
            let cut = |at: f32| {
                (
                    (at - reference).abs() > 20.0,
                    (at - old).abs() > 20.0,
                    k3(f64::from(reference - at)).slope == 0.0,
                )
            };
            if kinds(&below) != kinds(&above) || cut(new - step) != cut(new + step) {
                continue;
            }
            compared += 1;
            let chord = (above.loss - below.loss) / (2.0 * f64::from(step));
            assert!(
                (chord - slope).abs() < 1e-3 * (1.0 + slope.abs()),
                "{chord} {slope} {new} {old} {reference} {advantage} {here:?}"
            );
        }
        assert!(compared > 3900, "{compared}");
    }

    #[test]
    fn cross_entropy_is_the_weighted_negative_log_probability() {
        let mut slopes = Vec::new();
        assert_eq!(cross_entropy_slopes(&[-1.0, -3.0], &[0.25, 0.5], &mut slopes), 1.75);
        assert_eq!(slopes, [-0.25, -0.5]);
    }
}
