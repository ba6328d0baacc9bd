//! Defaulting: absent fields take the schema's default, stray nulls go.
//!
//! Source: `apiextensions-apiserver/pkg/apiserver/schema/defaulting`.

use serde_json::Value;

use super::structural::{Additional, Structural};

/// Fills defaults into `value`; null for a field that is not nullable counts as absent.
pub fn default(value: &mut Value, schema: &Structural) {
    match value {
        Value::Object(map) => {
            for (name, property) in &schema.properties {
                let absent = map.get(name).is_none_or(|v| v.is_null() && !property.nullable);
                if let (true, Some(fill)) = (absent, &property.default) {
                    map.insert(name.clone(), fill.clone());
                }
            }
            map.retain(|name, v| !(v.is_null() && field(schema, name).is_some_and(|s| !s.nullable && typed(s))));
            for (name, v) in map.iter_mut() {
                if let Some(below) = field(schema, name) {
                    default(v, below);
                }
            }
        }
        Value::Array(items) => {
            if let Some(below) = schema.items.as_deref() {
                for item in items {
                    if let (true, Some(fill)) = (item.is_null() && !below.nullable, &below.default) {
                        *item = fill.clone();
                    }
                    default(item, below);
                }
            }
        }
        _ => {}
    }
}

fn field<'a>(schema: &'a Structural, name: &str) -> Option<&'a Structural> {
    schema.properties.get(name).map(|p| &**p).or(match &schema.additional {
        Some(Additional::Schema(s)) => Some(s),
        _ => None,
    })
}

/// Fields of free type may hold null.
fn typed(schema: &Structural) -> bool {
    schema.kind.is_some() || schema.int_or_string
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn defaults_fill_absent_and_null_fields_below_present_objects_only() {
        let schema = Structural::parse(&json!({"type": "object", "properties": {
            "a": {"type": "integer", "default": 3},
            "n": {"type": "string", "nullable": true, "default": "x"},
            "o": {"type": "object", "properties": {"b": {"type": "boolean", "default": true}}},
            "d": {"type": "object", "default": {}, "properties": {"b": {"type": "boolean", "default": true}}},
            "z": {"type": "string"}}}))
        .unwrap();
        let mut value = json!({"a": null, "n": null, "z": null});
        default(&mut value, &schema);
        assert_eq!(value, json!({"a": 3, "n": null, "d": {"b": true}}));
    }

    #[test]
    fn items_and_map_values_are_defaulted() {
        let item = json!({"type": "object", "properties": {"b": {"type": "integer", "default": 1}}});
        let schema = Structural::parse(&json!({"type": "object", "properties": {
            "l": {"type": "array", "items": item}, "m": {"type": "object", "additionalProperties": item}}}))
        .unwrap();
        let mut value = json!({"l": [{}, {"b": 2}], "m": {"k": {}}});
        default(&mut value, &schema);
        assert_eq!(value, json!({"l": [{"b": 1}, {"b": 2}], "m": {"k": {"b": 1}}}));
    }
}
