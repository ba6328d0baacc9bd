//! Rewards that a program can verify (LLaVA-Critic-R1 `examples/reward_function/math.py`: overall = 0.9 accuracy + 0.1 format).

use std::sync::LazyLock;

use regex::Regex;

use crate::grade::same_answer;

/// What the released reward function takes for the answer of a completion without a closed box.
pub const NO_ANSWER: &str = "None";

/// How a completion earns a term of the reward.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Rule {
    /// 1 where the boxed verdict is the preferred response.
    Preference,
    /// 1 where the completion has the demanded form.
    Format,
    /// 1 where the boxed answer is the right one.
    ExactMatch,
}

impl Rule {
    /// Name in metrics, after `reward/`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Preference => "preference",
            Self::Format => "format",
            Self::ExactMatch => "exactMatch",
        }
    }
}

/// One term of the reward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Term {
    /// How it is computed.
    pub rule: Rule,
    /// Its factor.
    pub weight: f64,
}

/// What a completion is worth, apart from weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Graded {
    /// It has the demanded form.
    pub format: bool,
    /// Its boxed answer is the target.
    pub correct: bool,
    /// Its boxed answer, None without a closed box.
    pub answer: Option<String>,
}

impl Graded {
    /// Value of one term before its weight, 0 or 1.
    pub fn value(&self, rule: Rule) -> f64 {
        let earned = match rule {
            Rule::Preference | Rule::ExactMatch => self.correct,
            Rule::Format => self.format,
        };
        f64::from(u8::from(earned))
    }

    /// Sum of the weighted terms.
    pub fn overall(&self, terms: &[Term]) -> f64 {
        terms.iter().map(|term| term.weight * self.value(term.rule)).sum()
    }
}

/// Grades a completion against the right answer (a verdict such as `1`, or an exact answer).
pub fn grade(completion: &str, target: &str) -> Graded {
    let text = squeeze(completion);
    let answer = boxed(&text);
    Graded {
        format: has_format(&text),
        correct: same_answer(answer.as_deref().unwrap_or(NO_ANSWER), target),
        answer,
    }
}

/// Drops white space around `<`, `>` and `/`, as models write tags unevenly.
fn squeeze(text: &str) -> String {
    static BLANKS: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\s*(<|>|/)\s*").ok());
    match &*BLANKS {
        Some(pattern) => pattern.replace_all(text, "$1").into_owned(),
        None => text.to_owned(),
    }
}

/// True for `<think>…</think>…\boxed{…}…` over the whole text (`.` matches line ends).
fn has_format(text: &str) -> bool {
    let Some(rest) = text.strip_prefix("<think>") else {
        return false;
    };
    // Leftmost end tag and rightmost closing brace: there is a match exactly if these leave room for `\boxed{`.
    let Some((_, after)) = rest.split_once("</think>") else {
        return false;
    };
    let Some((_, content)) = after.split_once("\\boxed{") else {
        return false;
    };
    content.contains('}')
}

/// Content of the last `\boxed{…}` with balanced braces, trimmed; None where there is none or it is not closed.
pub fn boxed(text: &str) -> Option<String> {
    let start = text.rfind("\\boxed{")? + "\\boxed{".len();
    let mut depth = 1_usize;
    for (offset, character) in text[start..].char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(text[start..start + offset].trim().to_owned());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RELEASED: [Term; 2] = [
        Term {
            rule: Rule::Preference,
            weight: 0.9,
        },
        Term {
            rule: Rule::Format,
            weight: 0.1,
        },
    ];

    /// Measured with the released function: response, right answer, overall, format, accuracy.
    const GOLDEN: [(&str, &str, f64, bool, bool); 16] = [
        (r"<think>x</think> \boxed{1}", "1", 1.0, true, true),
        ("<think>x</think>\n\n\\boxed{2}", "1", 0.1, true, false),
        (r"\boxed{1}", "1", 0.9, false, true),
        (r" <think>x</think>\boxed{1}", "1", 1.0, true, true),
        (r"ok <think>x</think>\boxed{1}", "1", 0.9, false, true),
        (
            r"< think >x< / think > \boxed{Response 1}",
            "Response 1",
            1.0,
            true,
            true,
        ),
        (r"<think>x</think>\boxed{response 1 }", "Response 1", 1.0, true, true),
        (
            r"<think>a</think><think>b</think>\boxed{\text{1}}",
            "1",
            1.0,
            true,
            true,
        ),
        (r"<think>\boxed{1}</think> the answer is 1", "1", 0.9, false, true),
        (r"<think>x</think>\boxed{2} no, \boxed{1}", "1", 1.0, true, true),
        (r"<think>x</think>\boxed{1.0}", "1", 1.0, true, true),
        (r"<think>x</think>\boxed{1", "1", 0.0, false, false),
        (r"<think>x</think>answer", "None", 0.9, false, true),
        (
            r"<think>x</think>\boxed{Response 1 is better.}",
            "Response 1 is better",
            0.1,
            true,
            false,
        ),
        (r"<think>x</think>\boxed{Response\ 1}", "Response 1", 1.0, true, true),
        (r"<think>x</think>\boxed{2-1}", "1", 0.1, true, false),
    ];

    #[test]
    fn rewards_equal_those_of_the_released_function() {
        for (completion, target, overall, format, correct) in GOLDEN {
            let graded = grade(completion, target);
            assert_eq!((graded.format, graded.correct), (format, correct), "{completion}");
            assert!((graded.overall(&RELEASED) - overall).abs() < 1e-12, "{completion}");
        }
    }

    #[test]
    fn a_box_keeps_its_inner_braces() {
        assert_eq!(boxed(r"\boxed{\frac{1}{2}} end").as_deref(), Some(r"\frac{1}{2}"));
        assert_eq!(boxed(r"\boxed{a} then \boxed{b"), None);
    }

    proptest! {
        #[test]
        fn the_form_is_what_the_regular_expression_of_the_release_matches(
            parts in prop::collection::vec(
                prop::sample::select(vec!["<think>", "</think>", "\\boxed{", "}", "x", "\n"]), 0..9)
        ) {
            let text = parts.concat();
            let pattern = Regex::new(r"(?s)\A<think>.*</think>.*\\boxed\{.*\}.*\z").expect("pattern");
            prop_assert_eq!(has_format(&text), pattern.is_match(&text));
        }

        #[test]
        fn grading_never_fails_whatever_a_model_writes(completion in ".{0,80}", target in ".{0,10}") {
            let graded = grade(&completion, &target);
            prop_assert!((0.0..=1.0).contains(&graded.overall(&RELEASED)));
        }
    }
}
