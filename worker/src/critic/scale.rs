//! Scores: their labels, and the critic's distribution over them.

/// Labels of one scale.
pub const MAX_LABELS: usize = 101;

/// Equally spaced scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    min: f64,
    max: f64,
    step: f64,
}

impl Default for Scale {
    /// 1 to 10.
    fn default() -> Self {
        Self {
            min: 1.0,
            max: 10.0,
            step: 1.0,
        }
    }
}

/// Why there is no such scale.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum ScaleError {
    /// Not from a smaller to a larger number in positive steps.
    #[error("a scale from {min} to {max} in steps of {step} needs min < max and step > 0")]
    Empty {
        /// The least score.
        min: f64,
        /// The best score.
        max: f64,
        /// Between two scores.
        step: f64,
    },
    /// The steps do not end at the best score.
    #[error("steps of {step} from {min} do not reach {max}")]
    Uneven {
        /// The least score.
        min: f64,
        /// The best score.
        max: f64,
        /// Between two scores.
        step: f64,
    },
    /// Too many labels, each of which costs a sample.
    #[error("a scale from {min} to {max} in steps of {step} has {labels:.0} labels, more than {MAX_LABELS}")]
    TooFine {
        /// The least score.
        min: f64,
        /// The best score.
        max: f64,
        /// Between two scores.
        step: f64,
        /// Labels it would have.
        labels: f64,
    },
}

impl Scale {
    /// From `min` to `max` in steps of `step`.
    pub fn new(min: f64, max: f64, step: f64) -> Result<Self, ScaleError> {
        let finite = min.is_finite() && max.is_finite() && step.is_finite();
        if !(finite && min < max && step > 0.0) {
            return Err(ScaleError::Empty { min, max, step });
        }
        let steps = (max - min) / step;
        let labels = steps.round() + 1.0;
        if labels > MAX_LABELS as f64 {
            return Err(ScaleError::TooFine { min, max, step, labels });
        }
        if steps.round() < 1.0 || (steps - steps.round()).abs() > 1e-6 {
            return Err(ScaleError::Uneven { min, max, step });
        }
        Ok(Self { min, max, step })
    }

    /// The least score.
    pub fn min(&self) -> f64 {
        self.min
    }

    /// The best score.
    pub fn max(&self) -> f64 {
        self.max
    }

    /// Between two scores.
    pub fn step(&self) -> f64 {
        self.step
    }

    /// All scores, the least first.
    pub fn scores(&self) -> Vec<f64> {
        let steps = ((self.max - self.min) / self.step).round() as usize;
        (0..=steps)
            .map(|index| round(self.min + index as f64 * self.step))
            .collect()
    }

    /// A score as the critic writes it: `7`, `7.5`.
    pub fn label(score: f64) -> String {
        format!("{}", round(score))
    }

    /// The labels of [`Self::scores`].
    pub fn labels(&self) -> Vec<String> {
        self.scores().into_iter().map(Self::label).collect()
    }
}

/// Without the error of adding steps such as 0.1.
fn round(value: f64) -> f64 {
    let rounded = (value * 1e6).round() / 1e6;
    // No label is "-0".
    if rounded == 0.0 { 0.0 } else { rounded }
}

/// How likely a critic finds each score, given that it names one of the scale.
#[derive(Clone, Debug, PartialEq)]
pub struct Distribution {
    /// The scores, the least first.
    pub scores: Vec<f64>,
    /// Their probabilities; they sum to 1.
    pub probabilities: Vec<f64>,
    /// Probability that the critic names any score of the scale at all, as the model has it.
    pub mass: f64,
}

impl Distribution {
    /// Normalises log-probabilities (nats), one for each score. None unless at least one of them is finite.
    pub fn new(scores: Vec<f64>, log_probabilities: &[f64]) -> Option<Self> {
        let peak = log_probabilities.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if scores.len() != log_probabilities.len() || !peak.is_finite() {
            return None;
        }
        let weights: Vec<f64> = log_probabilities.iter().map(|value| (value - peak).exp()).collect();
        let sum: f64 = weights.iter().sum();
        Some(Self {
            scores,
            probabilities: weights.iter().map(|weight| weight / sum).collect(),
            mass: (peak + sum.ln()).exp().min(1.0),
        })
    }

    /// The mean score.
    pub fn expectation(&self) -> f64 {
        let weighted = self.scores.iter().zip(&self.probabilities);
        weighted.map(|(score, probability)| score * probability).sum()
    }

    /// The most likely score, of equally likely ones the least.
    pub fn mode(&self) -> Option<f64> {
        let mut best: Option<(f64, f64)> = None;
        for (score, probability) in self.scores.iter().zip(&self.probabilities) {
            if best.is_none_or(|(_, most)| *probability > most) {
                best = Some((*score, *probability));
            }
        }
        best.map(|(score, _)| score)
    }

    /// How undecided the critic is (nats): 0 for one score, ln n for n equally likely ones.
    pub fn entropy(&self) -> f64 {
        let terms = self.probabilities.iter().filter(|probability| **probability > 0.0);
        -terms.map(|probability| probability * probability.ln()).sum::<f64>()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn labels_are_written_as_people_write_them() {
        assert_eq!(Scale::default().labels().join(" "), "1 2 3 4 5 6 7 8 9 10");
        let halves = Scale::new(-0.5, 0.5, 0.5).expect("a scale");
        assert_eq!(halves.labels(), ["-0.5", "0", "0.5"]);
        let tenths = Scale::new(0.0, 1.0, 0.1).expect("a scale");
        assert_eq!(tenths.labels()[3], "0.3");
    }

    #[test]
    fn what_is_no_scale_is_refused_with_its_numbers() {
        for (min, max, step, reason) in [
            (1.0, 1.0, 1.0, "min < max"),
            (1.0, 10.0, 0.0, "step > 0"),
            (1.0, f64::NAN, 1.0, "min < max"),
            (0.0, 1000.0, 1.0, "1001 labels"),
            (1.0, 10.0, 2.0, "do not reach"),
        ] {
            let error = Scale::new(min, max, step).expect_err(reason).to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_distribution_has_its_mean_mode_and_entropy() {
        let log = |probability: f64| probability.ln();
        let distribution =
            Distribution::new(vec![1.0, 2.0, 3.0], &[log(0.1), log(0.3), f64::NEG_INFINITY]).expect("finite");
        assert!((distribution.mass - 0.4).abs() < 1e-12);
        assert!((distribution.expectation() - 1.75).abs() < 1e-12);
        assert_eq!(distribution.mode(), Some(2.0));
        let entropy = -(0.25 * 0.25f64.ln() + 0.75 * 0.75f64.ln());
        assert!((distribution.entropy() - entropy).abs() < 1e-12);
        assert!(Distribution::new(vec![1.0], &[f64::NEG_INFINITY]).is_none());
        assert!(Distribution::new(vec![1.0], &[]).is_none());
    }

    proptest! {
        #[test]
        fn probabilities_sum_to_one(values in prop::collection::vec(-50f64..0.0, 1..20)) {
            let scores = (0..values.len()).map(|index| index as f64).collect();
            let distribution = Distribution::new(scores, &values).expect("finite");
            prop_assert!((distribution.probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-9);
            prop_assert!(distribution.entropy() >= -1e-9);
            let last = (values.len() - 1) as f64;
            prop_assert!((0.0..=last + 1e-9).contains(&distribution.expectation()));
        }
    }
}
