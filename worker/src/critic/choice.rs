//! Labels as tokens after an open box: what follows the prompt in any case, and what each label adds to it.

use std::sync::Arc;

/// A choice among labels, in tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Tokens that all labels share; they follow the prompt.
    pub lead: Vec<u32>,
    /// The tokens of each label after the lead. None begins with another one, so each has a probability of its own.
    pub answers: Arc<[Vec<u32>]>,
}

impl Choice {
    /// The labels between `open` and `close`, each tokenized with both, as the model would write it. None if two labels
    /// have the same tokens, or there are fewer than two.
    pub fn new<E>(
        open: &str,
        labels: &[String],
        close: &str,
        encode: impl Fn(&str) -> Result<Vec<u32>, E>,
    ) -> Result<Option<Self>, E> {
        let written = labels.iter().map(|label| encode(&format!("{open}{label}{close}")));
        let written = written.collect::<Result<Vec<_>, E>>()?;
        Ok(Self::of(&written))
    }

    fn of(written: &[Vec<u32>]) -> Option<Self> {
        let (first, rest) = written.split_first()?;
        if rest.is_empty() {
            return None;
        }
        let shared = rest.iter().map(|ids| common(first.iter(), ids.iter())).min()?;
        let bodies: Vec<&[u32]> = written.iter().map(|ids| &ids[shared..]).collect();
        // What ends every label alike costs a step and tells nothing, unless it tells a label from the beginning of another.
        let ends = bodies
            .iter()
            .map(|body| common(bodies[0].iter().rev(), body.iter().rev()));
        let alike = ends.min().unwrap_or(0);
        let cut = |by: usize| -> Vec<Vec<u32>> {
            let kept = bodies.iter().map(|body| body[..body.len().saturating_sub(by)].to_vec());
            kept.collect()
        };
        let answers = (0..=alike).rev().map(cut).find(|answers| told_apart(answers))?;
        Some(Self {
            lead: first[..shared].to_vec(),
            answers: answers.into(),
        })
    }
}

fn common<'a>(a: impl Iterator<Item = &'a u32>, b: impl Iterator<Item = &'a u32>) -> usize {
    a.zip(b).take_while(|(a, b)| a == b).count()
}

/// Whether no answer is empty or begins with another one.
fn told_apart(answers: &[Vec<u32>]) -> bool {
    let alone = |(index, answer): (usize, &Vec<u32>)| {
        let mut others = answers.iter().enumerate().filter(|(other, _)| *other != index);
        !answer.is_empty() && !others.any(|(_, other)| other.starts_with(answer))
    };
    answers.iter().enumerate().all(alone)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// One token for each character.
    fn choice(labels: &[&str]) -> Option<(String, Vec<String>)> {
        let encode = |text: &str| Ok::<_, ()>(text.chars().map(u32::from).collect());
        let labels: Vec<String> = labels.iter().map(|label| (*label).to_owned()).collect();
        let choice = Choice::new("\\boxed{", &labels, "}", encode).expect("encodes")?;
        let text = |ids: &[u32]| ids.iter().filter_map(|id| char::from_u32(*id)).collect::<String>();
        let answers = choice.answers.iter().map(|ids| text(ids)).collect();
        Some((text(&choice.lead), answers))
    }

    #[test]
    fn labels_of_one_token_are_one_token() {
        let (lead, answers) = choice(&["1", "2", "tie"]).expect("told apart");
        assert_eq!(
            (lead.as_str(), answers),
            ("\\boxed{", vec!["1".into(), "2".into(), "tie".into()])
        );
    }

    #[test]
    fn what_labels_share_leads_to_them() {
        let (lead, answers) = choice(&["Response 1 is better", "Response 2 is better"]).expect("told apart");
        assert_eq!(
            (lead.as_str(), answers),
            ("\\boxed{Response ", vec!["1".to_owned(), "2".to_owned()])
        );
    }

    #[test]
    fn a_label_that_begins_another_one_is_closed() {
        let (_, answers) = choice(&["1", "2", "10"]).expect("told apart");
        assert_eq!(answers, ["1}", "2}", "10}"]);
    }

    #[test]
    fn one_label_is_no_choice_and_equal_labels_are_none() {
        assert_eq!(choice(&["1"]), None);
        assert_eq!(choice(&["1", "1"]), None);
        assert_eq!(choice(&[]), None);
    }

    proptest! {
        #[test]
        fn no_answer_begins_with_another(labels in prop::collection::btree_set("[ab]{1,3}", 2..6)) {
            let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
            let (lead, answers) = choice(&labels).expect("distinct labels are told apart");
            for (index, answer) in answers.iter().enumerate() {
                let whole = format!("\\boxed{{{}}}", labels[index]);
                let written = format!("{lead}{answer}");
                prop_assert!(whole.starts_with(&written));
                for (other, text) in answers.iter().enumerate() {
                    prop_assert!(index == other || !text.starts_with(answer.as_str()));
                }
            }
        }
    }
}
