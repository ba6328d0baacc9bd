//! What the kernels compute, with a full sort: the rules of the engine's sampler.

use std::cmp::Ordering;

/// Up to so many tokens that `top_k` and `top_p` have left are walked in falling probability, more in the order of their ids.
pub const MOST_SORTED: usize = 1024;

/// How a token is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct How {
    /// What logits are divided by; 0 takes the most likely token.
    pub temperature: f32,
    /// Keeps that many tokens; 0 keeps all.
    pub top_k: u32,
    /// Keeps the fewest tokens that reach this share of what `top_k` has left.
    pub top_p: f32,
    /// Keeps tokens that are at least this likely, relative to the most likely.
    pub min_p: f32,
    /// In [0, 1).
    pub uniform: f32,
}

impl How {
    /// From the whole distribution at temperature 1.
    pub fn plain(uniform: f32) -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            uniform,
        }
    }
}

/// A token with its log-probabilities.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Token {
    /// The token.
    pub id: u32,
    /// In the tempered distribution, nothing cut off.
    pub log_prob: f32,
    /// At temperature 1.
    pub model_log_prob: f32,
}

/// A row of logits that gives a distribution.
#[derive(Clone, Debug)]
pub struct Row<'a> {
    logits: &'a [f32],
    peak: f32,
    /// Tokens in falling order of logits, of equals the lower id first.
    order: Vec<u32>,
}

impl<'a> Row<'a> {
    /// None if the logits give no distribution.
    pub fn new(logits: &'a [f32]) -> Option<Self> {
        let peak = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if !peak.is_finite() || logits.iter().any(|logit| logit.is_nan()) {
            return None;
        }
        let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]);
        let mut order = (0..u32::try_from(logits.len()).unwrap_or(u32::MAX)).collect::<Vec<_>>();
        order.sort_by(|a, b| by_logit(a, b).then(a.cmp(b)));
        Some(Self { logits, peak, order })
    }

    /// Of the most likely token it is 1.
    fn weight(&self, id: u32, temperature: f32) -> f64 {
        ((f64::from(self.logits[id as usize]) - f64::from(self.peak)) / f64::from(temperature)).exp()
    }

    fn mass(&self, temperature: f32) -> f64 {
        self.order.iter().map(|id| self.weight(*id, temperature)).sum()
    }

    #[allow(clippy::cast_possible_truncation, reason = "log-probabilities are f32")]
    fn log_prob(&self, id: u32, temperature: f32, mass: f64) -> f32 {
        let below = (f64::from(self.logits[id as usize]) - f64::from(self.peak)) / f64::from(temperature);
        (below - mass.ln()) as f32
    }

    /// What `top_k`, `top_p` and `min_p` leave, in the order in which their probability is cumulated.
    pub fn kept(&self, how: &How) -> Vec<u32> {
        let weight = |id: &u32| self.weight(*id, how.temperature);
        let mut kept = self.order.clone();
        if how.top_k > 0 {
            kept.truncate(how.top_k as usize);
        }
        if how.top_p < 1.0 {
            let nucleus = f64::from(how.top_p) * kept.iter().map(weight).sum::<f64>();
            let mut mass = 0.0;
            let mut count = 0;
            while count < kept.len() && (count == 0 || mass < nucleus) {
                mass += weight(&kept[count]);
                count += 1;
            }
            kept.truncate(count);
        }
        let falling = (how.top_k > 0 || how.top_p < 1.0) && kept.len() <= MOST_SORTED;
        kept.retain(|id| weight(id) >= f64::from(how.min_p));
        if !falling {
            kept.sort_unstable();
        }
        kept
    }

    /// The token that is drawn.
    pub fn draw(&self, how: &How) -> Token {
        if how.temperature == 0.0 {
            let better = |best: u32, id: u32| match self.logits[id as usize].partial_cmp(&self.logits[best as usize]) {
                Some(Ordering::Greater) => id,
                _ => best,
            };
            let id = (0..u32::try_from(self.logits.len()).unwrap_or(u32::MAX)).fold(0, better);
            return self.scored(id, 1.0);
        }
        let weight = |id: &u32| self.weight(*id, how.temperature);
        let kept = self.kept(how);
        let target = f64::from(how.uniform) * kept.iter().map(weight).sum::<f64>();
        let mut cumulated = 0.0;
        let mut drawn = 0;
        for id in kept.iter().filter(|id| weight(id) > 0.0) {
            cumulated += weight(id);
            drawn = *id;
            if cumulated > target {
                break;
            }
        }
        self.scored(drawn, how.temperature)
    }

    /// A token with its log-probabilities.
    pub fn scored(&self, id: u32, temperature: f32) -> Token {
        let temperature = if temperature == 0.0 { 1.0 } else { temperature };
        Token {
            id,
            log_prob: self.log_prob(id, temperature, self.mass(temperature)),
            model_log_prob: self.log_prob(id, 1.0, self.mass(1.0)),
        }
    }

    /// The `count` most likely tokens with their log-probabilities at temperature 1.
    pub fn top(&self, count: usize) -> Vec<(u32, f32)> {
        let mass = self.mass(1.0);
        let of = |id: &u32| (*id, self.log_prob(*id, 1.0, mass));
        self.order.iter().take(count).map(of).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn logits() -> impl Strategy<Value = Vec<f32>> {
        let one = prop_oneof![
            9 => -12f32..12.0,
            3 => (0i8..4).prop_map(f32::from),
            1 => Just(f32::NEG_INFINITY),
        ];
        prop::collection::vec(one, 1..200).prop_filter("something finite", |all| all.iter().any(|one| one.is_finite()))
    }

    fn how() -> impl Strategy<Value = How> {
        (
            0.1f32..3.0,
            prop_oneof![Just(0u32), 1u32..250],
            prop_oneof![Just(1f32), 0.01f32..1.0],
            prop_oneof![Just(0f32), 0.001f32..=1.0],
            0f32..1.0,
        )
            .prop_map(|(temperature, top_k, top_p, min_p, uniform)| How {
                temperature,
                top_k,
                top_p,
                min_p,
                uniform,
            })
    }

    #[test]
    fn the_walk_is_in_the_order_of_the_ids_or_in_falling_probability() {
        let logits = [1f32.ln(), 5f32.ln(), 2f32.ln()];
        let row = Row::new(&logits).expect("a distribution");
        for (uniform, id) in [(0.0, 0), (0.124, 0), (0.126, 1), (0.749, 1), (0.751, 2), (0.999, 2)] {
            assert_eq!(row.draw(&How::plain(uniform)).id, id);
        }
        for (uniform, id) in [(0.0, 1), (0.624, 1), (0.626, 2), (0.874, 2), (0.876, 0)] {
            let all = How {
                top_k: 3,
                ..How::plain(uniform)
            };
            assert_eq!(row.draw(&all).id, id);
        }
    }

    #[test]
    fn many_tokens_are_walked_in_the_order_of_the_ids() {
        let logits = (0..3000).map(|id| id as f32 * 1e-3).collect::<Vec<_>>();
        let row = Row::new(&logits).expect("a distribution");
        let kept = |top_k| {
            row.kept(&How {
                top_k,
                ..How::plain(0.0)
            })
        };
        assert_eq!(kept(1024)[0], 2999);
        assert_eq!(kept(1025)[0], 3000 - 1025);
    }

    #[test]
    fn of_equals_the_lowest_ids_are_kept() {
        let row = Row::new(&[0.0, 1.0, 0.0, 1.0, 0.0]).expect("a distribution");
        let how = How {
            top_k: 3,
            ..How::plain(0.5)
        };
        assert_eq!(row.kept(&how), [1, 3, 0]);
        assert_eq!(
            row.draw(&How {
                temperature: 0.0,
                ..how
            })
            .id,
            1
        );
    }

    #[test]
    fn broken_logits_give_no_row() {
        for logits in [
            vec![0.0, f32::NAN],
            vec![f32::NEG_INFINITY; 3],
            vec![],
            vec![f32::INFINITY, 0.0],
        ] {
            assert!(Row::new(&logits).is_none());
        }
    }

    proptest! {
        #[test]
        fn a_drawn_token_is_kept_and_possible(logits in logits(), how in how()) {
            let row = Row::new(&logits).expect("a distribution");
            let token = row.draw(&how);
            prop_assert!(row.kept(&how).contains(&token.id));
            prop_assert!(token.log_prob <= 0.0 && token.log_prob.is_finite());
        }

        #[test]
        fn cutting_keeps_the_most_likely(logits in logits(), how in how()) {
            let row = Row::new(&logits).expect("a distribution");
            let mut kept = row.kept(&how);
            kept.sort_unstable();
            prop_assert!(!kept.is_empty());
            let mut first = row.order[..kept.len()].to_vec();
            first.sort_unstable();
            prop_assert_eq!(&kept, &first);
            prop_assert!(how.top_k == 0 || kept.len() <= how.top_k as usize);
        }

        #[test]
        fn the_nucleus_is_the_smallest_set_that_reaches_its_share(logits in logits(), top_p in 0.01f32..1.0) {
            let row = Row::new(&logits).expect("a distribution");
            let how = How { top_p, ..How::plain(0.0) };
            let weights = row.kept(&how).iter().map(|id| row.weight(*id, 1.0)).collect::<Vec<_>>();
            let (mass, least) = (weights.iter().sum::<f64>(), weights.iter().copied().fold(f64::INFINITY, f64::min));
            let nucleus = f64::from(top_p) * row.mass(1.0);
            prop_assert!(mass >= nucleus - 1e-9);
            prop_assert!(weights.len() == 1 || mass - least < nucleus + 1e-9);
        }

        #[test]
        fn a_larger_number_never_draws_an_earlier_token(logits in logits(), how in how(), more in 0f32..1.0) {
            let row = Row::new(&logits).expect("a distribution");
            let higher = How { uniform: how.uniform.max(more), ..how };
            let kept = row.kept(&how);
            let at = |how: &How| kept.iter().position(|id| *id == row.draw(how).id);
            prop_assert!(at(&how) <= at(&higher));
        }
    }
}
