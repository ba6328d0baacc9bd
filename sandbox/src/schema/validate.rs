//! Validation of a value by its schema: types, bounds, enumerations, formats and junctors.
//!
//! Source of the wording: `kube-openapi/pkg/validation` and `apiextensions-apiserver/pkg/apiserver/validation`.

use serde_json::{Map, Value};

use super::{
    cause::{Cause, quoted},
    format,
    structural::{Additional, Kind, Structural},
};

/// Reports everything in `value` that `schema` refuses; CEL rules and list uniqueness are checked elsewhere.
pub(crate) fn check(value: &Value, schema: &Structural, at: &str, causes: &mut Vec<Cause>) {
    if !kind(value, schema, at, causes) {
        return;
    }
    if value.is_null() {
        return;
    }
    enumeration(value, schema, at, causes);
    match value {
        Value::Number(n) => number(n, schema, at, causes),
        Value::String(text) => string(text, schema, at, causes),
        Value::Array(items) => array(items, schema, at, causes),
        Value::Object(map) => object(map, schema, at, causes),
        Value::Null | Value::Bool(_) => {}
    }
    junctors(value, schema, at, causes);
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(n) if n.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn kind(value: &Value, schema: &Structural, at: &str, causes: &mut Vec<Cause>) -> bool {
    let whole = |n: &serde_json::Number| !n.is_f64() || n.as_f64().is_some_and(|f| f.fract() == 0.0);
    let fits = match (schema.kind, value) {
        (_, Value::Null) => schema.nullable || (schema.kind.is_none() && !schema.int_or_string),
        (None, Value::Number(n)) if schema.int_or_string => whole(n),
        (None, Value::String(_)) => true,
        (None, _) => !schema.int_or_string,
        (Some(Kind::Integer), Value::Number(n)) => whole(n),
        (Some(Kind::Number), Value::Number(_))
        | (Some(Kind::Object), Value::Object(_))
        | (Some(Kind::Array), Value::Array(_))
        | (Some(Kind::String), Value::String(_))
        | (Some(Kind::Boolean), Value::Bool(_)) => true,
        (Some(_), _) => false,
    };
    if !fits {
        let wanted = schema.kind.map_or("integer,string", Kind::as_str);
        let found = type_name(value);
        causes.push(Cause::type_invalid(
            at,
            found,
            &format!("{at} in body must be of type {wanted}: {}", quoted(found)),
        ));
    }
    fits
}

fn enumeration(value: &Value, schema: &Structural, at: &str, causes: &mut Vec<Cause>) {
    if !schema.enumeration.is_empty() && !schema.enumeration.contains(value) {
        causes.push(Cause::not_supported(at, value, &schema.enumeration));
    }
}

fn number(n: &serde_json::Number, schema: &Structural, at: &str, causes: &mut Vec<Cause>) {
    let (Some(x), bounds) = (n.as_f64(), &schema.bounds) else {
        return;
    };
    let value = Value::Number(n.clone());
    let mut refuse =
        |detail: String| causes.push(Cause::invalid(at, &value, &format!("{at} in body should be {detail}")));
    match bounds.multiple_of {
        Some(step) if step > 0.0 && ((x / step).round() - x / step).abs() > 1e-9 => {
            refuse(format!("a multiple of {step}"));
        }
        _ => {}
    }
    match bounds.maximum {
        Some(max) if bounds.exclusive_maximum && x >= max => refuse(format!("less than {max}")),
        Some(max) if !bounds.exclusive_maximum && x > max => refuse(format!("less than or equal to {max}")),
        _ => {}
    }
    match bounds.minimum {
        Some(min) if bounds.exclusive_minimum && x <= min => refuse(format!("greater than {min}")),
        Some(min) if !bounds.exclusive_minimum && x < min => refuse(format!("greater than or equal to {min}")),
        _ => {}
    }
}

fn string(text: &str, schema: &Structural, at: &str, causes: &mut Vec<Cause>) {
    let value = || Value::String(text.to_owned());
    let length = text.chars().count() as u64;
    if let Some(max) = schema.bounds.max_length.filter(|max| length > *max) {
        causes.push(Cause::too_long(at, max));
    }
    if let Some(min) = schema.bounds.min_length.filter(|min| length < *min) {
        causes.push(Cause::invalid(
            at,
            &value(),
            &format!("{at} in body should be at least {min} chars long"),
        ));
    }
    if let Some(pattern) = schema.pattern.as_ref().filter(|p| !p.is_match(text)) {
        causes.push(Cause::invalid(
            at,
            &value(),
            &format!("{at} in body should match '{}'", pattern.as_str()),
        ));
    }
    if let Some(format) = schema.format.as_deref().filter(|f| !format::matches(f, text)) {
        let detail = format!("{at} in body must be of type {format}: {}", quoted(text));
        causes.push(Cause::type_invalid(at, text, &detail));
    }
}

fn array(items: &[Value], schema: &Structural, at: &str, causes: &mut Vec<Cause>) {
    if let Some(below) = schema.items.as_deref() {
        for (i, item) in items.iter().enumerate() {
            check(item, below, &super::path::index(at, i), causes);
        }
    }
    let count = items.len() as u64;
    if let Some(min) = schema.bounds.min_items.filter(|min| count < *min) {
        let detail = format!("{at} in body should have at least {min} items");
        causes.push(Cause::invalid(at, &Value::from(count), &detail));
    }
    if let Some(max) = schema.bounds.max_items.filter(|max| count > *max) {
        causes.push(Cause::too_many(at, count, max));
    }
    if schema.unique_items && items.iter().enumerate().any(|(i, item)| items[..i].contains(item)) {
        causes.push(Cause::invalid(
            at,
            &Value::from(""),
            &format!("{at} in body shouldn't contain duplicates"),
        ));
    }
}

fn object(map: &Map<String, Value>, schema: &Structural, at: &str, causes: &mut Vec<Cause>) {
    let count = map.len() as u64;
    if let Some(min) = schema.bounds.min_properties.filter(|min| count < *min) {
        let detail = format!("{at} in body should have at least {min} properties");
        causes.push(Cause::invalid(at, &Value::from(count), &detail));
    }
    if let Some(max) = schema.bounds.max_properties.filter(|max| count > *max) {
        causes.push(Cause::too_many(at, count, max));
    }
    // In the order of their names, as the API server tells them, whichever order this build's maps keep.
    let mut members: Vec<_> = map.iter().collect();
    members.sort_unstable_by_key(|(name, _)| *name);
    for (name, child) in members {
        let here = super::path::child(at, name);
        match (schema.properties.get(name), &schema.additional) {
            (Some(property), _) | (None, Some(Additional::Schema(property))) => check(child, property, &here, causes),
            (None, Some(Additional::None)) => {
                let detail = format!("{here} in body is a forbidden property");
                causes.push(Cause::invalid(at, &Value::from(name.as_str()), &detail));
            }
            (None, _) => {}
        }
    }
    for name in schema.required.iter().filter(|name| !map.contains_key(*name)) {
        causes.push(Cause::required(&super::path::child(at, name), ""));
    }
}

fn junctors(value: &Value, schema: &Structural, at: &str, causes: &mut Vec<Cause>) {
    let junctors = &schema.junctors;
    let verdict = |branch: &Structural| {
        let mut found = Vec::new();
        check(value, branch, at, &mut found);
        found
    };
    // Composite refusals carry no field of their own on the API server either.
    let composite = |detail: String| Cause::invalid("", &Value::from(""), &detail);
    let name = quoted(at);
    let least = |all: Vec<Vec<Cause>>| all.into_iter().min_by_key(Vec::len).unwrap_or_default();
    if !junctors.any_of.is_empty() {
        let verdicts: Vec<_> = junctors.any_of.iter().map(|b| verdict(b)).collect();
        if verdicts.iter().all(|v| !v.is_empty()) {
            causes.push(composite(format!("{name} must validate at least one schema (anyOf)")));
            causes.extend(least(verdicts));
        }
    }
    if !junctors.one_of.is_empty() {
        let verdicts: Vec<_> = junctors.one_of.iter().map(|b| verdict(b)).collect();
        match verdicts.iter().filter(|v| v.is_empty()).count() {
            1 => {}
            0 => {
                causes.push(composite(format!(
                    "{name} must validate one and only one schema (oneOf). Found none valid"
                )));
                causes.extend(least(verdicts));
            }
            many => {
                let detail = format!("must validate one and only one schema (oneOf). Found {many} valid alternatives");
                causes.push(composite(format!("{name} {detail}")));
            }
        }
    }
    let verdicts: Vec<_> = junctors.all_of.iter().map(|b| verdict(b)).collect();
    if verdicts.iter().any(|v| !v.is_empty()) {
        let none = if verdicts.iter().all(|v| !v.is_empty()) {
            ". None validated"
        } else {
            ""
        };
        causes.extend(verdicts.into_iter().flatten());
        causes.push(composite(format!("{name} must validate all the schemas (allOf){none}")));
    }
    if junctors.not.as_deref().is_some_and(|not| verdict(not).is_empty()) {
        causes.push(composite(format!("{name} must not validate the schema (not)")));
    }
}
