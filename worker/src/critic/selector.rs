//! The ways to choose among candidates.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::bracket::Kind;

/// Comparisons of one contest.
pub const MAX_COMPARISONS: usize = 2048;

/// How one of many candidates is chosen.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Selector {
    /// Pairs, of which the better ones go on: n - 1 comparisons in ⌈log₂ n⌉ batches.
    #[default]
    Knockout,
    /// Everybody meets everybody, and most wins count: n (n - 1) / 2 comparisons in one batch.
    RoundRobin,
    /// The champion meets the next one: n - 1 comparisons, one after another.
    Sequential,
    /// The most frequent answer; the critic is not asked.
    Majority,
    /// The highest expected score: n scores in one batch.
    Pointwise,
}

impl Selector {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Knockout,
        Self::RoundRobin,
        Self::Sequential,
        Self::Majority,
        Self::Pointwise,
    ];

    /// The bracket of a selector that compares pairs.
    pub fn kind(self) -> Option<Kind> {
        match self {
            Self::Knockout => Some(Kind::Knockout),
            Self::RoundRobin => Some(Kind::RoundRobin),
            Self::Sequential => Some(Kind::Sequential),
            Self::Majority | Self::Pointwise => None,
        }
    }

    /// Its name in requests and answers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Knockout => "knockout",
            Self::RoundRobin => "round_robin",
            Self::Sequential => "sequential",
            Self::Majority => "majority",
            Self::Pointwise => "pointwise",
        }
    }

    /// Why it cannot choose among these many candidates.
    pub fn refusal(self, candidates: usize) -> Option<String> {
        let comparisons = self.kind()?.comparisons(candidates);
        (comparisons > MAX_COMPARISONS).then(|| {
            format!(
                "{} of {candidates} candidates takes {comparisons} comparisons, the limit is {MAX_COMPARISONS}: ask for fewer \
                 candidates or another selector",
                self.name()
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_robin_of_64_is_played_and_one_of_65_refused() {
        assert_eq!(Selector::RoundRobin.refusal(64), None);
        let refusal = Selector::RoundRobin.refusal(65).expect("too many");
        assert!(refusal.contains("65 candidates takes 2080 comparisons"), "{refusal}");
        assert_eq!(Selector::Knockout.refusal(128), None);
    }
}
