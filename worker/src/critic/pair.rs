//! Two candidates in an order, what a critic says about them, and what both orders say together.

use flotilla_engine::FinishReason;

use crate::service::verdict::Verdict;

/// Two candidates, by index, in the order in which the critic is shown them.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Pair {
    /// Shown as response 1.
    pub first: usize,
    /// Shown as response 2.
    pub second: usize,
}

impl Pair {
    /// The same two in the other order.
    #[must_use]
    pub fn swapped(self) -> Self {
        Self {
            first: self.second,
            second: self.first,
        }
    }
}

/// What a critic said about a pair in one order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Opinion {
    /// Which response it prefers; None if it named none.
    pub verdict: Option<Verdict>,
    /// Log-odds of response 1 against response 2 (nats); None where they cannot be read.
    pub margin: Option<f64>,
    /// Why, in its words.
    pub rationale: Option<String>,
    /// All that it wrote.
    pub raw: String,
    /// Why it stopped writing; None if it wrote nothing.
    pub finish: Option<FinishReason>,
    /// Tokens of its prompt.
    pub prompt_tokens: usize,
    /// Tokens it wrote.
    pub completion_tokens: usize,
}

impl Opinion {
    /// An opinion about the swapped pair in terms of the pair itself.
    #[must_use]
    pub fn swapped(self) -> Self {
        Self {
            verdict: self.verdict.map(Verdict::swapped),
            margin: self.margin.map(|margin| -margin),
            ..self
        }
    }
}

/// What one or both orders say about a pair.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// The pair in the order in which it was asked first.
    pub pair: Pair,
    /// The verdict of all orders together, in terms of the pair.
    pub verdict: Option<Verdict>,
    /// Log-odds of the first candidate against the second, of two orders the mean.
    pub margin: Option<f64>,
    /// What was said about the pair.
    pub straight: Opinion,
    /// What was said about the swapped pair, in terms of the pair; None if only one order was asked.
    pub swapped: Option<Opinion>,
}

impl Comparison {
    /// Puts the opinions together; `swapped` is in terms of the swapped pair, as the critic gave it. Orders that agree
    /// keep their verdict. If they disagree, the sign of the mean margin decides, and without margins it is a tie. If one
    /// names none, the other one counts.
    pub fn settle(pair: Pair, straight: Opinion, swapped: Option<Opinion>) -> Self {
        let swapped = swapped.map(Opinion::swapped);
        let (verdict, margin) = match &swapped {
            None => (straight.verdict, straight.margin),
            Some(swapped) => combine(&straight, swapped),
        };
        Self {
            pair,
            verdict,
            margin,
            straight,
            swapped,
        }
    }

    /// Whether the orders name different responses; None if only one was asked, or one names none.
    pub fn flip(&self) -> Option<bool> {
        let swapped = self.swapped.as_ref()?;
        Some(self.straight.verdict? != swapped.verdict?)
    }

    /// The better candidate: that of the verdict; of a tie or none that of the margin's sign. None if neither says.
    pub fn better(&self) -> Option<usize> {
        let Pair { first, second } = self.pair;
        match (self.verdict, self.margin) {
            (Some(Verdict::First), _) => Some(first),
            (Some(Verdict::Second), _) => Some(second),
            (_, Some(margin)) if margin > 0.0 => Some(first),
            (_, Some(margin)) if margin < 0.0 => Some(second),
            _ => None,
        }
    }

    /// The one or two opinions.
    pub fn opinions(&self) -> impl Iterator<Item = &Opinion> {
        std::iter::once(&self.straight).chain(&self.swapped)
    }
}

/// The verdict and margin of both orders together, both in terms of the same pair.
fn combine(straight: &Opinion, swapped: &Opinion) -> (Option<Verdict>, Option<f64>) {
    let margin = straight.margin.zip(swapped.margin).map(|(a, b)| f64::midpoint(a, b));
    let verdict = match (straight.verdict, swapped.verdict) {
        (Some(a), Some(b)) if a == b => Some(a),
        (Some(_), Some(_)) => Some(match margin {
            Some(margin) if margin > 0.0 => Verdict::First,
            Some(margin) if margin < 0.0 => Verdict::Second,
            _ => Verdict::Tie,
        }),
        (one, other) => one.or(other),
    };
    (verdict, margin)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAIR: Pair = Pair { first: 4, second: 9 };

    fn opinion(verdict: Option<Verdict>, margin: Option<f64>) -> Opinion {
        Opinion {
            verdict,
            margin,
            ..Opinion::default()
        }
    }

    #[test]
    fn two_orders_that_agree_keep_their_verdict() {
        let straight = opinion(Some(Verdict::First), Some(2.0));
        let swapped = opinion(Some(Verdict::Second), Some(-1.0));
        let comparison = Comparison::settle(PAIR, straight, Some(swapped));
        assert_eq!(comparison.verdict, Some(Verdict::First));
        assert_eq!((comparison.better(), comparison.flip()), (Some(4), Some(false)));
        assert!((comparison.margin.expect("both") - 1.5).abs() < 1e-12);
    }

    #[test]
    fn two_orders_that_disagree_are_settled_by_how_sure_they_were() {
        // A critic that always says 1, more surely where the second response stands first.
        let straight = opinion(Some(Verdict::First), Some(0.5));
        let swapped = opinion(Some(Verdict::First), Some(2.0));
        let comparison = Comparison::settle(PAIR, straight.clone(), Some(swapped));
        assert_eq!(comparison.verdict, Some(Verdict::Second));
        assert_eq!((comparison.better(), comparison.flip()), (Some(9), Some(true)));
        let silent = opinion(Some(Verdict::First), None);
        let comparison = Comparison::settle(PAIR, straight, Some(silent));
        assert_eq!((comparison.verdict, comparison.margin), (Some(Verdict::Tie), None));
        assert_eq!(comparison.better(), None);
    }

    #[test]
    fn an_order_without_a_verdict_leaves_it_to_the_other() {
        let comparison = Comparison::settle(
            PAIR,
            opinion(None, None),
            Some(opinion(Some(Verdict::First), Some(1.0))),
        );
        assert_eq!((comparison.better(), comparison.flip()), (Some(9), None));
    }

    #[test]
    fn a_tie_leans_to_the_side_of_its_margin() {
        let comparison = Comparison::settle(PAIR, opinion(Some(Verdict::Tie), Some(-0.1)), None);
        assert_eq!((comparison.better(), comparison.flip()), (Some(9), None));
    }
}
