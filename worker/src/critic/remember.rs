//! A critic that is asked nothing twice: several selectors over the same candidates share what was said.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use super::{
    Critic,
    pair::{Opinion, Pair},
};

/// What was asked of the critic behind it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Spent {
    /// Opinions.
    pub opinions: usize,
    /// Tokens of their prompts.
    pub prompt_tokens: usize,
    /// Tokens that the critic wrote.
    pub completion_tokens: usize,
}

/// Asks the critic behind it about pairs that nobody asked about yet.
#[derive(Debug)]
pub struct Remembering<C> {
    critic: C,
    known: Mutex<HashMap<Pair, Opinion>>,
}

impl<C> Remembering<C> {
    /// With nothing known.
    pub fn new(critic: C) -> Self {
        Self {
            critic,
            known: Mutex::default(),
        }
    }

    /// What was asked so far.
    pub fn spent(&self) -> Spent {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.values().fold(Spent::default(), |spent, opinion| Spent {
            opinions: spent.opinions + 1,
            prompt_tokens: spent.prompt_tokens + opinion.prompt_tokens,
            completion_tokens: spent.completion_tokens + opinion.completion_tokens,
        })
    }
}

impl<C: Critic> Critic for Remembering<C> {
    type Error = C::Error;

    async fn judge(&self, pairs: &[Pair]) -> Result<Vec<Opinion>, C::Error> {
        let unknown: Vec<Pair> = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            let mut unknown: Vec<Pair> = pairs.iter().copied().filter(|pair| !known.contains_key(pair)).collect();
            unknown.sort_unstable();
            unknown.dedup();
            unknown
        };
        let opinions = match unknown.is_empty() {
            true => Vec::new(),
            false => self.critic.judge(&unknown).await?,
        };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.extend(unknown.into_iter().zip(opinions));
        Ok(pairs.iter().filter_map(|pair| known.get(pair).cloned()).collect())
    }
}
