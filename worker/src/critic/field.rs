//! Candidates of which equal texts are one entrant, and what most of them answer.

use std::collections::HashMap;

use flotilla_grpo::{grade::same_answer, reward::boxed};

/// Candidates by index. Those with the same text are one entrant, the first of them: nobody is compared with itself.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Field {
    /// For each candidate the first one with the same text.
    same_as: Vec<usize>,
}

impl Field {
    /// Of these texts.
    pub fn new<T: AsRef<str>>(texts: &[T]) -> Self {
        let mut firsts = HashMap::new();
        let same_as = texts
            .iter()
            .enumerate()
            .map(|(index, text)| *firsts.entry(text.as_ref().trim()).or_insert(index))
            .collect();
        Self { same_as }
    }

    /// Candidates.
    pub fn len(&self) -> usize {
        self.same_as.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.same_as.is_empty()
    }

    /// The first candidate with the text of this one.
    pub fn first_with_text_of(&self, candidate: usize) -> usize {
        self.same_as.get(candidate).copied().unwrap_or(candidate)
    }

    /// The candidates that compete, in order: one for each text.
    pub fn entrants(&self) -> Vec<usize> {
        let own = self.same_as.iter().enumerate();
        own.filter_map(|(index, first)| (index == *first).then_some(index))
            .collect()
    }

    /// Candidates with the text of this one.
    pub fn copies(&self, candidate: usize) -> usize {
        let first = self.first_with_text_of(candidate);
        self.same_as.iter().filter(|other| **other == first).count()
    }
}

/// What a candidate answers: the content of its last box, else its text after the thoughts.
pub fn answer(text: &str) -> String {
    boxed(text).unwrap_or_else(|| after_thoughts(text).trim().to_owned())
}

/// The text after the last closed thought; the whole text if there is none.
pub fn after_thoughts(text: &str) -> &str {
    text.rsplit_once("</think>").map_or(text, |(_, rest)| rest)
}

/// Candidates that give the same answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Votes {
    /// The first of them.
    pub first: usize,
    /// How many.
    pub count: usize,
}

/// Counts answers that are equal after normalisation, in the order of their first candidates.
pub fn count_votes<T: AsRef<str>>(answers: &[T]) -> Vec<Votes> {
    let mut counted: Vec<Votes> = Vec::new();
    for (candidate, answer) in answers.iter().enumerate() {
        let same = |votes: &&mut Votes| same_answer(answer.as_ref(), answers[votes.first].as_ref());
        match counted.iter_mut().find(same) {
            Some(votes) => votes.count += 1,
            None => counted.push(Votes {
                first: candidate,
                count: 1,
            }),
        }
    }
    counted
}

/// The first candidate with the most frequent answer; of equally frequent answers the one that came first.
pub fn majority(votes: &[Votes]) -> Option<usize> {
    let most = votes.iter().map(|votes| votes.count).max()?;
    votes.iter().find(|votes| votes.count == most).map(|votes| votes.first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_are_one_entrant() {
        let field = Field::new(&["a", "b", "a", " a\n", "c"]);
        assert_eq!(field.entrants(), [0, 1, 4]);
        assert_eq!(
            (field.first_with_text_of(3), field.copies(2), field.copies(1)),
            (0, 3, 1)
        );
    }

    #[test]
    fn an_answer_is_the_box_or_what_follows_the_thoughts() {
        assert_eq!(answer(r"<think>7? \boxed{1}</think> It is \boxed{ 7 }."), "7");
        assert_eq!(answer("<think>hm</think> seven "), "seven");
        assert_eq!(answer("seven"), "seven");
    }

    #[test]
    fn the_most_frequent_answer_wins_and_the_first_of_equals() {
        let votes = count_votes(&["3", "7.0", "7", "3.0", "9"]);
        assert_eq!(votes.len(), 3);
        assert_eq!(majority(&votes), Some(0));
        assert_eq!(majority(&count_votes(&["9", "7", "7"])), Some(1));
        assert_eq!(majority(&[]), None);
    }
}
