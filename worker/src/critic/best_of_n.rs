//! One job: generate candidates for a conversation, choose one of them, and say what that took.

use std::sync::Arc;

use flotilla_engine::FinishReason;
use flotilla_model::{Tokenizer, Visual};
use tokio::sync::mpsc::UnboundedSender;

use super::{
    bracket::Standing,
    contest::{Played, Round, Rules, Tally, play},
    draw::Draw,
    field::{Field, Votes, after_thoughts, answer, count_votes, majority},
    judge::{Case, Judge, Manner, Scored, harmless, room_for_candidates},
    remember::Remembering,
    selector::Selector,
};
use crate::{
    prompt::critic::Shows,
    service::{
        Service, ServiceError, critics::Asking, generation::Generation, prompt::Conversation, visuals::visuals_of,
        wanted::Wanted,
    },
};

/// A candidate must have room for so many tokens in the critic's prompt.
const MIN_ROOM: usize = 4;
/// What a thinking critic may write where the request does not say, at most, and as a share of the context.
const THOUGHT_TOKENS: usize = 1024;
const THOUGHT_SHARE: usize = 4;
/// What labels may take where the critic does not think.
const LABEL_TOKENS: usize = 32;
/// Stands where the middle of a candidate was left out.
const GAP: &str = " … ";

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What candidates answer.
    pub conversation: Conversation,
    /// The same as the critic is told.
    pub question: String,
    /// The candidates; where it names no longest one, critic and context limit it.
    pub wanted: Wanted,
    /// The first one chooses; the others are reported beside it. Each at most once.
    pub selectors: Vec<Selector>,
    /// How contests are played.
    pub rules: Rules,
    /// How the critic is asked.
    pub manner: Manner,
    /// Its template for pairs.
    pub template: Option<String>,
    /// Its template for scores.
    pub score_template: Option<String>,
    /// Show the critic only what follows the candidates' thoughts.
    pub strip_thoughts: bool,
}

/// One candidate.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Its number.
    pub index: usize,
    /// Its text.
    pub text: String,
    /// What it answers: its box, else its text after the thoughts.
    pub answer: String,
    /// Why it ended.
    pub finish: Option<FinishReason>,
    /// Its tokens.
    pub tokens: usize,
}

/// What happens on the way.
#[derive(Clone, Debug)]
pub enum Progress {
    /// A candidate is finished.
    Candidate(Candidate),
    /// A round is decided.
    Round(Selector, Round),
}

/// What one selector chose.
#[derive(Clone, Debug)]
pub struct Report {
    /// The selector.
    pub selector: Selector,
    /// Its candidate.
    pub winner: usize,
    /// What its comparisons took; several selectors share opinions, and each counts those it used.
    pub tally: Tally,
    /// Its rounds.
    pub rounds: Vec<Round>,
    /// The best first (round robin).
    pub standings: Vec<Standing>,
    /// Scores of the entrants (pointwise).
    pub scores: Vec<(usize, Scored)>,
    /// Answers and how many gave them (majority).
    pub votes: Vec<Votes>,
}

/// A job that is done.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// All candidates.
    pub candidates: Vec<Candidate>,
    /// Their texts as the critic was shown them.
    pub shown: Vec<String>,
    /// Which of these are the same.
    pub field: Field,
    /// One for each selector, in their order.
    pub reports: Vec<Report>,
    /// Candidates of which the critic was shown only beginning and end.
    pub shortened: usize,
    /// Tokens of all prompts, the candidates' once.
    pub prompt_tokens: usize,
    /// Tokens that were drawn or weighed.
    pub completion_tokens: usize,
    /// Prompt tokens that the engine computed from the beginning to the end of the job, for whomever.
    pub prefill_tokens: u64,
}

/// A job whose candidates are being generated. Dropping it cancels what is left.
#[derive(Debug)]
pub struct Job {
    service: Arc<Service>,
    plan: Plan,
    pair: Option<Arc<Asking>>,
    score: Option<Arc<Asking>>,
    visuals: Arc<[Visual]>,
    /// Tokens of each candidate that the critic has room for.
    room: usize,
    generation: Generation,
    prefilled: u64,
}

impl Job {
    /// Checks everything that can be checked before, and asks for the candidates.
    pub async fn begin(service: Arc<Service>, plan: Plan) -> Result<Self, ServiceError> {
        let prefilled = service.stats().prefill_tokens.get();
        let pairs = plan.selectors.iter().any(|selector| selector.kind().is_some());
        let find = |name: &Option<String>, shows| service.critics().find(name.as_deref(), shows);
        let pair = pairs.then(|| find(&plan.template, Shows::Pair)).transpose()?;
        let scores = plan.selectors.contains(&Selector::Pointwise);
        let score = scores.then(|| find(&plan.score_template, Shows::One)).transpose()?;
        let (prompt, left) = service
            .prepare(plan.conversation.clone(), plan.wanted.max_tokens)
            .await?;
        let visuals = visuals_of(&prompt);
        let reserve = match (plan.manner.think, plan.manner.max_tokens) {
            (true, Some(most)) => most.saturating_add(LABEL_TOKENS),
            (true, None) => THOUGHT_TOKENS.min(service.max_model_len / THOUGHT_SHARE) + LABEL_TOKENS,
            (false, _) => LABEL_TOKENS,
        };
        let mut room = usize::MAX;
        for asking in [&pair, &score].into_iter().flatten() {
            let for_each = room_for_candidates(&service, asking, &plan.question, &visuals, reserve).await?;
            if for_each < MIN_ROOM {
                let message = format!(
                    "the context of {} tokens leaves {for_each} for each candidate in the critic's prompt ({:?}), beside {reserve} \
                     that it may write: ask a shorter question, or set critic.max_tokens",
                    service.max_model_len,
                    asking.template.name()
                );
                return Err(ServiceError::invalid("critic", message));
            }
            room = room.min(for_each);
        }
        let max_tokens = plan.wanted.max_tokens.unwrap_or(left.min(room));
        let generation = service.draw(prompt, max_tokens, &plan.wanted).await?;
        Ok(Self {
            service,
            plan,
            pair,
            score,
            visuals,
            room,
            generation,
            prefilled,
        })
    }

    /// Generates and chooses; `events` hears what happens on the way.
    pub async fn run(mut self, events: UnboundedSender<Progress>) -> Result<Outcome, ServiceError> {
        let candidates = self.candidates(&events).await?;
        self.choose(candidates, &events).await
    }

    /// Tokens of the candidates' prompt.
    pub fn prompt_tokens(&self) -> usize {
        self.generation.prompt_tokens()
    }

    /// Chooses among the candidates with each selector.
    pub async fn choose(
        self,
        candidates: Vec<Candidate>,
        events: &UnboundedSender<Progress>,
    ) -> Result<Outcome, ServiceError> {
        let tokenizer = self.service.processor().tokenizer();
        let mut shortened = 0;
        let shown = candidates.iter().map(|candidate| {
            let text = match self.plan.strip_thoughts {
                true => after_thoughts(&candidate.text).trim(),
                false => candidate.text.as_str(),
            };
            let shorter = shorten(text, self.room, tokenizer);
            shortened += usize::from(shorter.is_some());
            harmless(shorter.as_deref().unwrap_or(text))
        });
        let texts: Vec<String> = shown.collect();
        let field = Field::new(&texts);
        let case = Case {
            question: harmless(&self.plan.question),
            visuals: self.visuals.clone(),
            texts: texts.clone(),
        };
        let mut contest = Contest::new(&self, &case, &candidates, &field)?;
        let mut reports = Vec::with_capacity(self.plan.selectors.len());
        for selector in &self.plan.selectors {
            reports.push(contest.report(*selector, events.clone()).await?);
        }
        let spent = contest.spent();
        Ok(Outcome {
            reports,
            shortened,
            shown: texts,
            prompt_tokens: self.prompt_tokens() + spent.0,
            completion_tokens: self.generation.completion_tokens() + spent.1,
            prefill_tokens: self.service.stats().prefill_tokens.get().saturating_sub(self.prefilled),
            candidates,
            field,
        })
    }

    /// Generates the candidates; `events` hears of each that is finished.
    pub async fn candidates(&mut self, events: &UnboundedSender<Progress>) -> Result<Vec<Candidate>, ServiceError> {
        let blank = |index| Candidate {
            index,
            text: String::new(),
            answer: String::new(),
            finish: None,
            tokens: 0,
        };
        let mut candidates: Vec<Candidate> = (0..self.plan.wanted.n).map(blank).collect();
        while let Some(delta) = self.generation.next().await {
            let delta = delta?;
            let Some(candidate) = candidates.get_mut(delta.sample) else {
                continue;
            };
            candidate.text.push_str(&delta.text);
            candidate.tokens += 1;
            if delta.finish.is_some() {
                candidate.finish = delta.finish;
                candidate.answer = answer(&candidate.text);
                // Nobody may be listening: the outcome has it all.
                let _ = events.send(Progress::Candidate(candidate.clone()));
            }
        }
        Ok(candidates)
    }
}

/// Selectors over the same candidates.
struct Contest<'a> {
    plan: &'a Plan,
    candidates: &'a [Candidate],
    entrants: Vec<usize>,
    pairs: Option<Remembering<Judge>>,
    scores: Option<Judge>,
    /// Prompt and completion tokens of scores.
    scored: (usize, usize),
}

impl<'a> Contest<'a> {
    fn new(job: &'a Job, case: &Case, candidates: &'a [Candidate], field: &Field) -> Result<Self, ServiceError> {
        let manner = Manner {
            patient: true,
            ..job.plan.manner.clone()
        };
        let judge =
            |asking: &Arc<Asking>| Judge::new(job.service.clone(), asking.clone(), manner.clone(), case.clone());
        Ok(Self {
            plan: &job.plan,
            candidates,
            entrants: field.entrants(),
            pairs: job.pair.as_ref().map(judge).transpose()?.map(Remembering::new),
            scores: job.score.as_ref().map(judge).transpose()?,
            scored: (0, 0),
        })
    }

    async fn report(&mut self, selector: Selector, events: UnboundedSender<Progress>) -> Result<Report, ServiceError> {
        let mut report = Report {
            selector,
            winner: 0,
            tally: Tally::default(),
            rounds: Vec::new(),
            standings: Vec::new(),
            scores: Vec::new(),
            votes: Vec::new(),
        };
        match (selector.kind(), &self.pairs) {
            (Some(kind), Some(critic)) => {
                let watch = move |round: &Round| {
                    let _ = events.send(Progress::Round(selector, round.clone()));
                };
                let played: Played = play(kind, &self.entrants, self.plan.rules, critic, watch).await?;
                report.winner = played.winner.unwrap_or(0);
                report.rounds = played.rounds;
                report.standings = played.standings;
                report.tally = played.tally;
            }
            _ if selector == Selector::Pointwise => self.score(&mut report).await?,
            _ => {
                let answers: Vec<&str> = self
                    .candidates
                    .iter()
                    .map(|candidate| candidate.answer.as_str())
                    .collect();
                report.votes = count_votes(&answers);
                report.winner = majority(&report.votes).unwrap_or(0);
            }
        }
        Ok(report)
    }

    /// The highest expected score; of equal ones the lowest lot.
    async fn score(&mut self, report: &mut Report) -> Result<(), ServiceError> {
        let Some(judge) = &self.scores else { return Ok(()) };
        let scored = judge.scores(&self.entrants, &judge.scale()).await?;
        let draw = Draw::new(self.plan.rules.seed, self.candidates.len());
        report.scores = self.entrants.iter().copied().zip(scored).collect();
        for (_, scored) in &report.scores {
            report.tally.opinions += 1;
            report.tally.prompt_tokens += scored.prompt_tokens;
            report.tally.completion_tokens += scored.completion_tokens;
        }
        self.scored = (report.tally.prompt_tokens, report.tally.completion_tokens);
        let best = report.scores.iter().max_by(|(a, left), (b, right)| {
            let (left, right) = (left.distribution.expectation(), right.distribution.expectation());
            left.total_cmp(&right).then_with(|| draw.lot(*b).cmp(&draw.lot(*a)))
        });
        report.winner = best.map_or(0, |(candidate, _)| *candidate);
        Ok(())
    }

    /// Tokens of prompts and completions that were asked for.
    fn spent(&self) -> (usize, usize) {
        let pairs = self.pairs.as_ref().map(Remembering::spent).unwrap_or_default();
        (
            pairs.prompt_tokens + self.scored.0,
            pairs.completion_tokens + self.scored.1,
        )
    }
}

/// Beginning and end of a text of more than `room` tokens: answers stand at the end. None if it is not longer.
fn shorten(text: &str, room: usize, tokenizer: &Tokenizer) -> Option<String> {
    let count = |text: &str| tokenizer.encode(text).map_or(0, |ids| ids.len());
    if count(text) <= room {
        return None;
    }
    let characters: Vec<char> = text.chars().collect();
    let mut kept = characters.len();
    loop {
        kept = kept * 3 / 4;
        let (head, tail) = (kept / 2, kept - kept / 2);
        let begin: String = characters[..head].iter().collect();
        let end: String = characters[characters.len() - tail..].iter().collect();
        let shorter = format!("{begin}{GAP}{end}");
        if kept == 0 {
            return Some(String::new());
        }
        if count(&shorter) <= room {
            return Some(shorter);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use flotilla_model::Processor;

    use super::*;

    #[test]
    fn a_long_candidate_keeps_its_beginning_and_its_end() {
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/samples/critic-digits/base");
        let processor = Processor::load(&base).expect("the sample's processor");
        let tokenizer = processor.tokenizer();
        let long = format!("begin {} \\boxed{{7}}", "x".repeat(200));
        let shorter = shorten(&long, 60, tokenizer).expect("is longer");
        assert!(
            shorter.starts_with("begin ") && shorter.ends_with("\\boxed{7}"),
            "{shorter}"
        );
        assert!(shorter.contains(GAP) && tokenizer.encode(&shorter).expect("encodes").len() <= 60);
        assert_eq!(shorten("7", 60, tokenizer), None);
        assert_eq!(shorten(&long, 0, tokenizer).as_deref(), Some(""));
    }
}
