//! What a critic's text says, and how sure its tokens were.

use std::sync::LazyLock;

use flotilla_engine::Token;
use flotilla_grpo::reward::boxed;
use flotilla_model::Tokenizer;
use regex::Regex;
use serde::Serialize;

/// Which response a critic prefers.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub enum Verdict {
    /// The first.
    #[serde(rename = "1")]
    First,
    /// The second.
    #[serde(rename = "2")]
    Second,
    /// Neither.
    #[serde(rename = "tie")]
    Tie,
}

impl Verdict {
    /// What a critic's text says: the last box, else a sentence such as "Overall Judgment: Answer 1 is better".
    pub fn parse(text: &str) -> Option<Self> {
        match boxed(text) {
            Some(content) => Self::label(&content),
            None => Self::sentence(text),
        }
    }

    /// The same verdict about the responses in the other order.
    pub fn swapped(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
            Self::Tie => Self::Tie,
        }
    }

    /// Index of the better response.
    pub fn winner(self) -> Option<usize> {
        match self {
            Self::First => Some(0),
            Self::Second => Some(1),
            Self::Tie => None,
        }
    }

    fn label(content: &str) -> Option<Self> {
        static LABEL: LazyLock<Option<Regex>> =
            LazyLock::new(|| Regex::new(r"(?i)^(?:response|answer)?\s*(1|2|tie)(?:\s+is\s+better)?\.?$").ok());
        let content = content.replace("\\text{", "").replace(['}', '\\'], "");
        let captures = LABEL.as_ref()?.captures(content.trim())?;
        Self::named(&captures[1])
    }

    fn sentence(text: &str) -> Option<Self> {
        static SENTENCE: LazyLock<Option<Regex>> = LazyLock::new(|| {
            Regex::new(r"(?i)overall\s+judge?ment:?[\s*]*(?:response|answer)\s+(1|2)\s+is\s+better").ok()
        });
        let captures = SENTENCE.as_ref()?.captures_iter(text).last()?;
        Self::named(&captures[1])
    }

    fn named(label: &str) -> Option<Self> {
        match label.to_ascii_lowercase().as_str() {
            "1" => Some(Self::First),
            "2" => Some(Self::Second),
            "tie" => Some(Self::Tie),
            _ => None,
        }
    }
}

/// Why a critic decided as it did: what stands between the think tags, else what precedes the box.
pub fn rationale(text: &str) -> Option<&str> {
    let thought = match text.split_once("<think>") {
        Some((_, rest)) => rest.split_once("</think>").map_or(rest, |(thought, _)| thought),
        None => text.rsplit_once("\\boxed{").map_or("", |(before, _)| before),
    };
    let thought = thought.trim();
    (!thought.is_empty()).then_some(thought)
}

/// The tokens that say `1` and `2`, alone or after a blank. Their probabilities where the box opens are the critic's
/// own measure of how sure it is.
#[derive(Clone, Debug, Default)]
pub struct VerdictTokens {
    /// For each of the two labels its one-token spellings.
    spellings: [Vec<u32>; 2],
}

impl VerdictTokens {
    /// Looks the labels up; a spelling that takes several tokens is left out.
    pub fn new(tokenizer: &Tokenizer) -> Self {
        let spellings = ["1", "2"].map(|label| {
            let spellings = [label.to_owned(), format!(" {label}")];
            let single = spellings
                .iter()
                .filter_map(|text| match tokenizer.encode(text).as_deref() {
                    Ok([id]) => Some(*id),
                    _ => None,
                });
            single.collect()
        });
        Self { spellings }
    }

    /// What the engine has to watch.
    pub fn watched_ids(&self) -> Vec<u32> {
        self.spellings.concat()
    }

    /// Log-odds of label 1 against label 2 at the token after the last `\boxed{` (positive: response 1 is better). None
    /// without a box, or if a label is not one token of this tokenizer.
    pub fn margin(&self, tokens: &[Token], decode: impl Fn(&[u32]) -> String) -> Option<f64> {
        let ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
        let opens = |at: &usize| decode(&ids[..*at]).trim_end().ends_with("\\boxed{");
        let says_something = |at: &usize| !decode(&ids[*at..=*at]).trim().is_empty();
        let at = (1..ids.len()).rev().find(|at| says_something(at) && opens(at))?;
        let (first, second) = tokens[at].watched.split_at_checked(self.spellings[0].len())?;
        let odds = log_sum(first)? - log_sum(second)?;
        odds.is_finite().then_some(odds)
    }
}

/// `ln Σ exp`, None of nothing.
fn log_sum(values: &[f32]) -> Option<f64> {
    let peak = values.iter().copied().reduce(f32::max)?;
    let sum: f64 = values.iter().map(|value| f64::from(value - peak).exp()).sum();
    Some(f64::from(peak) + sum.ln())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_box_is_read_first_and_the_sentence_after_it() {
        for (text, verdict) in [
            (r"<think>x</think> \boxed{1}", Some(Verdict::First)),
            (r"\boxed{ 2 }", Some(Verdict::Second)),
            (r"\boxed{Response 2 is better.}", Some(Verdict::Second)),
            (r"\boxed{\text{Answer 1}}", Some(Verdict::First)),
            (r"\boxed{Tie}", Some(Verdict::Tie)),
            (r"\boxed{7}", None),
            ("Overall Judgment: Answer 2 is better.", Some(Verdict::Second)),
            (r"Overall Judgment: Answer 2 is better. \boxed{1}", Some(Verdict::First)),
            ("no verdict", None),
            (r"\boxed{1", None),
        ] {
            assert_eq!(Verdict::parse(text), verdict, "{text}");
        }
    }

    #[test]
    fn the_rationale_is_the_thought_or_what_precedes_the_box() {
        assert_eq!(rationale(r"<think> I see 7. </think> \boxed{1}"), Some("I see 7."));
        assert_eq!(rationale(r"It is a 7. \boxed{1}"), Some("It is a 7."));
        assert_eq!(rationale(r"\boxed{1}"), None);
    }

    /// Ids are characters; `1` and `2` are watched.
    fn margin(text: &str) -> Option<f64> {
        let tokens: Vec<Token> = text
            .chars()
            .map(|character| Token {
                id: u32::from(character),
                watched: vec![0.8f32.ln(), 0.1f32.ln()],
                ..Token::default()
            })
            .collect();
        let labels = VerdictTokens {
            spellings: [vec![u32::from('1')], vec![u32::from('2')]],
        };
        labels.margin(&tokens, |ids| ids.iter().filter_map(|id| char::from_u32(*id)).collect())
    }

    #[test]
    fn the_margin_is_the_log_odds_where_the_box_opens() {
        for text in [r"x \boxed{1}", r"\boxed{ 1 }", r"\boxed{1"] {
            assert!((margin(text).expect("has a box") - 8f64.ln()).abs() < 1e-6, "{text}");
        }
        assert_eq!(margin("no box 1"), None);
        assert_eq!(margin(r"\boxed{"), None);
    }

    #[test]
    fn a_margin_needs_both_labels() {
        let token = Token {
            id: 1,
            ..Token::default()
        };
        let tokens = [token.clone(), token];
        let nothing = VerdictTokens::default();
        assert_eq!(nothing.margin(&tokens, |ids| "\\boxed{".repeat(ids.len())), None);
    }
}
