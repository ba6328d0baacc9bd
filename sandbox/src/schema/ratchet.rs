//! Validation ratcheting (KEP-4008): what an update leaves as it was is not held against it, so that a definition can be
//! tightened without making its objects unwritable.

use serde_json::Value;

use super::cause::{Cause, Reason};

/// Whether the value that `cause` complains about is the one that was there before.
pub(super) fn is_unchanged(cause: &Cause, new: &Value, old: &Value) -> bool {
    let steps = steps(&cause.field);
    // What is missing, or there twice, is a fault of the object or list around it.
    let depth = match cause.reason {
        Reason::Required | Reason::Duplicate => steps.len().saturating_sub(1),
        _ => steps.len(),
    };
    // A change at the root is any change at all.
    if depth == 0 {
        return false;
    }
    let found = |root: &Value| {
        steps[..depth].iter().try_fold(root.clone(), |value, step| match step {
            Step::Key(key) => value.get(key).cloned(),
            Step::Index(index) => value.get(index).cloned(),
        })
    };
    match (found(new), found(old)) {
        (Some(new), Some(old)) => new == old,
        _ => false,
    }
}

#[derive(Debug)]
enum Step {
    Key(String),
    Index(usize),
}

/// `spec.ports[1].name`, step by step; keys with dots of their own stand in brackets.
fn steps(path: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    for part in path.split(['.', '[']).filter(|part| !part.is_empty()) {
        let inner = part.trim_end_matches(']');
        match inner.parse() {
            Ok(index) if part.ends_with(']') => steps.push(Step::Index(index)),
            _ => steps.push(Step::Key(inner.to_owned())),
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_stayed_is_forgiven() {
        let old = json!({"spec": {"a": 9, "list": [{"x": 1}, {"x": 1}]}});
        let mut new = old.clone();
        new["spec"]["b"] = json!(1);
        let at = |field: &str| Cause::invalid(field, &json!(9), "too large");
        assert!(is_unchanged(&at("spec.a"), &new, &old));
        assert!(is_unchanged(&at("spec.list[1].x"), &new, &old));
        assert!(!is_unchanged(&at("spec.b"), &new, &old));
        assert!(!is_unchanged(&at("spec"), &new, &old));
        assert!(is_unchanged(&Cause::duplicate("spec.list[1]", &json!(1)), &new, &old));
        assert!(!is_unchanged(&Cause::required("spec.c", ""), &new, &old));
        assert!(!is_unchanged(&at(""), &old, &old));
    }
}
