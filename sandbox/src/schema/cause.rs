//! Why a value is refused: one cause per field, worded as the Kubernetes API server words it.
//!
//! Source of the wording: `k8s.io/apimachinery/pkg/util/validation/field/errors.go` (v0.35).

use serde::Serialize;
use serde_json::Value;

/// Machine-readable kind of a cause: `metav1.CauseType`.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, Serialize)]
pub enum Reason {
    /// A field that must be present is absent.
    #[serde(rename = "FieldValueRequired")]
    Required,
    /// Two items of a set or a list map have the same key.
    #[serde(rename = "FieldValueDuplicate")]
    Duplicate,
    /// The value breaks a rule.
    #[serde(rename = "FieldValueInvalid")]
    Invalid,
    /// The value is not one of the enumerated ones.
    #[serde(rename = "FieldValueNotSupported")]
    NotSupported,
    /// The value may not be set here.
    #[serde(rename = "FieldValueForbidden")]
    Forbidden,
    /// The string is too long.
    #[serde(rename = "FieldValueTooLong")]
    TooLong,
    /// The list or map has too many entries.
    #[serde(rename = "FieldValueTooMany")]
    TooMany,
    /// The value has another JSON type than the schema says.
    #[serde(rename = "FieldValueTypeInvalid")]
    TypeInvalid,
    /// Another field manager owns the field with another value.
    #[serde(rename = "FieldManagerConflict")]
    FieldManagerConflict,
    /// A name that refers to nothing.
    #[serde(rename = "FieldValueNotFound")]
    NotFound,
    /// The namespace is being deleted.
    NamespaceTerminating,
    /// A disruption budget has no room.
    DisruptionBudget,
    /// The version asked for has not been reached.
    #[serde(rename = "ResourceVersionTooLarge")]
    VersionTooLarge,
}

impl Reason {
    /// The `reason` text of a `metav1.StatusCause`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Required => "FieldValueRequired",
            Self::Duplicate => "FieldValueDuplicate",
            Self::Invalid => "FieldValueInvalid",
            Self::NotSupported => "FieldValueNotSupported",
            Self::Forbidden => "FieldValueForbidden",
            Self::TooLong => "FieldValueTooLong",
            Self::TooMany => "FieldValueTooMany",
            Self::TypeInvalid => "FieldValueTypeInvalid",
            Self::FieldManagerConflict => "FieldManagerConflict",
            Self::NotFound => "FieldValueNotFound",
            Self::NamespaceTerminating => "NamespaceTerminating",
            Self::DisruptionBudget => "DisruptionBudget",
            Self::VersionTooLarge => "ResourceVersionTooLarge",
        }
    }
}

/// One refused field; serialises as a `metav1.StatusCause`.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Cause {
    /// Machine-readable kind.
    pub reason: Reason,
    /// What is wrong, without the field's name.
    pub message: String,
    /// Path of the field, such as `spec.items[0].name`.
    pub field: String,
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

impl Cause {
    fn new(reason: Reason, field: &str, message: String) -> Self {
        Self {
            reason,
            message,
            field: if field.is_empty() {
                "<nil>".to_owned()
            } else {
                field.to_owned()
            },
        }
    }

    /// A required field is absent; `detail` may be empty.
    #[must_use]
    pub fn required(field: &str, detail: &str) -> Self {
        Self::new(
            Reason::Required,
            field,
            with_detail("Required value".to_owned(), detail),
        )
    }

    /// A value breaks a rule that `detail` states.
    #[must_use]
    pub fn invalid(field: &str, value: &Value, detail: &str) -> Self {
        Self::new(
            Reason::Invalid,
            field,
            with_detail(format!("Invalid value: {}", shown(value)), detail),
        )
    }

    /// A value too large to be shown breaks a rule that `detail` states.
    #[must_use]
    pub fn invalid_unshown(field: &str, detail: &str) -> Self {
        Self::new(Reason::Invalid, field, with_detail("Invalid value".to_owned(), detail))
    }

    /// A value of type `value` (a JSON type name or the text itself) where the schema asks for another type.
    #[must_use]
    pub fn type_invalid(field: &str, value: &str, detail: &str) -> Self {
        let shown = shown(&Value::String(value.to_owned()));
        Self::new(
            Reason::TypeInvalid,
            field,
            with_detail(format!("Invalid value: {shown}"), detail),
        )
    }

    /// A value outside an enumeration.
    #[must_use]
    pub fn not_supported(field: &str, value: &Value, supported: &[Value]) -> Self {
        let texts: Vec<String> = supported.iter().map(|v| quoted(&plain(v))).collect();
        let detail = if texts.is_empty() {
            String::new()
        } else {
            format!("supported values: {}", texts.join(", "))
        };
        Self::new(
            Reason::NotSupported,
            field,
            with_detail(format!("Unsupported value: {}", shown(value)), &detail),
        )
    }

    /// A second item with the same key.
    #[must_use]
    pub fn duplicate(field: &str, value: &Value) -> Self {
        Self::new(Reason::Duplicate, field, format!("Duplicate value: {}", shown(value)))
    }

    /// A value that may not be set or changed here.
    #[must_use]
    pub fn forbidden(field: &str, detail: &str) -> Self {
        Self::new(Reason::Forbidden, field, with_detail("Forbidden".to_owned(), detail))
    }

    /// A string above `limit` bytes.
    #[must_use]
    pub fn too_long(field: &str, limit: u64) -> Self {
        let unit = if limit == 1 { "byte" } else { "bytes" };
        Self::new(
            Reason::TooLong,
            field,
            format!("Too long: may not be more than {limit} {unit}"),
        )
    }

    /// A list or map with `actual` entries above `limit`.
    #[must_use]
    pub fn too_many(field: &str, actual: u64, limit: u64) -> Self {
        let unit = if limit == 1 { "item" } else { "items" };
        Self::new(
            Reason::TooMany,
            field,
            format!("Too many: {actual}: must have at most {limit} {unit}"),
        )
    }

    /// A field that `manager` owns with another value; `field` begins with a dot.
    #[must_use]
    pub fn manager_conflict(field: &str, manager: &str) -> Self {
        Self::new(Reason::FieldManagerConflict, field, format!("conflict with {manager}"))
    }

    /// A value that refers to nothing.
    #[must_use]
    pub fn not_found(field: &str, value: &Value) -> Self {
        Self::new(Reason::NotFound, field, format!("Not found: {}", shown(value)))
    }

    /// The namespace takes nothing new.
    #[must_use]
    pub fn namespace_terminating(namespace: &str) -> Self {
        Self::new(
            Reason::NamespaceTerminating,
            "metadata.namespace",
            format!("namespace {namespace} is being terminated"),
        )
    }

    /// A disruption budget has no room; of no field.
    #[must_use]
    pub fn disruption_budget(message: &str) -> Self {
        Self {
            reason: Reason::DisruptionBudget,
            message: message.to_owned(),
            field: String::new(),
        }
    }

    /// The version asked for has not been reached; of no field.
    #[must_use]
    pub fn version_too_large() -> Self {
        Self {
            reason: Reason::VersionTooLarge,
            message: "Too large resource version".to_owned(),
            field: String::new(),
        }
    }

    /// True when CEL rules must not run because their input has the wrong shape.
    #[must_use]
    pub fn blocks_rules(&self) -> bool {
        matches!(
            self.reason,
            Reason::NotSupported | Reason::Required | Reason::TooLong | Reason::TooMany | Reason::TypeInvalid
        )
    }
}

/// The text after `is invalid: ` in a 422: one cause as it is, several in brackets.
#[must_use]
pub fn summary(causes: &[Cause]) -> String {
    let mut texts: Vec<String> = Vec::new();
    for cause in causes {
        let text = cause.to_string();
        if !texts.contains(&text) {
            texts.push(text);
        }
    }
    match texts.as_slice() {
        [only] => only.clone(),
        _ => format!("[{}]", texts.join(", ")),
    }
}

fn with_detail(head: String, detail: &str) -> String {
    if detail.is_empty() {
        head
    } else {
        format!("{head}: {detail}")
    }
}

/// A value as an error message shows it: null as the text "null", everything else as JSON.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::String(text) => quoted(text),
        other => other.to_string(),
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Text in double quotes with escapes, as Go's `%q` writes it.
#[must_use]
pub fn quoted(text: &str) -> String {
    Value::String(text.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn causes_are_worded_as_kubernetes_words_them() {
        assert_eq!(Cause::required("spec.a", "").message, "Required value");
        assert_eq!(
            Cause::not_supported("spec.a", &json!("x"), &[json!("a"), json!("b")]).message,
            r#"Unsupported value: "x": supported values: "a", "b""#
        );
        assert_eq!(
            Cause::too_many("spec.a", 3, 1).message,
            "Too many: 3: must have at most 1 item"
        );
        assert_eq!(
            Cause::too_long("spec.a", 5).message,
            "Too long: may not be more than 5 bytes"
        );
        assert_eq!(
            Cause::invalid("", &Value::Null, "no").to_string(),
            "<nil>: Invalid value: null: no"
        );
    }

    #[test]
    fn several_causes_are_summed_up_in_brackets_and_repeats_are_dropped() {
        let a = Cause::required("a", "");
        let b = Cause::required("b", "");
        assert_eq!(summary(std::slice::from_ref(&a)), "a: Required value");
        assert_eq!(summary(&[a.clone(), b, a]), "[a: Required value, b: Required value]");
    }
}
