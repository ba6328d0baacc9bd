//! What labels, annotation keys and other qualified names look like (apimachinery `IsQualifiedName`).

use serde_json::{Value, json};

use crate::schema::Cause;

const PART: &str = "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric \
                    character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is \
                    '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";

/// A DNS label, but for its length.
pub(super) fn is_label_of_any_length(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    !text.is_empty() && text.chars().all(inner) && !text.starts_with('-') && !text.ends_with('-')
}

/// A DNS label.
#[must_use]
pub fn is_label(text: &str) -> bool {
    text.len() <= 63 && is_label_of_any_length(text)
}

fn is_part(text: &str) -> bool {
    let edge = |c: char| c.is_ascii_alphanumeric();
    text.len() <= 63
        && text.chars().all(|c| edge(c) || "-_.".contains(c))
        && text.starts_with(edge)
        && text.ends_with(edge)
}

/// What is wrong with a key such as `example.dev/role`.
#[must_use]
pub fn qualified_name_error(key: &str) -> Option<String> {
    let (prefix, name) = key
        .split_once('/')
        .map_or((None, key), |(prefix, name)| (Some(prefix), name));
    let fits = is_part(name) && prefix.is_none_or(|prefix| prefix.split('.').all(is_label_of_any_length));
    (!fits).then(|| format!("name part {PART}"))
}

/// What is wrong with the value of a label.
#[must_use]
pub fn label_value_error(text: &str) -> Option<String> {
    if text.len() > 63 {
        return Some("must be no more than 63 bytes".to_owned());
    }
    if text.is_empty() || is_part(text) {
        return None;
    }
    let rule = PART.replacen(
        "must consist of",
        "a valid label must be an empty string or consist of",
        1,
    );
    let rule = rule
        .replace("[A-Za-z0-9]'", "[A-Za-z0-9])?'")
        .replace("'([A-Za-z0-9][-", "'(([A-Za-z0-9][-");
    Some(rule)
}

/// Reports labels that are none.
pub(super) fn check_labels(metadata: &Value, causes: &mut Vec<Cause>) {
    for (key, value) in metadata["labels"].as_object().into_iter().flatten() {
        if let Some(rule) = qualified_name_error(key) {
            causes.push(Cause::invalid("metadata.labels", &json!(key), &rule));
        }
        if let Some(rule) = label_value_error(value.as_str().unwrap_or_default()) {
            causes.push(Cause::invalid("metadata.labels", value, &rule));
        }
    }
}

/// Reports keys of annotations that are none; their case does not matter.
pub(super) fn check_annotation_keys(metadata: &Value, causes: &mut Vec<Cause>) {
    for key in metadata["annotations"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, _)| key)
    {
        if let Some(rule) = qualified_name_error(&key.to_lowercase()) {
            causes.push(Cause::invalid("metadata.annotations", &json!(key), &rule));
        }
    }
}
