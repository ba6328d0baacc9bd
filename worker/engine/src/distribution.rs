//! Probabilities, and what `top_k`, `top_p` and `min_p` leave of them.

use std::{cell::RefCell, cmp::Ordering};

use crate::request::Sampling;

/// Tokens that are sorted at first to find a nucleus; four times as many each time that they do not suffice.
const FIRST_SORTED: usize = 256;

thread_local! {
    /// The ids of a vocabulary on their way to an order.
    static IDS: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// A softmax that is not materialised: `exp(logit / temperature - peak) / mass`.
#[derive(Clone, Copy, Debug)]
pub struct Distribution<'a> {
    logits: &'a [f32],
    scale: Scale,
}

/// What a softmax knows of its logits after a pass over all of them.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    inverse_temperature: f32,
    peak: f32,
    mass: f64,
}

/// The tokens that `top_k`, `top_p` and `min_p` leave, as [`Distribution::at`] walks over them: for many draws from the same logits.
#[derive(Clone, Debug)]
pub struct Cumulated {
    ids: Vec<u32>,
    /// Of the weights up to each of them.
    sums: Vec<f64>,
    /// What a random number of 1 would stand for.
    total: f64,
}

impl Cumulated {
    /// What [`Distribution::at`] gives.
    pub fn at(&self, uniform: f64) -> usize {
        let target = uniform * self.total;
        let exceeds = |sum: &f64| *sum > target;
        let at = self.sums.partition_point(|sum| !exceeds(sum));
        let id = self.ids.get(at).or(self.ids.last());
        id.map_or(0, |id| *id as usize)
    }
}

/// What is done with the tokens that are left, in the order in which they are cumulated, and their weight.
trait Visit {
    type Out;

    fn visit(self, distribution: &Distribution<'_>, ids: impl Iterator<Item = usize>, total: f64) -> Self::Out;
}

/// Takes the token for a random number.
struct At(f64);

impl Visit for At {
    type Out = usize;

    fn visit(self, distribution: &Distribution<'_>, ids: impl Iterator<Item = usize>, total: f64) -> usize {
        distribution.walk(ids, self.0 * total)
    }
}

/// Sums for all random numbers.
struct Cumulate;

impl Visit for Cumulate {
    type Out = Cumulated;

    fn visit(self, distribution: &Distribution<'_>, ids: impl Iterator<Item = usize>, total: f64) -> Cumulated {
        let (mut kept, mut sums, mut sum) = (Vec::new(), Vec::new(), 0.0);
        for id in ids {
            let weight = distribution.weight(id);
            if weight == 0.0 {
                continue;
            }
            sum += weight;
            kept.push(id as u32);
            sums.push(sum);
        }
        Cumulated { ids: kept, sums, total }
    }
}

impl<'a> Distribution<'a> {
    /// Of logits `[vocabulary]`; None if they give none (a NaN, or nothing finite).
    pub fn new(logits: &'a [f32], temperature: f32) -> Option<Self> {
        let inverse_temperature = 1.0 / temperature;
        let mut peak = f32::NEG_INFINITY;
        let mut broken = false;
        for logit in logits {
            broken |= logit.is_nan();
            peak = peak.max(*logit);
        }
        if broken || !peak.is_finite() {
            return None;
        }
        let scale = Scale {
            inverse_temperature,
            peak: peak * inverse_temperature,
            mass: 0.0,
        };
        let mut distribution = Self { logits, scale };
        distribution.scale.mass = (0..logits.len()).map(|id| distribution.weight(id)).sum();
        Some(distribution)
    }

    /// Of logits whose scale is known.
    pub fn with(logits: &'a [f32], scale: Scale) -> Self {
        Self { logits, scale }
    }

    /// What [`Self::with`] takes.
    pub fn scale(&self) -> Scale {
        self.scale
    }

    /// Probability of a token times the mass; that of the most likely token is 1.
    fn weight(&self, id: usize) -> f64 {
        let Scale {
            inverse_temperature,
            peak,
            ..
        } = self.scale;
        f64::from((self.logits[id] * inverse_temperature - peak).exp())
    }

    /// Natural logarithm of a token's probability; minus infinity outside the vocabulary.
    #[allow(clippy::cast_possible_truncation, reason = "log-probabilities are f32 throughout")]
    pub fn log_probability(&self, id: usize) -> f32 {
        let Scale {
            inverse_temperature,
            peak,
            mass,
        } = self.scale;
        match self.logits.get(id) {
            Some(logit) => (f64::from(logit * inverse_temperature - peak) - mass.ln()) as f32,
            None => f32::NEG_INFINITY,
        }
    }

    /// The token of the highest logit; of equals the one with the lowest id.
    pub fn most_likely(&self) -> usize {
        let better = |best: usize, id: usize| if self.logits[id] > self.logits[best] { id } else { best };
        (1..self.logits.len()).fold(0, better)
    }

    /// The `count` most likely tokens with their log-probabilities, most likely first; of equals the lower id.
    pub fn top(&self, count: usize) -> Vec<(u32, f32)> {
        let mut best: Vec<u32> = Vec::with_capacity(count + 1);
        for id in 0..self.logits.len() as u32 {
            let behind = best.len() >= count;
            if behind && best.last().is_none_or(|last| self.order(*last, id) == Ordering::Less) {
                continue;
            }
            let at = best.partition_point(|other| self.order(*other, id) == Ordering::Less);
            best.insert(at, id);
            best.truncate(count);
        }
        let of = |id: u32| (id, self.log_probability(id as usize));
        best.into_iter().map(of).collect()
    }

    /// The token that `uniform` in [0, 1) stands for among those that `top_k`, `top_p` and `min_p` leave.
    pub fn at(&self, uniform: f64, sampling: &Sampling) -> usize {
        self.visit(sampling, At(uniform))
    }

    /// [`Self::at`] for every random number.
    pub fn cumulate(&self, sampling: &Sampling) -> Cumulated {
        self.visit(sampling, Cumulate)
    }

    fn visit<V: Visit>(&self, sampling: &Sampling, visit: V) -> V::Out {
        let all = 0..self.logits.len();
        let min_weight = f64::from(sampling.min_p);
        if sampling.top_k > 0 || sampling.top_p < 1.0 {
            IDS.with_borrow_mut(|ids| self.visit_truncated(sampling, ids, visit))
        } else if min_weight > 0.0 {
            let kept = all.filter(|id| self.weight(*id) >= min_weight);
            let mass: f64 = kept.clone().map(|id| self.weight(id)).sum();
            visit.visit(self, kept, mass)
        } else {
            visit.visit(self, all, self.scale.mass)
        }
    }

    /// As [`Self::visit`], in falling probability.
    fn visit_truncated<V: Visit>(&self, sampling: &Sampling, ids: &mut Vec<u32>, visit: V) -> V::Out {
        ids.clear();
        ids.extend(0..self.logits.len() as u32);
        let mut sorted = 0;
        let mut total = self.scale.mass;
        if sampling.top_k > 0 {
            self.sort(ids, sampling.top_k);
            ids.truncate(sampling.top_k);
            sorted = ids.len();
            total = ids.iter().map(|id| self.weight(*id as usize)).sum();
        }
        let nucleus = f64::from(sampling.top_p) * total;
        let mut kept = 0.0;
        let mut count = 0;
        while count < ids.len() && (count == 0 || kept < nucleus) {
            if count == sorted {
                let more = FIRST_SORTED.max(sorted * 3);
                self.sort(&mut ids[sorted..], more);
                sorted = ids.len().min(sorted + more);
            }
            kept += self.weight(ids[count] as usize);
            count += 1;
        }
        let min_weight = f64::from(sampling.min_p);
        let enough = |id: &u32| self.weight(*id as usize) >= min_weight;
        let likely = ids[..count].partition_point(enough);
        if likely < count {
            count = likely;
            kept = ids[..count].iter().map(|id| self.weight(*id as usize)).sum();
        }
        visit.visit(self, ids[..count].iter().map(|id| *id as usize), kept)
    }

    /// Brings the `count` most likely of some ids to their front, in order.
    fn sort(&self, ids: &mut [u32], count: usize) {
        let count = count.min(ids.len());
        if count < ids.len() {
            ids.select_nth_unstable_by(count, |a, b| self.order(*a, *b));
        }
        ids[..count].sort_unstable_by(|a, b| self.order(*a, *b));
    }

    /// The more likely token is less; of equals the one with the lower id.
    fn order(&self, a: u32, b: u32) -> Ordering {
        let by_logit = self.logits[b as usize].total_cmp(&self.logits[a as usize]);
        by_logit.then(a.cmp(&b))
    }

    /// The token at which the cumulated weight exceeds `target`.
    fn walk(&self, ids: impl Iterator<Item = usize>, target: f64) -> usize {
        let mut cumulated = 0.0;
        let mut last = 0;
        for id in ids {
            let weight = self.weight(id);
            if weight == 0.0 {
                continue;
            }
            cumulated += weight;
            last = id;
            if cumulated > target {
                break;
            }
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definitions, with a full sort.
    fn reference(distribution: &Distribution<'_>, uniform: f64, sampling: &Sampling) -> usize {
        let mut ids: Vec<usize> = (0..distribution.logits.len()).collect();
        // A stable sort: tokens of equal probability stay in the order of their ids.
        ids.sort_by(|a, b| distribution.logits[*b].total_cmp(&distribution.logits[*a]));
        if sampling.top_k > 0 {
            ids.truncate(sampling.top_k);
        }
        let nucleus = f64::from(sampling.top_p) * ids.iter().map(|id| distribution.weight(*id)).sum::<f64>();
        let mut kept = 0.0;
        let mut count = 0;
        while count < ids.len() && (count == 0 || kept < nucleus) {
            kept += distribution.weight(ids[count]);
            count += 1;
        }
        ids.truncate(count);
        ids.retain(|id| distribution.weight(*id) >= f64::from(sampling.min_p));
        let mass: f64 = ids.iter().map(|id| distribution.weight(*id)).sum();
        if sampling.top_k == 0 && sampling.top_p >= 1.0 {
            ids.sort_unstable();
        }
        let mut cumulated = 0.0;
        let above = |id: &&usize| {
            cumulated += distribution.weight(**id);
            cumulated > uniform * mass
        };
        let likely = ids.iter().filter(|id| distribution.weight(**id) > 0.0);
        let last = likely.clone().next_back().copied().unwrap_or(0);
        likely
            .copied()
            .collect::<Vec<_>>()
            .iter()
            .find(above)
            .copied()
            .unwrap_or(last)
    }

    fn logits() -> impl Strategy<Value = Vec<f32>> {
        let one = prop_oneof![
            9 => -12f32..12.0,
            3 => (0i8..4).prop_map(f32::from),
            1 => Just(f32::NEG_INFINITY),
        ];
        prop::collection::vec(one, 1..1500)
    }

    proptest! {
        #[test]
        fn a_selection_draws_what_a_full_sort_draws(
            logits in logits(),
            temperature in 0.1f32..3.0,
            top_k in prop_oneof![Just(0usize), 1usize..1600],
            top_p in prop_oneof![Just(1f32), 0.01f32..1.0],
            min_p in prop_oneof![Just(0f32), 0.001f32..=1.0],
            uniform in 0f64..1.0,
        ) {
            prop_assume!(logits.iter().any(|logit| logit.is_finite()));
            let distribution = Distribution::new(&logits, temperature).expect("a distribution");
            let sampling = Sampling { top_k, top_p, min_p, ..Sampling::default() };
            let expected = reference(&distribution, uniform, &sampling);
            prop_assert_eq!(distribution.at(uniform, &sampling), expected);
            prop_assert_eq!(distribution.cumulate(&sampling).at(uniform), expected, "summed once for many draws");
        }

        #[test]
        fn the_top_tokens_are_the_first_of_a_full_sort(logits in logits(), count in 0usize..40) {
            prop_assume!(logits.iter().any(|logit| logit.is_finite()));
            let distribution = Distribution::new(&logits, 1.0).expect("a distribution");
            let mut ids: Vec<usize> = (0..logits.len()).collect();
            ids.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
            ids.truncate(count);
            let expected: Vec<(u32, f32)> =
                ids.iter().map(|id| (*id as u32, distribution.log_probability(*id))).collect();
            prop_assert_eq!(distribution.top(count), expected);
        }
    }
}
