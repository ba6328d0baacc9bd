//! What a completion may be.

use std::sync::Arc;

use crate::{
    choice::{Choices, Choosing},
    error::EngineError,
    grammar::{Grammar, Matching},
    request::Sampling,
};

/// Narrows the tokens that may be drawn. Cloning shares what was compiled.
#[derive(Clone, Debug)]
pub enum Constraint {
    /// Sample `i` is exactly the tokens `i`: no draw, but the log-probabilities of an answer that is given. A request with
    /// one sample for each answer of a set gives the model's distribution over the set, and all of them share the prompt.
    Forced(Arc<[Vec<u32>]>),
    /// A sample is one of these answers, drawn token by token.
    Choice(Choices),
    /// A sample is a text of this grammar.
    Grammar(Grammar),
}

impl Constraint {
    /// A sample is one of these answers, see [`Choices::new`].
    pub fn choice(answers: &[Vec<u32>]) -> Result<Self, EngineError> {
        Ok(Self::Choice(Choices::new(answers)?))
    }

    /// Refuses what does not go with `n` samples drawn in this way.
    pub fn validate(&self, n: usize, sampling: &Sampling) -> Result<(), EngineError> {
        let max = sampling.max_tokens;
        let fault = match self {
            _ if sampling.min_tokens > 0 => {
                let min = sampling.min_tokens;
                format!("min_tokens is {min}, but what a constrained completion may be says where it ends")
            }
            Self::Forced(answers) if answers.len() != n => {
                format!("{} forced answers for {n} samples", answers.len())
            }
            Self::Forced(answers) => match answers.iter().find(|answer| !(1..=max).contains(&answer.len())) {
                Some(answer) => format!(
                    "a forced answer has {} tokens, which must be 1 to max_tokens ({max})",
                    answer.len()
                ),
                None => return Ok(()),
            },
            Self::Choice(choices) if choices.prefix().is_some() && sampling.stop_ids.is_empty() => format!(
                "the choice of tokens {:?} is the beginning of another one, and there is no stop token to tell them apart",
                choices.prefix().unwrap_or_default()
            ),
            Self::Choice(choices) if choices.longest() > max => {
                format!(
                    "the longest choice takes {} tokens, max_tokens is {max}",
                    choices.longest()
                )
            }
            Self::Choice(_) | Self::Grammar(_) => return Ok(()),
        };
        Err(EngineError::InvalidRequest(fault))
    }
}

/// How far one sample has come within its constraint.
#[derive(Clone, Debug)]
pub enum Progress {
    /// Any token may come, and a stop token ends the sample.
    Free,
    /// The next token is known.
    Forced {
        /// The answers of all samples.
        answers: Arc<[Vec<u32>]>,
        /// Which of them this is.
        sample: usize,
        /// Tokens taken.
        taken: usize,
    },
    /// Among answers.
    Choosing(Choosing),
    /// Within a grammar.
    Matching(Box<Matching>),
}

impl Progress {
    /// Before the first token of sample `sample`.
    pub fn new(constraint: Option<&Constraint>, sample: usize) -> Self {
        match constraint {
            None => Self::Free,
            Some(Constraint::Forced(answers)) => Self::Forced {
                answers: answers.clone(),
                sample,
                taken: 0,
            },
            Some(Constraint::Choice(choices)) => Self::Choosing(Choosing::new(choices)),
            Some(Constraint::Grammar(grammar)) => Self::Matching(Box::new(Matching::new(grammar))),
        }
    }

    /// The only token that may come, which is not drawn.
    pub fn forced(&self) -> Option<u32> {
        match self {
            Self::Forced { answers, sample, taken } => answers.get(*sample)?.get(*taken).copied(),
            _ => None,
        }
    }

    /// Whether [`Self::mask`] has anything to say.
    pub fn masks(&self) -> bool {
        matches!(self, Self::Choosing(_) | Self::Matching(_))
    }

    /// Makes tokens that may not come impossible in logits `[vocabulary]`.
    pub fn mask(&mut self, logits: &mut [f32], stop_ids: &[u32]) -> Result<(), EngineError> {
        match self {
            Self::Free | Self::Forced { .. } => Ok(()),
            Self::Choosing(choosing) => {
                let of = |id: u32| logits.get(id as usize).map(|logit| (id as usize, *logit));
                let allowed: Vec<(usize, f32)> = choosing.allowed(stop_ids).filter_map(of).collect();
                logits.fill(f32::NEG_INFINITY);
                for (id, logit) in allowed {
                    logits[id] = logit;
                }
                Ok(())
            }
            Self::Matching(matching) => matching.mask(logits),
        }
    }

    /// Takes the token that was drawn.
    pub fn push(&mut self, id: u32) -> Result<(), EngineError> {
        match self {
            Self::Free => {}
            Self::Forced { taken, .. } => *taken += 1,
            Self::Choosing(choosing) => choosing.push(id),
            Self::Matching(matching) => matching.push(id)?,
        }
        Ok(())
    }

    /// Whether the sample ends after the token that was taken last. `stopped` says that it was a stop token.
    pub fn is_complete(&self, stopped: bool) -> bool {
        match self {
            Self::Free => stopped,
            Self::Forced { .. } => self.forced().is_none(),
            Self::Choosing(choosing) => choosing.is_complete(),
            Self::Matching(matching) => stopped || matching.is_complete(),
        }
    }
}
