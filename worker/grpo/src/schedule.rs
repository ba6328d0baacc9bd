//! The learning rate over the run.

/// Form of the curve after the warm-up.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Curve {
    /// The same rate throughout.
    Constant,
    /// A straight line.
    Linear,
    /// Half a cosine.
    Cosine,
}

/// A learning rate that depends on the step alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Peak rate.
    pub peak: f64,
    /// Form after the warm-up.
    pub curve: Curve,
    /// Share of the peak that is left at the last step (Linear and Cosine).
    pub final_fraction: f64,
    /// Steps over which the rate rises to its peak.
    pub warmup: u32,
    /// Steps of the whole run.
    pub total: u32,
}

impl Schedule {
    /// Rate of a step, counted from 0. The first step of a warm-up of w steps has 1/w of the peak.
    pub fn rate(&self, step: u32) -> f64 {
        if step < self.warmup {
            return self.peak * f64::from(step + 1) / f64::from(self.warmup);
        }
        let span = self.total.saturating_sub(self.warmup).saturating_sub(1).max(1);
        let done = (f64::from(step - self.warmup) / f64::from(span)).min(1.0);
        let left = match self.curve {
            Curve::Constant => return self.peak,
            Curve::Linear => 1.0 - done,
            Curve::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        };
        self.peak * (self.final_fraction + (1.0 - self.final_fraction) * left)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn schedule(curve: Curve) -> Schedule {
        Schedule {
            peak: 2.0,
            curve,
            final_fraction: 0.25,
            warmup: 4,
            total: 11,
        }
    }

    #[test]
    fn the_rate_rises_to_its_peak_and_falls_to_its_last_share() {
        for curve in [Curve::Linear, Curve::Cosine] {
            let schedule = schedule(curve);
            assert_eq!(schedule.rate(0), 0.5);
            assert_eq!(schedule.rate(3), 2.0);
            assert_eq!(schedule.rate(4), 2.0);
            assert!((schedule.rate(7) - 1.25).abs() < 1e-12, "half way");
            assert!((schedule.rate(10) - 0.5).abs() < 1e-12);
        }
        assert_eq!(schedule(Curve::Constant).rate(10), 2.0);
    }

    proptest! {
        #[test]
        fn the_rate_never_leaves_its_bounds(step in 0_u32..200, total in 1_u32..150, warmup in 0_u32..20) {
            for curve in [Curve::Constant, Curve::Linear, Curve::Cosine] {
                let rate = Schedule { total, warmup, ..schedule(curve) }.rate(step);
                prop_assert!(rate > 0.0 && rate <= 2.0);
            }
        }
    }
}
