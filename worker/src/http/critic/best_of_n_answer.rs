//! The answer of `POST /v1/critic/best-of-n`.

use serde::Serialize;
use utoipa::ToSchema;

use super::report::{CandidateScore, RoundReport, StandingReport, TallyReport, VotesReport, same_as};
use crate::{
    critic::{
        best_of_n::{Candidate, Outcome, Report},
        selector::Selector,
    },
    http::answer::{Finish, Usage},
    service::Service,
};

/// What the answer repeats of the request, or tells about it.
#[derive(Clone, Debug)]
pub struct Told {
    /// The seed, given or drawn.
    pub seed: u32,
    /// Whether all candidates are answered.
    pub candidates: bool,
    /// Selectors that were left out of `all`, and why.
    pub left_out: Vec<(Selector, String)>,
}

/// The chosen candidate and how it was chosen.
#[derive(Debug, Serialize, ToSchema)]
pub struct BestOfN {
    /// Names the answer.
    id: String,
    #[schema(value_type = String, example = "critic.best_of_n")]
    object: &'static str,
    /// Name of the model.
    model: String,
    /// Candidates that were generated.
    n: usize,
    /// Different texts among them; only these were compared.
    distinct: usize,
    /// Repeats the request, or tells what was drawn: the same request with this seed gives the same answer.
    seed: u32,
    /// How the candidate was chosen.
    selector: Selector,
    /// Index of the chosen candidate.
    winner: usize,
    /// Its text.
    text: String,
    /// What it answers: the content of its last box, else its text after the thoughts.
    answer: String,
    /// Why it ended.
    finish_reason: Option<Finish>,
    /// Pairs that were compared to choose it.
    comparisons: usize,
    /// Those of which the two orders named different candidates.
    order_flips: usize,
    /// All candidates, unless the request did not want them.
    #[serde(skip_serializing_if = "Option::is_none")]
    candidates: Option<Vec<CandidateReport>>,
    /// How it was chosen; then the other selectors that were asked for, on the same candidates.
    reports: Vec<SelectorReport>,
    /// Selectors that were left out.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    left_out: Vec<LeftOut>,
    /// Candidates of which the critic was shown only beginning and end, because its context does not hold two of them.
    shortened: usize,
    /// Prompt tokens that the engine computed from the beginning to the end of this request, those of other requests
    /// included. Everything else of `usage.prompt_tokens` was shared.
    prefill_tokens: u64,
    usage: Usage,
}

/// A candidate.
#[derive(Debug, Serialize, ToSchema)]
pub struct CandidateReport {
    /// Its number.
    index: usize,
    /// Its text.
    text: String,
    /// What it answers: the content of its last box, else its text after the thoughts.
    answer: String,
    /// Why it ended.
    finish_reason: Option<Finish>,
    /// Its tokens.
    completion_tokens: usize,
    /// The first candidate that is shown to the critic as the same text, where that is another one.
    #[serde(skip_serializing_if = "Option::is_none")]
    same_as: Option<usize>,
}

/// What one selector chose, and what that took.
#[derive(Debug, Serialize, ToSchema)]
pub struct SelectorReport {
    selector: Selector,
    /// Index of its candidate.
    winner: usize,
    /// Several selectors share what the critic said about a pair; each counts what it used.
    counts: TallyReport,
    /// The bracket.
    rounds: Vec<RoundReport>,
    /// The best first (round robin).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    standings: Vec<StandingReport>,
    /// Scores of the different texts (pointwise).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    scores: Vec<CandidateScore>,
    /// Answers, in the order of their first candidates (majority).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    votes: Vec<VotesReport>,
}

/// A selector that was left out.
#[derive(Debug, Serialize, ToSchema)]
pub struct LeftOut {
    selector: Selector,
    /// Why.
    reason: String,
}

impl CandidateReport {
    /// Of a finished candidate.
    pub fn new(candidate: &Candidate, same_as: Option<usize>) -> Self {
        Self {
            index: candidate.index,
            text: candidate.text.clone(),
            answer: candidate.answer.clone(),
            finish_reason: candidate.finish.map(Finish::from),
            completion_tokens: candidate.tokens,
            same_as,
        }
    }
}

impl SelectorReport {
    fn new(report: &Report, candidates: &[Candidate]) -> Self {
        let answer = |candidate: usize| {
            candidates
                .get(candidate)
                .map_or("", |candidate| candidate.answer.as_str())
        };
        Self {
            selector: report.selector,
            winner: report.winner,
            counts: TallyReport::from(&report.tally),
            rounds: report.rounds.iter().map(RoundReport::from).collect(),
            standings: report.standings.iter().map(StandingReport::from).collect(),
            scores: report
                .scores
                .iter()
                .map(|(candidate, scored)| CandidateScore::new(*candidate, scored))
                .collect(),
            votes: report
                .votes
                .iter()
                .map(|votes| VotesReport::new(*votes, answer(votes.first)))
                .collect(),
        }
    }
}

impl BestOfN {
    /// Of a job that is done.
    pub fn new(service: &Service, told: &Told, outcome: &Outcome) -> Self {
        let shown = |candidate: &Candidate| CandidateReport::new(candidate, same_as(&outcome.field, candidate.index));
        let first = outcome.reports.first();
        let winner = first.map_or(0, |report| report.winner);
        let chosen = outcome.candidates.get(winner);
        Self {
            id: format!("bon-{}", uuid::Uuid::new_v4().simple()),
            object: "critic.best_of_n",
            model: service.name.clone(),
            n: outcome.candidates.len(),
            distinct: outcome.field.entrants().len(),
            seed: told.seed,
            selector: first.map_or_else(Selector::default, |report| report.selector),
            winner,
            text: chosen.map(|candidate| candidate.text.clone()).unwrap_or_default(),
            answer: chosen.map(|candidate| candidate.answer.clone()).unwrap_or_default(),
            finish_reason: chosen.and_then(|candidate| candidate.finish).map(Finish::from),
            comparisons: first.map_or(0, |report| report.tally.comparisons),
            order_flips: first.map_or(0, |report| report.tally.flips),
            candidates: told.candidates.then(|| outcome.candidates.iter().map(shown).collect()),
            reports: outcome
                .reports
                .iter()
                .map(|report| SelectorReport::new(report, &outcome.candidates))
                .collect(),
            left_out: told
                .left_out
                .iter()
                .map(|(selector, reason)| LeftOut {
                    selector: *selector,
                    reason: reason.clone(),
                })
                .collect(),
            shortened: outcome.shortened,
            prefill_tokens: outcome.prefill_tokens,
            usage: Usage::new(outcome.prompt_tokens, outcome.completion_tokens),
        }
    }
}
