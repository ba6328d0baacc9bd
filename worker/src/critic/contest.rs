//! Plays a bracket over a critic, round by round, and counts what that took.

use super::{
    Critic,
    bracket::{Bracket, Kind, Meeting, Standing},
    draw::Draw,
    pair::{Comparison, Opinion, Pair},
};
use crate::service::verdict::Verdict;

/// How a contest is played.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Decides places, who is shown first, and what the critic cannot tell.
    pub seed: u64,
    /// Ask about each pair in both orders.
    pub both_orders: bool,
}

/// A decided pair.
#[derive(Clone, Debug, PartialEq)]
pub struct Match {
    /// What the critic said.
    pub comparison: Comparison,
    /// Who goes on.
    pub winner: usize,
    /// Whether the critic could not tell, and the lot decided.
    pub by_lot: bool,
}

/// A decided round.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Round {
    /// Counted from 0.
    pub number: usize,
    /// Its pairs.
    pub matches: Vec<Match>,
    /// Who went on without an opponent.
    pub bye: Option<usize>,
}

/// What comparisons took, and where they were doubtful.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Tally {
    /// Pairs that were compared.
    pub comparisons: usize,
    /// Opinions: one for each comparison, with both orders two.
    pub opinions: usize,
    /// Comparisons of which the two orders named different responses.
    pub flips: usize,
    /// Comparisons that ended in a tie.
    pub ties: usize,
    /// Comparisons that the lot decided.
    pub by_lot: usize,
    /// Opinions that named no response.
    pub unparsed: usize,
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
    /// Tokens that the critic wrote.
    pub completion_tokens: usize,
}

impl Tally {
    fn count(&mut self, decided: &Match) {
        let comparison = &decided.comparison;
        self.comparisons += 1;
        self.flips += usize::from(comparison.flip() == Some(true));
        self.ties += usize::from(comparison.verdict == Some(Verdict::Tie));
        self.by_lot += usize::from(decided.by_lot);
        for opinion in comparison.opinions() {
            self.opinions += 1;
            self.unparsed += usize::from(opinion.verdict.is_none());
            self.prompt_tokens += opinion.prompt_tokens;
            self.completion_tokens += opinion.completion_tokens;
        }
    }
}

/// A contest that is over.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Played {
    /// The winner; None of no entrants.
    pub winner: Option<usize>,
    /// All rounds.
    pub rounds: Vec<Round>,
    /// The best first, where everybody met everybody.
    pub standings: Vec<Standing>,
    /// What it took.
    pub tally: Tally,
}

/// Plays to the end. `entrants` are candidates, each once; `watch` sees each round as it is decided.
pub async fn play<C: Critic>(
    kind: Kind,
    entrants: &[usize],
    rules: Rules,
    critic: &C,
    mut watch: impl FnMut(&Round) + Send,
) -> Result<Played, C::Error> {
    let candidates = entrants.iter().max().map_or(0, |last| last + 1);
    let draw = Draw::new(rules.seed, candidates);
    let mut bracket = kind.bracket(entrants, &draw);
    let mut played = Played::default();
    loop {
        let pairs = bracket.pairs();
        if pairs.is_empty() {
            break;
        }
        let comparisons = compare(&pairs, rules, &draw, critic).await?;
        let round = decide(played.rounds.len(), comparisons, &draw, &mut *bracket);
        for decided in &round.matches {
            played.tally.count(decided);
        }
        watch(&round);
        played.rounds.push(round);
    }
    played.winner = bracket.winner();
    played.standings = bracket.standings();
    Ok(played)
}

/// Asks about all pairs, in one or both orders, as one batch.
pub async fn compare<C: Critic>(
    pairs: &[Pair],
    rules: Rules,
    draw: &Draw,
    critic: &C,
) -> Result<Vec<Comparison>, C::Error> {
    let shown: Vec<Pair> = pairs.iter().map(|pair| draw.shown(*pair)).collect();
    let mut asked = shown.clone();
    if rules.both_orders {
        asked.extend(shown.iter().map(|pair| pair.swapped()));
    }
    let mut opinions = critic.judge(&asked).await?.into_iter();
    let straight: Vec<Opinion> = opinions.by_ref().take(shown.len()).collect();
    let swapped = opinions.map(Some).chain(std::iter::repeat(None));
    let settled = shown.into_iter().zip(straight).zip(swapped);
    Ok(settled
        .map(|((pair, straight), swapped)| Comparison::settle(pair, straight, swapped))
        .collect())
}

fn decide(number: usize, comparisons: Vec<Comparison>, draw: &Draw, bracket: &mut dyn Bracket) -> Round {
    let bye = bracket.bye();
    let decided = comparisons.into_iter().map(|comparison| {
        let better = comparison.better();
        Match {
            winner: better.unwrap_or_else(|| draw.by_lot(comparison.pair)),
            by_lot: better.is_none(),
            comparison,
        }
    });
    let matches: Vec<Match> = decided.collect();
    let meetings: Vec<Meeting> = matches
        .iter()
        .map(|decided| Meeting {
            pair: decided.comparison.pair,
            winner: decided.winner,
            by_lot: decided.by_lot,
            margin: decided.comparison.margin,
        })
        .collect();
    bracket.record(&meetings);
    Round { number, matches, bye }
}
