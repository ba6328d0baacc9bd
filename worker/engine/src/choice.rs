//! A set of answers as a trie of tokens.

use std::{collections::BTreeMap, sync::Arc};

use crate::error::EngineError;

/// Answers among which a sample is drawn freely: at each token only those that lead to one of them are left. Cloning shares
/// the trie.
#[derive(Clone, Debug)]
pub struct Choices {
    nodes: Arc<[Node]>,
    /// Tokens of the longest answer, and one more if a stop token must follow it.
    longest: usize,
    /// An answer that is the beginning of another one.
    prefix: Option<Arc<[u32]>>,
}

/// What may follow some first tokens.
#[derive(Clone, Debug, Default)]
struct Node {
    next: BTreeMap<u32, usize>,
    complete: bool,
}

impl Choices {
    /// Of at least one answer, none of them empty.
    pub fn new(answers: &[Vec<u32>]) -> Result<Self, EngineError> {
        if answers.is_empty() || answers.iter().any(Vec::is_empty) {
            let fault = format!("a choice among {} answers, none of which may be empty", answers.len());
            return Err(EngineError::InvalidRequest(fault));
        }
        let mut nodes = vec![Node::default()];
        for answer in answers {
            let mut at = 0;
            for id in answer {
                let fresh = nodes.len();
                at = *nodes[at].next.entry(*id).or_insert(fresh);
                if at == fresh {
                    nodes.push(Node::default());
                }
            }
            nodes[at].complete = true;
        }
        let mut choices = Self {
            nodes: nodes.into(),
            longest: answers.iter().map(Vec::len).max().unwrap_or(0),
            prefix: None,
        };
        let goes_on = |answer: &&Vec<u32>| {
            choices
                .walk(answer)
                .is_some_and(|at| !choices.nodes[at].next.is_empty())
        };
        choices.prefix = answers.iter().find(goes_on).map(|answer| answer.as_slice().into());
        Ok(choices)
    }

    /// An answer with which another one begins: only a stop token tells them apart.
    pub fn prefix(&self) -> Option<&[u32]> {
        self.prefix.as_deref()
    }

    /// Tokens that the longest answer takes.
    pub fn longest(&self) -> usize {
        self.longest
    }

    fn walk(&self, ids: &[u32]) -> Option<usize> {
        ids.iter().try_fold(0, |at, id| self.nodes[at].next.get(id).copied())
    }
}

/// How far one sample has come.
#[derive(Clone, Debug)]
pub struct Choosing {
    choices: Choices,
    at: usize,
    ended: bool,
}

impl Choosing {
    /// Before the first token.
    pub fn new(choices: &Choices) -> Self {
        Self {
            choices: choices.clone(),
            at: 0,
            ended: false,
        }
    }

    /// Ids that may come next, those of `stop_ids` where an answer is complete and another goes on.
    pub fn allowed<'a>(&'a self, stop_ids: &'a [u32]) -> impl Iterator<Item = u32> + 'a {
        let node = &self.choices.nodes[self.at];
        let stops = if node.complete { stop_ids } else { &[] };
        node.next.keys().chain(stops).copied()
    }

    /// Takes an allowed token.
    pub fn push(&mut self, id: u32) {
        match self.choices.nodes[self.at].next.get(&id) {
            Some(at) => self.at = *at,
            None => self.ended = true,
        }
    }

    /// Whether the answer is complete: nothing follows it, or a stop token said so.
    pub fn is_complete(&self) -> bool {
        self.ended || self.choices.nodes[self.at].next.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(choosing: &Choosing) -> Vec<u32> {
        choosing.allowed(&[9]).collect()
    }

    #[test]
    fn an_answer_that_another_one_begins_with_ends_by_a_stop_token() {
        let choices = Choices::new(&[vec![1, 2], vec![1, 2, 3], vec![4]]).expect("valid");
        assert_eq!((choices.prefix(), choices.longest()), (Some(&[1, 2][..]), 3));
        let mut choosing = Choosing::new(&choices);
        assert_eq!(allowed(&choosing), [1, 4]);
        choosing.push(1);
        assert_eq!(allowed(&choosing), [2]);
        choosing.push(2);
        assert_eq!(allowed(&choosing), [3, 9]);
        assert!(!choosing.is_complete());
        let mut longer = choosing.clone();
        choosing.push(9);
        longer.push(3);
        assert!(choosing.is_complete() && longer.is_complete());
    }

    #[test]
    fn empty_sets_and_answers_are_refused() {
        for answers in [vec![], vec![vec![1], vec![]]] {
            assert!(Choices::new(&answers).is_err());
        }
    }
}
