//! Who is compared with whom in a best of n, as the critic's knock-out has it: the calls of one job, without a critic.

use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

/// The winner of each pair goes on; the odd one has a bye and stands first in the next round.
#[derive(Clone, Debug)]
pub struct Knockout {
    remaining: Vec<usize>,
}

impl Knockout {
    /// Candidates in the order of their places.
    pub fn new(places: Vec<usize>) -> Self {
        Self { remaining: places }
    }

    /// The pairs of the next round, which may be compared at once; none once the winner is known.
    pub fn pairs(&self) -> Vec<[usize; 2]> {
        let pairs = self.remaining.chunks_exact(2);
        pairs.map(|pair| [pair[0], pair[1]]).collect()
    }

    /// Takes the winner of each pair of the round.
    pub fn record(&mut self, winners: &[usize]) {
        let odd = match self.remaining.len() {
            1 => None,
            _ => self.remaining.chunks_exact(2).remainder().first().copied(),
        };
        self.remaining = odd.into_iter().chain(winners.iter().copied()).collect();
    }

    /// Who is left, once there is one.
    pub fn winner(&self) -> Option<usize> {
        match self.remaining.as_slice() {
            [winner] => Some(*winner),
            _ => None,
        }
    }
}

/// The rounds of a contest of `n` whose critic never says which is better, so that lots decide: pairs in the order in which
/// the critic is shown them.
pub fn rounds(n: usize, seed: u64) -> Vec<Vec<[usize; 2]>> {
    let mut chance = ChaCha8Rng::seed_from_u64(seed);
    let mut permutation = || {
        let mut order = (0..n).collect::<Vec<_>>();
        order.shuffle(&mut chance);
        order
    };
    let (places, lots) = (permutation(), permutation());
    let mut knockout = Knockout::new(places);
    let mut rounds = Vec::new();
    loop {
        let pairs = knockout.pairs();
        if pairs.is_empty() {
            return rounds;
        }
        let lower = |pair: &[usize; 2]| pair[usize::from(lots[pair[1]] < lots[pair[0]])];
        knockout.record(&pairs.iter().map(lower).collect::<Vec<_>>());
        let shown = pairs.into_iter().map(|[first, second]| match chance.random() {
            true => [first, second],
            false => [second, first],
        });
        rounds.push(shown.collect());
    }
}

/// For each pair, in order, whether the candidate that it shows first was shown first before: a cache of prefixes knows
/// question and first answer then.
pub fn known_before(rounds: &[Vec<[usize; 2]>]) -> Vec<Vec<bool>> {
    let mut seen = std::collections::HashSet::new();
    let of_round = |round: &Vec<[usize; 2]>| round.iter().map(|[first, _]| !seen.insert(*first)).collect();
    rounds.iter().map(of_round).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_best_of_128_is_127_comparisons_in_seven_rounds() {
        let rounds = rounds(128, 1);
        let sizes = rounds.iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!(sizes, [64, 32, 16, 8, 4, 2, 1]);
        let mut first = rounds[0].concat();
        first.sort_unstable();
        assert_eq!(first, (0..128).collect::<Vec<_>>());
    }

    #[test]
    fn only_winners_go_on_and_the_odd_one_is_never_lost() {
        for n in 0..20 {
            let rounds = rounds(n, 7);
            assert_eq!(rounds.iter().map(Vec::len).sum::<usize>(), n.saturating_sub(1), "{n}");
            // Whoever lost is in no later round: every candidate but one loses once.
            let mut met = vec![0; n];
            rounds
                .iter()
                .flatten()
                .flatten()
                .for_each(|candidate| met[*candidate] += 1);
            assert!(met.iter().all(|count| n < 2 || *count > 0), "{n} {met:?}");
        }
        let mut knockout = Knockout::new(vec![4, 2, 9]);
        assert_eq!((knockout.pairs(), knockout.winner()), (vec![[4, 2]], None));
        knockout.record(&[2]);
        assert_eq!(knockout.pairs(), [[9, 2]]);
        knockout.record(&[9]);
        assert_eq!((knockout.pairs(), knockout.winner()), (Vec::new(), Some(9)));
    }

    #[test]
    fn a_prefix_is_known_where_its_candidate_was_shown_first_before() {
        let rounds = [vec![[0, 1], [3, 2]], vec![[3, 0]]];
        assert_eq!(known_before(&rounds), [vec![false, false], vec![true]]);
    }
}
