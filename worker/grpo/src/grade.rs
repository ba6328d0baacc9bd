//! When two answers are the same: the string paths of the released grader (two normalisations; equality after either).
//!
//! Its third path, symbolic algebra, does not concern labels and short answers and is left out.

use std::{borrow::Cow, sync::LazyLock};

use regex::Regex;

/// Unit words that the loose normalisation deletes (a trap: `second` is one of them, so labels must not differ by it alone).
static UNITS: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(
        r"(?:degree|cm|centimeter|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard)(?:es)?s? *(?:\^[0-9]+)?",
    )
    .ok()
});

/// True where a given answer equals the right one after either normalisation.
pub fn same_answer(given: &str, right: &str) -> bool {
    if strict(given) == strict(right) {
        return true;
    }
    let right = loose(right);
    !right.is_empty() && loose(given) == right
}

/// Trimmed, out of `\text{}`, without blanks, dollar and per cent signs, and without a short prefix such as `x=`.
fn strict(text: &str) -> String {
    let text = unwrap_text(text.trim())
        .replace("\\!", "")
        .replace("\\$", "")
        .replace('$', "");
    let text = text.replace("\\%", "").replace('%', "");
    let compact: String = text.chars().filter(|character| !character.is_whitespace()).collect();
    match compact.split_once('=') {
        Some((name, value)) if name.chars().count() <= 2 && !value.contains('=') => value.to_owned(),
        _ => compact,
    }
}

/// Without case, blanks, units, thousands separators, braces and signs; whole numbers in one form.
fn loose(text: &str) -> String {
    let mut text = unwrap_text(text.trim()).replace("\\%", "%").replace("\\$", "$");
    text.retain(|character| character != '$' && character != '%');
    if let Some(units) = &*UNITS {
        text = units.replace_all(&text, "").into_owned();
    }
    let text = text.replace("^\\circ", "").replace("\\ ", " ").replace("\\,", " ");
    let mut text = text.replace("- ", "-").to_lowercase();
    text.retain(|character| !character.is_whitespace() && character != '{' && character != '}');
    whole_number(&text).unwrap_or(text)
}

/// The inside of `\text{…}` where that is all there is.
fn unwrap_text(text: &str) -> Cow<'_, str> {
    match text.strip_prefix("\\text{").and_then(|rest| rest.strip_suffix('}')) {
        Some(inner) if !inner.contains(['{', '}']) => Cow::Owned(inner.trim().to_owned()),
        _ => Cow::Borrowed(text),
    }
}

/// `1.0`, `+1` and `1,000` as digits; None for anything that is not a whole number.
fn whole_number(text: &str) -> Option<String> {
    // Words such as `inf` and `nan` parse as floats too.
    if !text.contains(|character: char| character.is_ascii_digit()) {
        return None;
    }
    let value: f64 = without_thousands(text).parse().ok()?;
    (value.is_finite() && value.fract() == 0.0 && value.abs() < 1e15).then(|| format!("{value:.0}"))
}

/// `1,234,567` without its separators; any other text unchanged.
fn without_thousands(text: &str) -> Cow<'_, str> {
    let digits = text.trim_start_matches(['+', '-']);
    let whole = digits.split('.').next().unwrap_or_default();
    let mut groups = whole.split(',');
    let first = groups.next().unwrap_or_default();
    let numeric = |group: &str| group.bytes().all(|byte| byte.is_ascii_digit());
    let well_formed = (1..=3).contains(&first.len()) && numeric(first) && groups.all(|g| g.len() == 3 && numeric(g));
    if well_formed && whole.contains(',') {
        Cow::Owned(text.replace(',', ""))
    } else {
        Cow::Borrowed(text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn forms_of_one_answer_are_the_same() {
        for (given, right) in [
            ("7", " 7 "),
            ("7.0", "7"),
            ("1,234", "1234"),
            ("x=5", "5"),
            (r"\text{tie}", "Tie"),
            ("50\\%", "50"),
            ("$3", "3"),
            ("5 meters", "5"),
            ("- 2", "-2"),
        ] {
            assert!(same_answer(given, right), "{given} and {right}");
        }
    }

    #[test]
    fn different_answers_are_not_the_same() {
        for (given, right) in [
            ("1", "2"),
            ("12", "1"),
            ("1,2", "12"),
            ("", "1"),
            ("tie", "1"),
            ("inf", "nan"),
            ("The first response", "The second response"),
            ("seconds", "minutes"),
        ] {
            assert!(!same_answer(given, right), "{given} and {right}");
        }
    }

    proptest! {
        #[test]
        fn an_answer_is_itself(text in "[0-9a-z]{1,8}") {
            prop_assert!(same_answer(&text, &text));
        }

        #[test]
        fn whole_numbers_are_the_same_exactly_if_they_are_equal(a in -9999_i32..9999, b in -9999_i32..9999) {
            prop_assert_eq!(same_answer(&a.to_string(), &format!("{b}.0")), a == b);
        }
    }
}
