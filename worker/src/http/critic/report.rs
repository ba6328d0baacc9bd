//! Rounds, standings and counts as they are answered.

use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    critic::{
        bracket::Standing,
        contest::{Match, Round, Tally},
        field::{Field, Votes},
        judge::Scored,
        scale::{Distribution, Scale},
    },
    service::verdict::Verdict,
};

/// A compared pair. Candidates are named by their index.
#[derive(Debug, Serialize, ToSchema)]
pub struct PairReport {
    /// Shown as response 1.
    first: usize,
    /// Shown as response 2.
    second: usize,
    /// Who goes on.
    winner: usize,
    /// Whether the critic could not tell them apart, and the lot decided.
    by_lot: bool,
    /// What the critic said, of both orders together.
    verdict: Option<Verdict>,
    /// Log-odds of the first against the second.
    margin: Option<f64>,
    /// With both orders: whether they name different candidates; null if one names none, or only one was asked.
    order_flip: Option<bool>,
    /// Why, in the critic's words.
    rationale: Option<String>,
}

impl From<&Match> for PairReport {
    fn from(decided: &Match) -> Self {
        let comparison = &decided.comparison;
        Self {
            first: comparison.pair.first,
            second: comparison.pair.second,
            winner: decided.winner,
            by_lot: decided.by_lot,
            verdict: comparison.verdict,
            margin: comparison.margin,
            order_flip: comparison.flip(),
            rationale: comparison.straight.rationale.clone(),
        }
    }
}

/// A decided round.
#[derive(Debug, Serialize, ToSchema)]
pub struct RoundReport {
    /// Counted from 0.
    round: usize,
    /// Its pairs.
    comparisons: Vec<PairReport>,
    /// Who went on without an opponent.
    bye: Option<usize>,
}

impl From<&Round> for RoundReport {
    fn from(round: &Round) -> Self {
        Self {
            round: round.number,
            comparisons: round.matches.iter().map(PairReport::from).collect(),
            bye: round.bye,
        }
    }
}

/// What a candidate reached where everybody meets everybody; the best stands first.
#[derive(Debug, Serialize, ToSchema)]
pub struct StandingReport {
    /// The candidate.
    candidate: usize,
    /// Comparisons won, a half for each that the lot decided.
    wins: f64,
    /// Sum of its margins, which parts equal wins.
    margin: f64,
}

impl From<&Standing> for StandingReport {
    fn from(standing: &Standing) -> Self {
        Self {
            candidate: standing.candidate,
            wins: standing.wins,
            margin: standing.margin,
        }
    }
}

/// What comparisons took, and where they were doubtful.
#[derive(Debug, Serialize, ToSchema)]
pub struct TallyReport {
    /// Pairs that were compared.
    comparisons: usize,
    /// Times that the critic was asked: with both orders twice for each comparison, with pointwise once for each text.
    opinions: usize,
    /// Comparisons of which the two orders named different candidates.
    flips: usize,
    /// Comparisons that ended in a tie.
    ties: usize,
    /// Comparisons that the lot decided.
    by_lot: usize,
    /// Opinions that named no candidate.
    unparsed: usize,
    /// Tokens of the critic's prompts.
    prompt_tokens: usize,
    /// Tokens that the critic wrote.
    completion_tokens: usize,
}

impl From<&Tally> for TallyReport {
    fn from(tally: &Tally) -> Self {
        Self {
            comparisons: tally.comparisons,
            opinions: tally.opinions,
            flips: tally.flips,
            ties: tally.ties,
            by_lot: tally.by_lot,
            unparsed: tally.unparsed,
            prompt_tokens: tally.prompt_tokens,
            completion_tokens: tally.completion_tokens,
        }
    }
}

/// Candidates with one answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct VotesReport {
    /// The first of them.
    candidate: usize,
    /// Their answer.
    answer: String,
    /// How many.
    count: usize,
}

impl VotesReport {
    /// With the answer of the first candidate.
    pub fn new(votes: Votes, answer: &str) -> Self {
        Self {
            candidate: votes.first,
            answer: answer.to_owned(),
            count: votes.count,
        }
    }
}

/// A score of a candidate.
#[derive(Debug, Serialize, ToSchema)]
pub struct CandidateScore {
    /// The candidate.
    candidate: usize,
    /// Its expected score.
    score: f64,
    /// Its most likely score.
    mode: Option<f64>,
    /// How undecided the critic is (nats).
    entropy: f64,
}

impl CandidateScore {
    /// Of this candidate.
    pub fn new(candidate: usize, scored: &Scored) -> Self {
        Self {
            candidate,
            score: scored.distribution.expectation(),
            mode: scored.distribution.mode(),
            entropy: scored.distribution.entropy(),
        }
    }
}

/// How likely one score is.
#[derive(Debug, Serialize, ToSchema)]
pub struct ScoreProbability {
    /// The score.
    value: f64,
    /// As the critic writes it.
    label: String,
    /// Given that the critic names a score of the scale.
    probability: f64,
}

/// All scores of a distribution, the least first.
pub fn probabilities(distribution: &Distribution) -> Vec<ScoreProbability> {
    let scores = distribution.scores.iter().zip(&distribution.probabilities);
    scores
        .map(|(score, probability)| ScoreProbability {
            value: *score,
            label: Scale::label(*score),
            probability: *probability,
        })
        .collect()
}

/// The first candidate with the same text, if this one is not the first.
pub fn same_as(field: &Field, candidate: usize) -> Option<usize> {
    let first = field.first_with_text_of(candidate);
    (first != candidate).then_some(first)
}
