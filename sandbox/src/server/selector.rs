//! Label and field selectors (apimachinery `labels`, `fields`).

use serde_json::Value;

use super::write::name;
use crate::schema::cause::quoted;

/// One requirement on a label.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    Absent(String),
}

/// `a=b,c!=d,e in (f,g),h notin (i),j,!k`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSelector(Vec<Requirement>);

impl LabelSelector {
    /// Reads the query's form.
    pub fn parse(text: &str) -> Result<Self, String> {
        split_outside_parentheses(text)
            .into_iter()
            .map(parse_requirement)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Selects everything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether an object's labels satisfy all requirements.
    #[must_use]
    pub fn matches(&self, object: &Value) -> bool {
        let labels = &object["metadata"]["labels"];
        self.0.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => labels[key]
                .as_str()
                .is_some_and(|label| values.iter().any(|v| v == label)),
            Requirement::NotIn(key, values) => labels[key]
                .as_str()
                .is_none_or(|label| values.iter().all(|value| value != label)),
            Requirement::Exists(key) => labels[key].is_string(),
            Requirement::Absent(key) => !labels[key].is_string(),
        })
    }
}

fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut depth, mut start) = (0usize, 0);
    for (index, character) in text.char_indices() {
        match character {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.push(&text[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
        .into_iter()
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .collect()
}

fn parse_requirement(text: &str) -> Result<Requirement, String> {
    let refuse = || format!("unable to parse requirement: {text:?}");
    let check = |key: &str| -> Result<String, String> {
        let key = key.trim();
        match name::qualified_name_error(key) {
            None => Ok(key.to_owned()),
            Some(rule) => Err(format!(
                "unable to parse requirement: <nil>: Invalid value: {}: {rule}",
                quoted(key)
            )),
        }
    };
    if let Some((key, value)) = text.split_once("!=") {
        return Ok(Requirement::NotIn(check(key)?, vec![value.trim().to_owned()]));
    }
    if let Some((key, value)) = text.split_once("==").or_else(|| text.split_once('=')) {
        return Ok(Requirement::In(check(key)?, vec![value.trim().to_owned()]));
    }
    if let Some(key) = text.strip_prefix('!') {
        return Ok(Requirement::Absent(check(key)?));
    }
    if let Some((head, list)) = text.split_once('(') {
        let values: Vec<String> = list
            .strip_suffix(')')
            .ok_or_else(refuse)?
            .split(',')
            .map(|value| value.trim().to_owned())
            .collect();
        return match head.split_whitespace().collect::<Vec<_>>().as_slice() {
            [key, "in"] => Ok(Requirement::In(check(key)?, values)),
            [key, "notin"] => Ok(Requirement::NotIn(check(key)?, values)),
            _ => Err(refuse()),
        };
    }
    Ok(Requirement::Exists(check(text)?))
}

/// `metadata.name=x,status.phase!=Running`: path, whether it must be equal, value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSelector(Vec<(String, bool, String)>);

impl FieldSelector {
    /// Reads the query's form.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parse_term = |term: &str| {
            let split = |operator: &str| term.split_once(operator).map(|(k, v)| (k.to_owned(), v.to_owned()));
            if let Some((path, value)) = split("!=") {
                return Ok((path, false, value));
            }
            let (path, value) = split("==")
                .or_else(|| split("="))
                .ok_or_else(|| format!("invalid selector: '{term}'; can't understand '{term}'"))?;
            Ok((path, true, value))
        };
        text.split(',')
            .filter(|term| !term.is_empty())
            .map(parse_term)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Selects everything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The paths that are asked about.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(path, _, _)| path.as_str())
    }

    /// The name, if the selector asks for exactly one.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.0
            .iter()
            .find(|(path, equal, _)| *equal && path == "metadata.name")
            .map(|(_, _, value)| value.as_str())
    }

    /// Whether an object's fields satisfy all terms; an absent field counts as empty.
    #[must_use]
    pub fn matches(&self, object: &Value) -> bool {
        self.0
            .iter()
            .all(|(path, equal, value)| (field(object, path) == *value) == *equal)
    }
}

/// A scalar below dots as text, empty where it is absent.
fn field(object: &Value, path: &str) -> String {
    let found = path
        .trim_start_matches('.')
        .split('.')
        .fold(object, |value, part| &value[part]);
    match found {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        Value::Bool(flag) => flag.to_string(),
        Value::Null if path == "spec.unschedulable" => "false".into(),
        Value::Null | Value::Array(_) | Value::Object(_) => String::new(),
    }
}

/// Fields that can be selected on besides `metadata.name` and `metadata.namespace`.
#[must_use]
pub fn selectable_fields(group: &str, plural: &str) -> &'static [&'static str] {
    match (group, plural) {
        ("", "pods") => &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ],
        ("", "nodes") => &["spec.unschedulable"],
        ("", "namespaces") => &["status.phase"],
        ("", "secrets") => &["type"],
        ("", "services") => &["spec.clusterIP", "spec.type"],
        ("" | "events.k8s.io", "events") => &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "regarding.kind",
            "regarding.namespace",
            "regarding.name",
            "regarding.uid",
            "regarding.apiVersion",
            "regarding.resourceVersion",
            "regarding.fieldPath",
            "reason",
            "reportingComponent",
            "reportingController",
            "source",
            "type",
        ],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn selects(selector: &str, labels: &Value) -> bool {
        LabelSelector::parse(selector)
            .unwrap()
            .matches(&json!({"metadata": {"labels": labels}}))
    }

    #[test]
    fn each_label_operator_selects_as_kubernetes_does() {
        let labels = json!({"a": "1", "b": "2"});
        for (selector, expected) in [
            ("", true),
            ("a=1", true),
            ("a==1,b=2", true),
            ("a!=1", false),
            ("c!=1", true),
            ("a in (0, 1)", true),
            ("a notin (0,1)", false),
            ("c notin (0)", true),
            ("a", true),
            ("!a", false),
            ("!c", true),
        ] {
            assert_eq!(selects(selector, &labels), expected, "{selector}");
        }
    }

    #[test]
    fn a_malformed_label_selector_is_refused() {
        assert!(LabelSelector::parse("a in (b").is_err());
        assert!(LabelSelector::parse("a b").is_err());
    }

    #[test]
    fn an_absent_field_is_empty() {
        let selector = FieldSelector::parse("spec.nodeName=").unwrap();
        assert!(selector.matches(&json!({"spec": {}})));
        assert!(!selector.matches(&json!({"spec": {"nodeName": "n"}})));
    }
}
