//! Pruning: fields that the schema does not know are taken away.
//!
//! Source: `apiextensions-apiserver/pkg/apiserver/schema/pruning/algorithm.go`.

use serde_json::{Map, Value};

use super::{
    path,
    structural::{Additional, Structural},
};

/// Removes unknown fields from `value` and returns their paths, sorted.
///
/// `apiVersion`, `kind` and `metadata` of the root and of embedded resources stay.
pub fn prune(value: &mut Value, schema: &Structural) -> Vec<String> {
    let mut removed = Vec::new();
    node(value, Some(schema), "", true, &mut removed);
    removed.sort();
    removed
}

fn node(value: &mut Value, schema: Option<&Structural>, at: &str, root: bool, removed: &mut Vec<String>) {
    match value {
        Value::Object(map) => match schema {
            Some(schema) => object(map, schema, at, root, removed),
            None => drain(map, at, removed),
        },
        Value::Array(items) => {
            // Inside a preserved list without item schema everything is preserved.
            let kept = schema.is_some_and(|s| s.preserve_unknown && s.items.is_none());
            if kept {
                return;
            }
            let below = schema.and_then(|s| s.items.as_deref());
            for (i, item) in items.iter_mut().enumerate() {
                node(item, below, &path::index(at, i), false, removed);
            }
        }
        _ => {}
    }
}

fn object(map: &mut Map<String, Value>, schema: &Structural, at: &str, root: bool, removed: &mut Vec<String>) {
    let mut unknown = Vec::new();
    for (name, value) in map.iter_mut() {
        let here = path::child(at, name);
        match (schema.properties.get(name), &schema.additional) {
            (Some(property), _) => node(value, Some(property), &here, false, removed),
            (None, _) if (root || schema.embedded) && is_type_meta(name) => {}
            (None, Some(Additional::Schema(property))) => node(value, Some(property), &here, false, removed),
            (None, Some(Additional::Any)) if !schema.preserve_unknown => node(value, None, &here, false, removed),
            (None, _) if schema.preserve_unknown => {}
            (None, _) => unknown.push(name.clone()),
        }
    }
    for name in unknown {
        map.remove(&name);
        removed.push(path::child(at, &name));
    }
}

fn drain(map: &mut Map<String, Value>, at: &str, removed: &mut Vec<String>) {
    for name in map.keys() {
        removed.push(path::child(at, name));
    }
    map.clear();
}

fn is_type_meta(name: &str) -> bool {
    matches!(name, "apiVersion" | "kind" | "metadata")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pruned(schema: &Value, mut value: Value) -> (Value, Vec<String>) {
        let removed = prune(&mut value, &Structural::parse(schema).unwrap());
        (value, removed)
    }

    #[test]
    fn unknown_fields_go_and_are_named() {
        let schema = json!({"type": "object", "properties": {"spec": {"type": "object", "properties": {
            "list": {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string"}}}}}}}});
        let (value, removed) = pruned(
            &schema,
            json!({"kind": "K", "metadata": {"x": 1}, "spec": {"foo": 1, "list": [{"a": "b", "c": {"d": 1}}]}}),
        );
        assert_eq!(
            value,
            json!({"kind": "K", "metadata": {"x": 1}, "spec": {"list": [{"a": "b"}]}})
        );
        assert_eq!(removed, ["spec.foo", "spec.list[0].c"]);
    }

    #[test]
    fn preserved_objects_keep_unknown_fields_and_prune_below_known_ones() {
        let schema = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true,
            "properties": {"a": {"type": "object", "properties": {"b": {"type": "string"}}}}});
        let (value, removed) = pruned(&schema, json!({"x": {"y": 1}, "a": {"b": "", "c": 1}}));
        assert_eq!(value, json!({"x": {"y": 1}, "a": {"b": ""}}));
        assert_eq!(removed, ["a.c"]);
    }

    #[test]
    fn an_embedded_resource_keeps_its_type_and_metadata() {
        let schema = json!({"type": "object", "properties": {"t": {
            "type": "object", "x-kubernetes-embedded-resource": true, "properties": {"spec": {"type": "object"}}}}});
        let (value, _) = pruned(
            &schema,
            json!({"t": {"kind": "Pod", "metadata": {"name": "x"}, "other": 1}}),
        );
        assert_eq!(value, json!({"t": {"kind": "Pod", "metadata": {"name": "x"}}}));
    }
}
