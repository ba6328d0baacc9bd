//! The probability that a good candidate wins: `good` of `n` are good, the rest is not, they stand in random order, and the
//! critic names the good one of an unequal pair with probability `p`. No sampling.

use super::super::{
    bracket::{Kind, Meeting},
    draw::Draw,
};

pub fn accuracy(kind: Kind, n: usize, good: usize, p: f64) -> f64 {
    match kind {
        Kind::Knockout => knockout(n, good, p),
        Kind::Sequential => sequential(n, good, p),
        Kind::RoundRobin => round_robin(n, good, p),
    }
}

/// For each number of good leaves under a node of the bracket, over all ways to place them: how many ways, weighted by
/// the probability that the node's winner is good, or is not.
#[derive(Clone)]
struct Node {
    good: Vec<f64>,
    bad: Vec<f64>,
}

/// From the leaves up. Good leaves are placed uniformly, so the root's weight divided by the number of placements is the
/// probability.
fn knockout(n: usize, good: usize, p: f64) -> f64 {
    let entrants: Vec<usize> = (0..n).collect();
    let mut bracket = Kind::Knockout.bracket(&entrants, &Draw::new(0, n));
    let leaf = Node {
        good: vec![0.0, 1.0],
        bad: vec![1.0, 0.0],
    };
    let mut nodes = vec![leaf; n];
    loop {
        let pairs = bracket.pairs();
        if pairs.is_empty() {
            break;
        }
        let meetings: Vec<Meeting> = pairs
            .into_iter()
            .map(|pair| {
                nodes[pair.first] = meet(&nodes[pair.first], &nodes[pair.second], p);
                Meeting {
                    pair,
                    winner: pair.first,
                    by_lot: false,
                    margin: None,
                }
            })
            .collect();
        bracket.record(&meetings);
    }
    let root = &nodes[bracket.winner().expect("entrants")];
    root.good[good] / (root.good[good] + root.bad[good])
}

fn meet(a: &Node, b: &Node, p: f64) -> Node {
    let size = a.good.len() + b.good.len() - 1;
    let mut node = Node {
        good: vec![0.0; size],
        bad: vec![0.0; size],
    };
    for (i, (good_a, bad_a)) in a.good.iter().zip(&a.bad).enumerate() {
        for (j, (good_b, bad_b)) in b.good.iter().zip(&b.bad).enumerate() {
            let mixed = good_a * bad_b + bad_a * good_b;
            node.good[i + j] += good_a * good_b + p * mixed;
            node.bad[i + j] += bad_a * bad_b + (1.0 - p) * mixed;
        }
    }
    node
}

/// The same for a power of two, round by round: of `m` good among `n` the number of mixed pairs has a hypergeometric-like
/// distribution, and a binomial number of them sends its good one on.
pub fn knockout_by_rounds(n: usize, good: usize, p: f64) -> f64 {
    let mut counts = vec![0.0; n + 1];
    counts[good] = 1.0;
    let mut size = n;
    while size > 1 {
        let pairs = size / 2;
        let mut next = vec![0.0; pairs + 1];
        for (m, probability) in counts.iter().enumerate().filter(|(_, probability)| **probability > 0.0) {
            for mixed in (m % 2..=m.min(size - m)).step_by(2) {
                let both_good = (m - mixed) / 2;
                let both_bad = pairs - both_good - mixed;
                // Ways to choose which pairs are what, and which of a mixed pair is good, of all ways to place m.
                let ways = ln_factorial(pairs) - ln_factorial(both_good) - ln_factorial(mixed) - ln_factorial(both_bad)
                    + mixed as f64 * 2f64.ln()
                    - ln_binomial(size, m);
                for sent_on in 0..=mixed {
                    let binomial = ln_binomial(mixed, sent_on).exp()
                        * p.powi(sent_on as i32)
                        * (1.0 - p).powi((mixed - sent_on) as i32);
                    next[both_good + sent_on] += probability * ways.exp() * binomial;
                }
            }
        }
        counts = next;
        size = pairs;
    }
    counts[1]
}

/// The order is random: each next one is good with the share of good ones that are left.
fn sequential(n: usize, good: usize, p: f64) -> f64 {
    // [number of good ones seen] -> probability, by whether the champion is good.
    let mut champion_good = vec![0.0; good + 2];
    let mut champion_bad = vec![0.0; good + 2];
    champion_good[1] = good as f64 / n as f64;
    champion_bad[0] = 1.0 - champion_good[1];
    for seen in 1..n {
        let mut next_good = vec![0.0; good + 2];
        let mut next_bad = vec![0.0; good + 2];
        for so_far in 0..=good.min(seen) {
            let next_is_good = (good - so_far) as f64 / (n - seen) as f64;
            let (g, b) = (champion_good[so_far], champion_bad[so_far]);
            next_good[so_far + 1] += next_is_good * (g + b * p);
            next_bad[so_far + 1] += next_is_good * b * (1.0 - p);
            next_good[so_far] += (1.0 - next_is_good) * g * p;
            next_bad[so_far] += (1.0 - next_is_good) * (b + g * (1.0 - p));
        }
        (champion_good, champion_bad) = (next_good, next_bad);
    }
    champion_good.iter().sum()
}

/// Every outcome of every pair. Equal numbers of wins are parted by the lot, as a critic without margins leaves them.
fn round_robin(n: usize, good: usize, p: f64) -> f64 {
    let pairs: Vec<(usize, usize)> = (0..n).flat_map(|a| (a + 1..n).map(move |b| (a, b))).collect();
    let mut won = 0.0;
    for outcome in 0..1_u32 << pairs.len() {
        let mut wins = vec![0; n];
        let mut probability = 1.0;
        for (index, (a, b)) in pairs.iter().enumerate() {
            let first_wins = outcome >> index & 1 == 1;
            wins[if first_wins { *a } else { *b }] += 1;
            // Candidates below `good` are good, so the first of a mixed pair is.
            probability *= match (*a < good) == (*b < good) {
                true => 0.5,
                false if first_wins => p,
                false => 1.0 - p,
            };
        }
        let most = wins.iter().max().expect("entrants");
        let best: Vec<usize> = (0..n).filter(|candidate| wins[*candidate] == *most).collect();
        let share = best.iter().filter(|candidate| **candidate < good).count() as f64 / best.len() as f64;
        won += probability * share;
    }
    won
}

fn ln_factorial(n: usize) -> f64 {
    (2..=n).map(|value| (value as f64).ln()).sum()
}

fn ln_binomial(n: usize, k: usize) -> f64 {
    ln_factorial(n) - ln_factorial(k) - ln_factorial(n - k)
}
