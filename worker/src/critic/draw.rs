//! Everything that chance decides, from the seed: the same seed, the same contest.

use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::pair::Pair;

/// Which stream of the seed decides what.
const LOTS: u64 = 1;
const PLACES: u64 = 2;
const SHOWN_FIRST: u64 = 3;

/// What chance decides in a contest.
#[derive(Clone, Debug)]
pub struct Draw {
    seed: u64,
    /// For each candidate its lot; the lower one wins where the critic cannot tell.
    lots: Vec<usize>,
}

impl Draw {
    /// For these many candidates.
    pub fn new(seed: u64, candidates: usize) -> Self {
        let mut lots: Vec<usize> = (0..candidates).collect();
        lots.shuffle(&mut stream(seed, LOTS));
        Self { seed, lots }
    }

    /// The lot of a candidate.
    pub fn lot(&self, candidate: usize) -> usize {
        self.lots.get(candidate).copied().unwrap_or(usize::MAX)
    }

    /// Who wins where the critic cannot tell.
    pub fn by_lot(&self, pair: Pair) -> usize {
        if self.lot(pair.first) <= self.lot(pair.second) {
            pair.first
        } else {
            pair.second
        }
    }

    /// The entrants in the order of their places in the bracket.
    pub fn places(&self, entrants: &[usize]) -> Vec<usize> {
        let mut places = entrants.to_vec();
        places.shuffle(&mut stream(self.seed, PLACES));
        places
    }

    /// The pair with the candidate first that the seed shows first: a critic that prefers a place favours nobody. It does
    /// not depend on who asks, so that all selectors ask the same about the same two.
    pub fn shown(&self, pair: Pair) -> Pair {
        let (low, high) = (pair.first.min(pair.second), pair.first.max(pair.second));
        let mut coin = stream(self.seed, SHOWN_FIRST);
        coin.set_word_pos(((low as u128) << 40) + ((high as u128) << 4));
        let pair = Pair {
            first: low,
            second: high,
        };
        if coin.random() { pair } else { pair.swapped() }
    }
}

fn stream(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_stream(stream);
    generator
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_shown_first_does_not_depend_on_the_order_of_asking() {
        let draw = Draw::new(5, 64);
        let mut low_first = 0;
        for first in 0..64 {
            for second in 0..first {
                let pair = Pair { first, second };
                let shown = draw.shown(pair);
                assert_eq!(shown, draw.shown(pair.swapped()));
                low_first += usize::from(shown.first == second);
            }
        }
        // 2016 fair coins: four standard deviations are 90.
        assert!((918..=1098).contains(&low_first), "{low_first}");
    }

    #[test]
    fn lots_are_a_permutation_of_the_seed() {
        let lots = |seed| (0..9).map(|index| Draw::new(seed, 9).lot(index)).collect::<Vec<_>>();
        let mut sorted = lots(1);
        assert_eq!(lots(1), lots(1));
        assert_ne!(lots(1), lots(2));
        sorted.sort_unstable();
        assert_eq!(sorted, (0..9).collect::<Vec<_>>());
    }
}
