//! What a critic's text says, and how sure its tokens were.

use std::sync::LazyLock;

use flotilla_engine::Token;
use flotilla_grpo::reward::boxed;
use flotilla_model::Tokenizer;
use regex::Regex;
use serde::Serialize;
use utoipa::ToSchema;

use crate::prompt::critic::Form;

/// Which response a critic prefers.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, ToSchema)]
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

/// Verdicts in the order of the labels of a [`Form`].
pub const VERDICTS: [Verdict; 3] = [Verdict::First, Verdict::Second, Verdict::Tie];

impl Verdict {
    /// What a critic's text says: the last box, else a sentence such as "Overall Judgment: Answer 1 is better". A label
    /// counts whatever its case and with a full stop; where labels are the usual ones, `Response 1 is better` is one too.
    pub fn parse(text: &str, form: &Form) -> Option<Self> {
        match form.content(text) {
            Some(content) => Self::label(&content, form),
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

    fn label(content: &str, form: &Form) -> Option<Self> {
        static LABEL: LazyLock<Option<Regex>> =
            LazyLock::new(|| Regex::new(r"(?i)^(?:response|answer)?\s*(1|2|tie)(?:\s+is\s+better)?\.?$").ok());
        let content = content.replace("\\text{", "").replace(['}', '\\'], "");
        let bare = bare(&content);
        let named = form.labels.iter().position(|label| self::bare(label) == bare);
        if let Some(index) = named {
            return VERDICTS.get(index).copied();
        }
        if *form != Form::default() {
            return None;
        }
        let captures = LABEL.as_ref()?.captures(content.trim())?;
        Self::named(&captures[1])
    }

    fn sentence(text: &str) -> Option<Self> {
        static SENTENCE: LazyLock<Option<Regex>> = LazyLock::new(|| {
            let pattern = r"(?i)(?:overall\s+judge?ment|therefore)[:,]?[\s*]*(?:the\s+)?(?:response|answer)\s+(1|2)[\s*]+is\s+(?:the\s+)?(?:slightly\s+)?better";
            Regex::new(pattern).ok()
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

/// A label without case, surrounding and repeated blanks, and full stop.
fn bare(label: &str) -> String {
    let words: Vec<&str> = label.split_whitespace().collect();
    words.join(" ").trim_end_matches('.').to_lowercase()
}

impl Form {
    /// Content of the last box that is closed, trimmed.
    pub fn content(&self, text: &str) -> Option<String> {
        if *self
            == (Self {
                labels: self.labels.clone(),
                ..Self::default()
            })
        {
            return boxed(text);
        }
        let (_, rest) = text.rsplit_once(self.open.as_str())?;
        let (content, _) = rest.split_once(self.close.as_str())?;
        Some(content.trim().to_owned())
    }
}

/// Why a critic decided as it did: what stands between the think tags, else what precedes the box.
pub fn rationale<'a>(text: &'a str, form: &Form) -> Option<&'a str> {
    let thought = match text.split_once("<think>") {
        Some((_, rest)) => rest.split_once("</think>").map_or(rest, |(thought, _)| thought),
        None => text.rsplit_once(form.open.as_str()).map_or("", |(before, _)| before),
    };
    let thought = thought.trim();
    (!thought.is_empty()).then_some(thought)
}

/// The tokens in which the labels of response 1 and response 2 begin to differ, alone or after a blank. Their
/// probabilities in that place are the critic's own measure of how sure it is.
#[derive(Clone, Debug, Default)]
pub struct VerdictTokens {
    /// For each of the two labels its spellings.
    spellings: [Vec<u32>; 2],
    /// What precedes them: the open box and what both labels begin with.
    lead: String,
}

impl VerdictTokens {
    /// Looks the labels up. Where a spelling does not tell them apart by one token, it is left out.
    pub fn new(tokenizer: &Tokenizer, form: &Form) -> Self {
        let [first, second, ..] = form.labels.as_slice() else {
            return Self::default();
        };
        let shared = shared_words(first, second);
        let mut spellings = [Vec::new(), Vec::new()];
        for blank in ["", " "] {
            let token = |label: &str| {
                let ids = tokenizer.encode(&format!("{blank}{}", &label[shared..])).ok()?;
                ids.first().copied()
            };
            if let (Some(one), Some(two)) = (token(first), token(second))
                && one != two
            {
                spellings[0].push(one);
                spellings[1].push(two);
            }
        }
        Self {
            spellings,
            lead: format!("{}{}", form.open, &first[..shared]),
        }
    }

    /// What the engine has to watch.
    pub fn watched_ids(&self) -> Vec<u32> {
        self.spellings.concat()
    }

    /// Log-odds of label 1 against label 2 at the token after the last open box (positive: response 1 is better). None
    /// without a box, or if no token tells the labels apart.
    pub fn margin(&self, tokens: &[Token], decode: impl Fn(&[u32]) -> String) -> Option<f64> {
        let ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
        let lead = self.lead.trim_end();
        let opens = |at: &usize| decode(&ids[..*at]).trim_end().ends_with(lead);
        let says_something = |at: &usize| !decode(&ids[*at..=*at]).trim().is_empty();
        let at = (1..ids.len()).rev().find(|at| says_something(at) && opens(at))?;
        let (first, second) = tokens[at].watched.split_at_checked(self.spellings[0].len())?;
        let odds = log_sum(first)? - log_sum(second)?;
        odds.is_finite().then_some(odds)
    }
}

/// Bytes of the whole words that two labels begin with.
fn shared_words(first: &str, second: &str) -> usize {
    let same = first
        .char_indices()
        .zip(second.chars())
        .take_while(|((_, a), b)| a == b);
    let blanks = same.filter(|((_, character), _)| character.is_whitespace());
    blanks.last().map_or(0, |((index, blank), _)| index + blank.len_utf8())
}

/// `ln Σ exp`, None of nothing.
pub fn log_sum(values: &[f32]) -> Option<f64> {
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
            (
                "**Overall Judgment:** Answer 1 is slightly better.",
                Some(Verdict::First),
            ),
            ("Therefore, Answer 2 is the better one", Some(Verdict::Second)),
            (r"Overall Judgment: Answer 2 is better. \boxed{1}", Some(Verdict::First)),
            ("no verdict", None),
            (r"\boxed{1", None),
        ] {
            assert_eq!(Verdict::parse(text, &Form::default()), verdict, "{text}");
        }
    }

    #[test]
    fn configured_labels_and_boxes_are_read() {
        let form = Form {
            labels: ["A", "B"].map(str::to_owned).to_vec(),
            open: "[[".to_owned(),
            close: "]]".to_owned(),
        };
        for (text, verdict) in [
            ("[[A]]", Some(Verdict::First)),
            ("first [[A]], then [[ b. ]]", Some(Verdict::Second)),
            ("[[1]]", None),
            (r"\boxed{A}", None),
            ("[[A", None),
        ] {
            assert_eq!(Verdict::parse(text, &form), verdict, "{text}");
        }
        assert_eq!(rationale("It fits. [[A]]", &form), Some("It fits."));
    }

    #[test]
    fn the_rationale_is_the_thought_or_what_precedes_the_box() {
        let rationale = |text| rationale(text, &Form::default()).map(str::to_owned);
        assert_eq!(
            rationale(r"<think> I see 7. </think> \boxed{1}").as_deref(),
            Some("I see 7.")
        );
        assert_eq!(rationale(r"It is a 7. \boxed{1}").as_deref(), Some("It is a 7."));
        assert_eq!(rationale(r"\boxed{1}"), None);
    }

    /// Ids are characters; the labels' are watched.
    fn margin(text: &str, lead: &str) -> Option<f64> {
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
            lead: lead.to_owned(),
        };
        labels.margin(&tokens, |ids| ids.iter().filter_map(|id| char::from_u32(*id)).collect())
    }

    #[test]
    fn the_margin_is_the_log_odds_where_the_box_opens() {
        for text in [r"x \boxed{1}", r"\boxed{ 1 }", r"\boxed{1"] {
            let margin = margin(text, "\\boxed{").expect("has a box");
            assert!((margin - 8f64.ln()).abs() < 1e-6, "{text}");
        }
        assert_eq!(margin("no box 1", "\\boxed{"), None);
        assert_eq!(margin(r"\boxed{", "\\boxed{"), None);
    }

    #[test]
    fn labels_of_several_words_are_told_apart_where_they_differ() {
        assert_eq!(
            shared_words("Response 1 is better", "Response 2 is better"),
            "Response ".len()
        );
        assert_eq!(shared_words("1", "2"), 0);
        assert_eq!(shared_words("yes", "yet"), 0);
        let lead = "\\boxed{Response ";
        assert!(margin("\\boxed{Response 1 is better}", lead).is_some());
        assert_eq!(margin("\\boxed{1}", lead), None);
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
