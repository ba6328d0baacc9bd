//! The statistics of selection: a scripted critic of known accuracy against what mathematics says it reaches.

mod analytic;
mod scripted;

use futures::executor::block_on;
use proptest::prelude::*;
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use self::scripted::Scripted;
use super::{
    bracket::Kind,
    contest::{Played, Rules, play},
    remember::Remembering,
};

const KINDS: [Kind; 3] = [Kind::Knockout, Kind::Sequential, Kind::RoundRobin];

fn contest(kind: Kind, critic: &Scripted, seed: u64, both_orders: bool) -> Played {
    let entrants: Vec<usize> = (0..critic.quality.len()).collect();
    let rules = Rules { seed, both_orders };
    match block_on(play(kind, &entrants, rules, critic, |_| {})) {
        Ok(played) => played,
        Err(never) => match never {},
    }
}

/// Share of `contests` that a good candidate wins, `good` of `n` being good.
fn measured(kind: Kind, n: usize, good: usize, accuracy: f64, contests: u64) -> f64 {
    let mut chance = ChaCha8Rng::seed_from_u64(n as u64 + 1000 * good as u64);
    let mut won = 0;
    for seed in 0..contests {
        let mut quality: Vec<f64> = (0..n).map(|index| f64::from(u8::from(index < good))).collect();
        quality.shuffle(&mut chance);
        let critic = Scripted::new(quality, accuracy, seed);
        let winner = contest(kind, &critic, seed, false).winner.expect("entrants");
        won += u64::from(critic.quality[winner] > 0.5);
    }
    won as f64 / contests as f64
}

/// Fails unless the share of `contests` lies within three standard deviations of what is expected.
fn within_three_sigma(kind: Kind, n: usize, good: usize, accuracy: f64, contests: u64) {
    let expected = analytic::accuracy(kind, n, good, accuracy);
    let measured = measured(kind, n, good, accuracy, contests);
    let sigma = (expected * (1.0 - expected) / contests as f64).sqrt();
    assert!(
        (measured - expected).abs() <= 3.0 * sigma,
        "{kind:?} of {n}, {good} good, accuracy {accuracy}: measured {measured:.4}, expected {expected:.4} ± {sigma:.4}"
    );
}

#[test]
fn a_knockout_of_128_wins_as_often_as_the_recursion_says() {
    for (good, accuracy) in [(1, 0.9), (16, 0.6), (16, 0.8), (64, 0.55), (127, 0.7)] {
        within_three_sigma(Kind::Knockout, 128, good, accuracy, 2000);
    }
}

#[test]
fn a_knockout_with_byes_wins_as_often_as_the_recursion_says() {
    for (n, good) in [(3, 1), (6, 2), (11, 4), (100, 20)] {
        within_three_sigma(Kind::Knockout, n, good, 0.75, 2000);
    }
}

#[test]
fn a_sequential_contest_wins_as_often_as_the_recursion_says() {
    for (n, good, accuracy) in [(2, 1, 0.7), (5, 2, 0.8), (128, 16, 0.8), (128, 100, 0.6)] {
        within_three_sigma(Kind::Sequential, n, good, accuracy, 2000);
    }
}

#[test]
fn a_round_robin_wins_as_often_as_all_its_outcomes_say() {
    for (n, good, accuracy) in [(2, 1, 0.7), (3, 1, 0.8), (4, 2, 0.7), (5, 1, 0.8), (6, 3, 0.6)] {
        within_three_sigma(Kind::RoundRobin, n, good, accuracy, 2000);
    }
}

#[test]
fn same_seed_same_contest() {
    for kind in KINDS {
        let quality: Vec<f64> = (0..9).map(f64::from).collect();
        let play = || contest(kind, &Scripted::new(quality.clone(), 0.7, 3), 11, true);
        assert_eq!(play(), play());
    }
}

#[test]
fn a_critic_that_always_says_1_is_exposed_by_both_orders() {
    for kind in KINDS {
        let critic = Scripted::always_first(16);
        let played = contest(kind, &critic, 1, true);
        assert_eq!(played.tally.flips, played.tally.comparisons);
        assert_eq!(played.tally.by_lot, played.tally.comparisons);
        // One order alone shows nothing.
        assert_eq!(contest(kind, &critic, 1, false).tally.flips, 0);
    }
}

#[test]
fn a_critic_that_always_says_1_favours_no_candidate() {
    for kind in KINDS {
        for both_orders in [false, true] {
            let mut wins = [0_u32; 4];
            let critic = Scripted::always_first(4);
            for seed in 0..2000 {
                let winner = contest(kind, &critic, seed, both_orders).winner.expect("entrants");
                wins[winner] += 1;
            }
            // 2000 draws of probability 1/4: four standard deviations are 78.
            assert!(
                wins.iter().all(|won| won.abs_diff(500) <= 78),
                "{kind:?} {both_orders} {wins:?}"
            );
        }
    }
}

#[test]
fn several_selectors_ask_about_a_pair_once() {
    let critic = Remembering::new(Scripted::new((0..6).map(f64::from).collect(), 1.0, 0));
    let rules = Rules {
        seed: 4,
        both_orders: true,
    };
    let entrants: Vec<usize> = (0..6).collect();
    for kind in [Kind::RoundRobin, Kind::Knockout, Kind::Sequential] {
        let played = block_on(play(kind, &entrants, rules, &critic, |_| {}));
        assert_eq!(played.map(|played| played.winner), Ok(Some(5)));
    }
    // The round robin asked everything there is; the others found it.
    assert_eq!(critic.spent().opinions, 30);
}

#[test]
fn rounds_are_seen_as_they_are_decided_and_carry_their_byes() {
    let critic = Scripted::new((0..5).map(f64::from).collect(), 1.0, 0);
    let mut seen = Vec::new();
    let rules = Rules {
        seed: 0,
        both_orders: false,
    };
    let entrants: Vec<usize> = (0..5).collect();
    let played = block_on(play(Kind::Knockout, &entrants, rules, &critic, |round| {
        seen.push((round.number, round.matches.len(), round.bye.is_some()));
    }));
    assert_eq!(seen, [(0, 2, true), (1, 1, true), (2, 1, false)]);
    let byes: Vec<_> = played
        .expect("never fails")
        .rounds
        .iter()
        .filter_map(|round| round.bye)
        .collect();
    assert_ne!(byes[0], byes[1], "nobody has two byes in a row");
}

#[test]
fn two_derivations_of_the_knockout_agree() {
    for (n, good) in [(2, 1), (8, 3), (128, 16)] {
        let recursion = analytic::accuracy(Kind::Knockout, n, good, 0.7);
        let hypergeometric = analytic::knockout_by_rounds(n, good, 0.7);
        assert!(
            (recursion - hypergeometric).abs() < 1e-9,
            "{n} {good}: {recursion} {hypergeometric}"
        );
    }
}

/// The page says that its table is mathematics; so it is this mathematics.
#[test]
fn the_table_in_the_documentation_is_what_the_recursions_give() {
    let page = include_str!("../../../../docs/critic-api.md");
    for share in [1, 16, 64] {
        for accuracy in [0.55, 0.6, 0.7, 0.8, 0.9] {
            let knockout = analytic::accuracy(Kind::Knockout, 128, share, accuracy);
            let sequential = analytic::accuracy(Kind::Sequential, 128, share, accuracy);
            let line = format!(
                "| {share} of 128 | {accuracy} | {:.1} % | {:.1} % | {:.1} % |",
                100.0 * share as f64 / 128.0,
                100.0 * knockout,
                100.0 * sequential
            );
            assert!(page.contains(&line), "{line}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_perfect_critic_finds_the_best(n in 1_usize..40, seed: u64, both_orders: bool, kind in prop::sample::select(&KINDS[..])) {
        let mut quality: Vec<f64> = (0..n).map(|index| index as f64).collect();
        quality.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        let critic = Scripted::new(quality, 1.0, seed);
        let played = contest(kind, &critic, seed, both_orders);
        let winner = played.winner.expect("entrants");
        prop_assert_eq!(critic.quality[winner] as usize, n - 1);
        prop_assert_eq!(played.tally.comparisons, kind.comparisons(n));
        let orders = 1 + usize::from(both_orders);
        prop_assert_eq!(played.tally.opinions, orders * kind.comparisons(n));
        prop_assert_eq!((played.tally.flips, played.tally.ties, played.tally.unparsed), (0, 0, 0));
        if kind == Kind::Knockout {
            prop_assert_eq!(played.rounds.len(), n.next_power_of_two().trailing_zeros() as usize);
        }
    }

    #[test]
    fn everybody_but_the_winner_loses_once_in_a_knockout(n in 2_usize..70, seed: u64) {
        let critic = Scripted::new(vec![0.0; n], 1.0, seed);
        let played = contest(Kind::Knockout, &critic, seed, false);
        let mut losers: Vec<usize> = played.rounds.iter().flat_map(|round| &round.matches)
            .map(|decided| {
                let pair = decided.comparison.pair;
                pair.first + pair.second - decided.winner
            })
            .collect();
        losers.extend(played.winner);
        losers.sort_unstable();
        prop_assert_eq!(losers, (0..n).collect::<Vec<_>>());
    }
}
