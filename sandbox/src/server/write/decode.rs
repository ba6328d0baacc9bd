//! What a real API server cannot even decode: values of the wrong type in object metadata and in built-in kinds, whose
//! objects are Go structs there. Answered with 400, in the words of Go's decoder.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::Value;

use super::fields;
use crate::{
    schema::{Cause, Reason},
    server::{call::Call, status::ApiError},
};

/// Refuses an object that a struct could not hold; `causes` is what its schema says of it.
pub fn check(call: &Call, object: &Value, causes: &[Cause]) -> Result<(), ApiError> {
    let resource = &call.resource;
    let wrong = causes.iter().find(|cause| {
        cause.reason == Reason::TypeInvalid && (!resource.custom || cause.field.starts_with("metadata."))
    });
    let why = match wrong {
        Some(cause) => Some(type_error(&resource.kind, object, cause)),
        None if resource.custom => None,
        None => time_error(&resource.kind, object),
    };
    match why {
        Some(why) => Err(fields::undecodable(call, &resource.kind, &resource.version, &why)),
        None => Ok(()),
    }
}

fn type_error(kind: &str, object: &Value, cause: &Cause) -> String {
    let value = at(object, &cause.field);
    let wanted = cause
        .message
        .split("must be of type ")
        .nth(1)
        .and_then(|rest| rest.split(':').next())
        .unwrap_or_default();
    if let (Value::String(text), "byte") = (value, wanted) {
        return base64_error(text);
    }
    let found = match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let wanted = match wanted {
        "integer" => "int64",
        "boolean" => "bool",
        "object" => "map[string]string",
        other => other,
    };
    let field = match cause.field.strip_prefix("metadata.") {
        Some(below) => format!("ObjectMeta.metadata.{below}"),
        None => format!("{kind}.{}", cause.field),
    };
    format!("json: cannot unmarshal {found} into Go struct field {field} of type {wanted}")
}

fn base64_error(text: &str) -> String {
    let place = match STANDARD.decode(text) {
        Err(base64::DecodeError::InvalidByte(place, _) | base64::DecodeError::InvalidLastSymbol(place, _)) => place,
        _ => text.len(),
    };
    format!("illegal base64 data at input byte {place}")
}

/// The value at a path such as `spec.containers[0].name`.
fn at<'a>(object: &'a Value, path: &str) -> &'a Value {
    let steps = path.split(['.', '[', ']']).filter(|step| !step.is_empty());
    steps.fold(object, |value, step| match step.parse::<usize>() {
        Ok(index) if value.is_array() => &value[index],
        _ => &value[step],
    })
}

/// `metav1.MicroTime` is read with its six digits or not at all.
fn time_error(kind: &str, object: &Value) -> Option<String> {
    let fields: &[&str] = match kind {
        "Lease" => &["/spec/acquireTime", "/spec/renewTime"],
        "Event" => &["/eventTime", "/series/lastObservedTime"],
        _ => &[],
    };
    let times = fields.iter().filter_map(|field| object.pointer(field)?.as_str());
    times
        .filter(|time| {
            let fraction = time.get(19..).unwrap_or_default();
            let digits = fraction.strip_prefix('.').unwrap_or_default();
            digits.chars().take_while(char::is_ascii_digit).count() != 6
        })
        .map(|time| {
            let rest = time.get(19..).unwrap_or_default();
            format!(
                "parsing time {time:?} as \"2006-01-02T15:04:05.000000Z07:00\": cannot parse {rest:?} as \".000000\""
            )
        })
        .next()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_wrong_type_is_told_as_the_decoder_of_go_tells_it() {
        let object = json!({"spec": {"containers": [{"name": 3}]}});
        let detail = "spec.containers[0].name in body must be of type string: \"integer\"";
        let cause = Cause::type_invalid("spec.containers[0].name", "integer", detail);
        assert_eq!(
            type_error("Pod", &object, &cause),
            "json: cannot unmarshal number into Go struct field Pod.spec.containers[0].name of type string"
        );
        assert_eq!(base64_error("plain text"), "illegal base64 data at input byte 5");
    }

    #[test]
    fn a_time_of_a_lease_has_microseconds() {
        let lease = |time: &str| json!({"spec": {"renewTime": time}});
        assert_eq!(time_error("Lease", &lease("2026-01-02T03:04:05.678901Z")), None);
        assert!(time_error("Lease", &lease("2026-01-02T03:04:05Z")).is_some());
        assert_eq!(time_error("Pod", &lease("2026-01-02T03:04:05Z")), None);
    }
}
