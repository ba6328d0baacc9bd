//! Values seen through their schema: which paths they set, how two of them differ, merge and lose fields.
//!
//! Source: `sigs.k8s.io/structured-merge-diff/v6/typed`. A value of free type has granular maps and atomic lists.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use serde_json::{Map, Value};

use super::fields::{self, FieldSet};
use crate::schema::{
    list::item_key,
    structural::{Kind, ListType, Structural},
};

/// A value's schema, where it has one.
type Schema<'a> = Option<&'a Structural>;

/// How a value is divided into owned fields.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Shape {
    /// One field as a whole.
    Leaf,
    /// One field per key.
    Map,
    /// One field per item.
    List,
}

fn shape(value: &Value, schema: Schema<'_>) -> Shape {
    match value {
        Value::Object(_) => {
            let whole = schema.is_some_and(|s| s.atomic_map || !matches!(s.kind, None | Some(Kind::Object)));
            if whole { Shape::Leaf } else { Shape::Map }
        }
        Value::Array(items) => match schema.map(|s| &s.list_type) {
            Some(ListType::Set) => Shape::List,
            Some(ListType::Map(_)) if items.iter().all(Value::is_object) => Shape::List,
            _ => Shape::Leaf,
        },
        _ => Shape::Leaf,
    }
}

fn child<'a>(schema: Schema<'a>, name: &str) -> Schema<'a> {
    schema?.field(name).map(|s| &**s)
}

fn items_of(schema: Schema<'_>) -> Schema<'_> {
    schema?.items.as_deref()
}

fn step(schema: Schema<'_>, item: &Value) -> String {
    match schema {
        Some(s) => match &s.list_type {
            ListType::Map(keys) => fields::key(&item_key(s, keys, item)),
            ListType::Set | ListType::Atomic => fields::value(item),
        },
        None => fields::value(item),
    }
}

/// Why a value cannot be applied: an item without its keys, or given twice.
pub(super) fn refusal(value: &Value, schema: Schema<'_>, at: &str) -> Option<String> {
    match (value, shape(value, schema)) {
        (Value::Object(map), Shape::Map) => map
            .iter()
            .find_map(|(name, below)| refusal(below, child(schema, name), &format!("{at}.{name}"))),
        (Value::Array(items), Shape::List) => {
            let mut seen = HashSet::new();
            for (i, item) in items.iter().enumerate() {
                if let Some(missing) = missing_key(schema, item) {
                    let why = "associative list with keys has an element that omits key field";
                    return Some(format!(
                        "{at}: element {i}: {why} {missing:?} (and doesn't have default value)"
                    ));
                }
                let step = step(schema, item);
                if !seen.insert(step.clone()) {
                    let mut one = FieldSet::default();
                    one.insert(&[step]);
                    return Some(format!("{at}: duplicate entries for key {}", one.paths().join("")));
                }
                if let Some(found) = refusal(item, items_of(schema), &format!("{at}[{i}]")) {
                    return Some(found);
                }
            }
            None
        }
        _ => None,
    }
}

fn missing_key(schema: Schema<'_>, item: &Value) -> Option<String> {
    let schema = schema?;
    let ListType::Map(keys) = &schema.list_type else {
        return None;
    };
    let present = item_key(schema, keys, item);
    keys.iter().find(|key| !present.contains_key(*key)).cloned()
}

/// The paths that `value` sets.
pub(super) fn field_set(value: &Value, schema: Schema<'_>) -> FieldSet {
    let mut set = FieldSet::default();
    collect(value, schema, &mut Vec::new(), &mut set);
    set
}

fn collect(value: &Value, schema: Schema<'_>, path: &mut Vec<String>, set: &mut FieldSet) {
    match (value, shape(value, schema)) {
        (Value::Object(map), Shape::Map) => {
            for (name, below) in map {
                path.push(fields::field(name));
                collect(below, child(schema, name), path, set);
                let declared = schema.is_some_and(|s| s.properties.contains_key(name));
                if !declared || below.is_null() || below.as_object().is_some_and(Map::is_empty) {
                    set.insert(path);
                }
                path.pop();
            }
        }
        (Value::Array(items), Shape::List) => {
            for item in items {
                path.push(step(schema, item));
                collect(item, items_of(schema), path, set);
                set.insert(path);
                path.pop();
            }
        }
        _ => set.insert(path),
    }
}

/// Paths that differ between two values.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// Only in the new value.
    pub(super) added: FieldSet,
    /// In both, with another value.
    pub(super) modified: FieldSet,
    /// Only in the old value.
    pub(super) removed: FieldSet,
}

/// Compares two values of one schema.
pub(super) fn compare(old: &Value, new: &Value, schema: Schema<'_>) -> Changes {
    let mut changes = Changes::default();
    differ(Some(old), Some(new), schema, &mut Vec::new(), &mut changes);
    changes
}

fn differ(old: Option<&Value>, new: Option<&Value>, schema: Schema<'_>, path: &mut Vec<String>, changes: &mut Changes) {
    let shapes = (old.map(|o| shape(o, schema)), new.map(|n| shape(n, schema)));
    let shape = match shapes {
        (Some(a), Some(b)) if a == b => a,
        (Some(a), None) => a,
        (None, Some(b)) => b,
        _ => Shape::Leaf,
    };
    let empty = |v: Option<&Value>| match v {
        Some(Value::Object(map)) => map.is_empty(),
        Some(Value::Array(items)) => items.is_empty(),
        Some(_) => false,
        None => true,
    };
    if shape == Shape::Leaf || (empty(old) && empty(new)) {
        match (old, new) {
            (None, Some(_)) => changes.added.insert(path),
            (Some(_), None) => changes.removed.insert(path),
            (Some(a), Some(b)) if a != b => changes.modified.insert(path),
            _ => {}
        }
        return;
    }
    let (before, after) = (parts(old, schema, shape), parts(new, schema, shape));
    let steps: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    for step in steps {
        let below = match shape {
            Shape::Map => child(schema, step.get(2..).unwrap_or_default()),
            _ => items_of(schema),
        };
        path.push(step.clone());
        differ(
            before.get(step).copied(),
            after.get(step).copied(),
            below,
            path,
            changes,
        );
        path.pop();
    }
    match (old, new) {
        (None, _) => changes.added.insert(path),
        (_, None) => changes.removed.insert(path),
        _ => {}
    }
}

fn parts<'a>(value: Option<&'a Value>, schema: Schema<'_>, shape: Shape) -> BTreeMap<String, &'a Value> {
    match (value, shape) {
        (Some(Value::Object(map)), Shape::Map) => map.iter().map(|(name, v)| (fields::field(name), v)).collect(),
        (Some(Value::Array(items)), Shape::List) => {
            // Of repeated items the first counts.
            items.iter().rev().map(|item| (step(schema, item), item)).collect()
        }
        _ => BTreeMap::new(),
    }
}

/// Merges `new` over `old`: maps and keyed lists by entry, everything else replaced.
pub(super) fn merge(old: &Value, new: &Value, schema: Schema<'_>) -> Value {
    let shape = shape(new, schema);
    match (old, new) {
        (Value::Object(before), Value::Object(after)) if shape == Shape::Map => {
            let mut merged = before.clone();
            for (name, value) in after {
                let below = before
                    .get(name)
                    .map_or_else(|| value.clone(), |b| merge(b, value, child(schema, name)));
                merged.insert(name.clone(), below);
            }
            Value::Object(merged)
        }
        (Value::Array(before), Value::Array(after)) if shape == Shape::List => {
            Value::Array(merge_items(before, after, schema))
        }
        _ => new.clone(),
    }
}

/// Items of `after` in their order; items only in `before` keep their place relative to their neighbours.
fn merge_items(before: &[Value], after: &[Value], schema: Schema<'_>) -> Vec<Value> {
    let old: Vec<String> = before.iter().map(|item| step(schema, item)).collect();
    let new: Vec<String> = after.iter().map(|item| step(schema, item)).collect();
    let (known, wanted): (HashSet<&String>, HashSet<&String>) = (old.iter().collect(), new.iter().collect());
    let mut shared = new.iter().filter(|s| known.contains(s));
    let mut next = shared.next();
    let mut merged = Vec::with_capacity(old.len().max(new.len()));
    let take = |r: usize| match old.iter().position(|s| *s == new[r]) {
        Some(l) => merge(&before[l], &after[r], items_of(schema)),
        None => after[r].clone(),
    };
    let (mut l, mut r) = (0, 0);
    while l < old.len() || r < new.len() {
        let (left, right) = (old.get(l), new.get(r));
        match (left, right) {
            (Some(a), Some(b)) if a == b => {
                merged.push(take(r));
                (l, r) = (l + 1, r + 1);
                next = shared.next();
            }
            (Some(a), _) if !wanted.contains(a) => {
                merged.push(before[l].clone());
                l += 1;
            }
            // A shared item that is not the next one of the new order is taken when its turn comes.
            (Some(a), Some(_)) if next.is_some_and(|n| n != a) => l += 1,
            (_, Some(b)) => {
                merged.push(take(r));
                if next == Some(b) {
                    next = shared.next();
                }
                r += 1;
            }
            (_, None) => l += 1,
        }
    }
    merged
}

/// `value` without the fields at the paths of `set`.
pub(super) fn remove(value: &Value, set: &FieldSet, schema: Schema<'_>) -> Value {
    match (value, shape(value, schema)) {
        (Value::Object(map), Shape::Map) => {
            let entry = |(name, v): (&String, &Value)| {
                let left = left_over(v, set, &fields::field(name), child(schema, name))?;
                Some((name.clone(), left))
            };
            Value::Object(map.iter().filter_map(entry).collect())
        }
        (Value::Array(items), Shape::List) => {
            let entry = |item: &Value| left_over(item, set, &step(schema, item), items_of(schema));
            Value::Array(items.iter().filter_map(entry).collect())
        }
        _ => value.clone(),
    }
}

/// What removal leaves of one entry; a container that loses its last entry stays, empty.
fn left_over(value: &Value, set: &FieldSet, step: &str, schema: Schema<'_>) -> Option<Value> {
    if set.has(step) {
        return None;
    }
    Some(
        set.below(step)
            .map_or_else(|| value.clone(), |below| remove(value, below, schema)),
    )
}

/// The set with every declared field that has paths below it as a path of its own.
pub(super) fn with_named_parents(set: &FieldSet, schema: Schema<'_>) -> FieldSet {
    set.map_children(&mut |step, below| {
        let (declared, next) = match step.strip_prefix("f:") {
            Some(name) => (
                schema.is_some_and(|s| s.properties.contains_key(name)),
                child(schema, name),
            ),
            None => (false, items_of(schema)),
        };
        (
            below.is_member() || (declared && below.has_children()),
            with_named_parents(below, next),
        )
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;

    fn schema() -> Arc<Structural> {
        Structural::parse(&json!({"type": "object", "properties": {
            "a": {"type": "integer"}, "o": {"type": "object", "properties": {"x": {"type": "string"}}},
            "m": {"type": "object", "additionalProperties": {"type": "string"}},
            "w": {"type": "object", "x-kubernetes-map-type": "atomic", "additionalProperties": {"type": "string"}},
            "l": {"type": "array", "items": {"type": "integer"}},
            "s": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
            "k": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["n"],
                "items": {"type": "object", "properties": {"n": {"type": "string"}, "v": {"type": "integer"}}}}}}))
        .unwrap()
    }

    #[test]
    fn the_fields_of_a_value_follow_its_schema() {
        let value =
            json!({"a": 1, "o": {}, "m": {"p": "q"}, "w": {"p": "q"}, "l": [1], "s": ["t"], "k": [{"n": "i", "v": 1}]});
        assert_eq!(
            field_set(&value, Some(&schema())).paths(),
            [
                ".a",
                r#".k[n="i"]"#,
                r#".k[n="i"].n"#,
                r#".k[n="i"].v"#,
                ".l",
                ".m.p",
                ".o",
                r#".s[="t"]"#,
                ".w"
            ]
        );
    }

    #[test]
    fn lists_merge_in_the_new_order_and_keep_other_items_in_place() {
        let schema = schema();
        let merged = |old: Value, new: Value| merge(&json!({"s": old}), &json!({"s": new}), Some(&schema))["s"].clone();
        assert_eq!(
            merged(json!(["a", "b", "c"]), json!(["c", "a"])),
            json!(["b", "c", "a"])
        );
        assert_eq!(merged(json!(["a", "b"]), json!(["b", "x"])), json!(["a", "b", "x"]));
        assert_eq!(merged(json!(["a"]), json!(["x", "a"])), json!(["x", "a"]));
        assert_eq!(merged(json!([]), json!(["x"])), json!(["x"]));
    }

    #[test]
    fn keyed_items_merge_by_key_and_plain_lists_are_replaced() {
        let old = json!({"k": [{"n": "i", "v": 1}, {"n": "j"}], "l": [1, 2]});
        let new = json!({"k": [{"n": "j", "v": 3}], "l": [3]});
        let merged = merge(&old, &new, Some(&schema()));
        assert_eq!(merged, json!({"k": [{"n": "i", "v": 1}, {"n": "j", "v": 3}], "l": [3]}));
    }

    #[test]
    fn a_comparison_names_each_changed_field_once() {
        let old = json!({"a": 1, "s": ["x"], "m": {"p": "q"}, "k": [{"n": "i", "v": 1}]});
        let new = json!({"a": 2, "s": ["y"], "m": {"p": "q"}, "k": [{"n": "i"}]});
        let changes = compare(&old, &new, Some(&schema()));
        assert_eq!(changes.modified.paths(), [".a"]);
        assert_eq!(changes.added.paths(), [r#".s[="y"]"#]);
        assert_eq!(changes.removed.paths(), [r#".k[n="i"].v"#, r#".s[="x"]"#]);
    }

    #[test]
    fn items_without_their_key_or_given_twice_are_refused() {
        let schema = schema();
        let refused = |v: Value| refusal(&v, Some(&schema), "").unwrap();
        assert!(
            refused(json!({"k": [{"v": 1}]}))
                .contains(r#".k: element 0: associative list with keys has an element that omits key field "n""#)
        );
        assert_eq!(
            refused(json!({"k": [{"n": "a"}, {"n": "a"}]})),
            r#".k: duplicate entries for key [n="a"]"#
        );
        assert_eq!(refusal(&json!({"k": [{"n": "a"}]}), Some(&schema), ""), None);
    }
}
