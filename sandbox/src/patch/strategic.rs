//! Strategic merge patch: a merge patch that knows the keys of the lists of the built-in types.
//!
//! Source: `k8s.io/apimachinery/pkg/util/strategicpatch`. The keys come from the `x-kubernetes-patch-*` extensions of
//! the published definitions.

use serde_json::{Map, Value};

use super::PatchError;

const DIRECTIVE: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_FROM: &str = "$deleteFromPrimitiveList/";
const ORDER: &str = "$setElementOrder/";

/// Where a node stands in the published definitions.
#[derive(Clone, Copy)]
struct Place<'a> {
    definitions: &'a Map<String, Value>,
    schema: Option<&'a Value>,
}

/// How one field is patched.
#[derive(Default)]
struct Strategy<'a> {
    merge: bool,
    key: Option<&'a str>,
}

impl<'a> Place<'a> {
    fn resolved(mut self) -> Self {
        while let Some(target) = self.schema.and_then(reference) {
            self.schema = self.definitions.get(target);
        }
        self
    }

    fn field(self, name: &str) -> Self {
        let node = self.resolved().schema;
        let named = node.and_then(|s| s.pointer("/properties")).and_then(|p| p.get(name));
        let schema = named.or_else(|| node.and_then(|s| s.get("additionalProperties")));
        Self { schema, ..self }
    }

    fn items(self) -> Self {
        Self {
            schema: self.resolved().schema.and_then(|s| s.get("items")),
            ..self
        }
    }

    fn strategy(self) -> Strategy<'a> {
        let Some(schema) = self.schema else {
            return Strategy::default();
        };
        let text = |key: &str| schema.get(key).and_then(Value::as_str);
        let strategies = text("x-kubernetes-patch-strategy").unwrap_or_default();
        Strategy {
            merge: strategies.split(',').any(|s| s == "merge"),
            key: text("x-kubernetes-patch-merge-key"),
        }
    }
}

fn reference(schema: &Value) -> Option<&str> {
    let direct = schema.get("$ref");
    let wrapped = || schema.pointer("/allOf/0/$ref");
    direct.or_else(wrapped)?.as_str()?.rsplit('/').next()
}

/// Applies a strategic merge patch to an object of the built-in definition `name`.
///
/// # Errors
/// When a directive is malformed (400) or a list item of the patch lacks its key (400).
pub fn apply(object: &mut Value, patch: &Value, name: &str) -> Result<(), PatchError> {
    let definitions = crate::schema::builtin::definitions();
    let Value::Object(changes) = patch else {
        return Err(PatchError::Malformed(
            "error decoding patch: a strategic merge patch must be an object".to_owned(),
        ));
    };
    let place = Place {
        definitions,
        schema: definitions.get(name),
    };
    let before = object.as_object().cloned().unwrap_or_default();
    *object = Value::Object(merge_map(before, changes, place)?.unwrap_or_default());
    Ok(())
}

/// The merged map; `None` when the patch deletes it.
fn merge_map(
    mut map: Map<String, Value>,
    patch: &Map<String, Value>,
    place: Place<'_>,
) -> Result<Option<Map<String, Value>>, PatchError> {
    match patch.get(DIRECTIVE) {
        None => {}
        Some(Value::String(d)) if d == "replace" => {
            let kept = patch.iter().filter(|(name, v)| *name != DIRECTIVE && !v.is_null());
            return Ok(Some(
                kept.map(|(name, v)| (name.clone(), without_directives(v))).collect(),
            ));
        }
        Some(Value::String(d)) if d == "delete" => return Ok(None),
        Some(Value::String(d)) if d == "merge" => {}
        Some(other) => return Err(malformed(&format!("unknown patch type {other} found in $patch"))),
    }
    if let Some(retained) = patch.get(RETAIN_KEYS) {
        let Value::Array(names) = retained else {
            return Err(malformed("$retainKeys must be a list"));
        };
        map.retain(|name, _| names.iter().any(|n| n.as_str() == Some(name)));
    }
    for (name, change) in patch {
        if let Some(field) = name.strip_prefix(DELETE_FROM) {
            delete_scalars(&mut map, field, change)?;
        } else if !name.starts_with('$') {
            let below = place.field(name);
            let order = patch.get(&format!("{ORDER}{name}"));
            merge_field(&mut map, name, change, order, below)?;
        }
    }
    for (name, order) in patch {
        if let (Some(field), Value::Array(order)) = (name.strip_prefix(ORDER), order)
            && !patch.contains_key(field)
        {
            let key = place.field(field).strategy().key;
            if let Some(Value::Array(items)) = map.get_mut(field) {
                sort_by(items, order, key);
            }
        }
    }
    Ok(Some(map))
}

fn merge_field(
    map: &mut Map<String, Value>,
    name: &str,
    change: &Value,
    order: Option<&Value>,
    place: Place<'_>,
) -> Result<(), PatchError> {
    let merged = match (map.remove(name), change) {
        (_, Value::Null) => None,
        (Some(Value::Object(before)), Value::Object(patch)) => merge_map(before, patch, place)?.map(Value::Object),
        (_, Value::Object(patch)) => merge_map(Map::new(), patch, place)?.map(Value::Object),
        (before, Value::Array(patch)) => {
            let before = match before {
                Some(Value::Array(items)) => items,
                _ => Vec::new(),
            };
            let strategy = place.strategy();
            let mut items = if strategy.merge {
                match strategy.key {
                    Some(key) => merge_items(before, patch, key, place.items())?,
                    None => add_scalars(before, patch),
                }
            } else {
                patch.iter().map(without_directives).collect()
            };
            if let Some(Value::Array(order)) = order {
                sort_by(&mut items, order, strategy.key);
            }
            Some(Value::Array(items))
        }
        (_, scalar) => Some(scalar.clone()),
    };
    if let Some(merged) = merged {
        map.insert(name.to_owned(), merged);
    }
    Ok(())
}

fn merge_items(before: Vec<Value>, patch: &[Value], key: &str, place: Place<'_>) -> Result<Vec<Value>, PatchError> {
    let replaces = |item: &Value| item.get(DIRECTIVE).and_then(Value::as_str) == Some("replace");
    let bare = |item: &Value| item.as_object().is_some_and(|o| o.len() == 1);
    if patch.iter().any(|item| replaces(item) && bare(item)) {
        return Ok(patch
            .iter()
            .filter(|item| !replaces(item))
            .map(without_directives)
            .collect());
    }
    let mut items = before;
    for change in patch {
        let Value::Object(fields) = change else {
            return Err(malformed(&format!(
                "list item {change} is not an object, but the list merges by {key}"
            )));
        };
        let Some(wanted) = fields.get(key) else {
            return Err(malformed(&format!(
                "map: {change} does not contain declared merge key: {key}"
            )));
        };
        let at = items.iter().position(|item| item.get(key) == Some(wanted));
        let old = at.and_then(|i| items[i].as_object().cloned()).unwrap_or_default();
        match (at, merge_map(old, fields, place)?) {
            (Some(i), Some(merged)) => items[i] = Value::Object(merged),
            (Some(_), None) => items.retain(|item| item.get(key) != Some(wanted)),
            (None, Some(new)) => items.push(Value::Object(new)),
            (None, None) => {}
        }
    }
    Ok(items)
}

fn add_scalars(before: Vec<Value>, patch: &[Value]) -> Vec<Value> {
    let mut items = before;
    for value in patch {
        if !items.contains(value) {
            items.push(value.clone());
        }
    }
    items
}

fn delete_scalars(map: &mut Map<String, Value>, field: &str, gone: &Value) -> Result<(), PatchError> {
    let Value::Array(gone) = gone else {
        return Err(malformed(&format!("{DELETE_FROM}{field} must be a list")));
    };
    if let Some(Value::Array(items)) = map.get_mut(field) {
        items.retain(|item| !gone.contains(item));
    }
    Ok(())
}

/// Sorts the items that `order` names in that order; the others keep their place behind the item they follow.
fn sort_by(items: &mut Vec<Value>, order: &[Value], key: Option<&str>) {
    let id = |item: &Value| match key {
        Some(key) => item.get(key).cloned().unwrap_or(Value::Null),
        None => item.clone(),
    };
    let rank = |item: &Value| order.iter().position(|o| id(o) == id(item));
    let mut last = 0;
    let mut ranked = Vec::with_capacity(items.len());
    for (place, item) in std::mem::take(items).into_iter().enumerate() {
        let own = rank(&item);
        last = own.map_or(last, |r| r + 1);
        ranked.push((own.map_or(last, |r| r + 1), own.is_none(), place, item));
    }
    ranked.sort_by_key(|(rank, follows, place, _)| (*rank, *follows, *place));
    *items = ranked.into_iter().map(|(.., item)| item).collect();
}

fn without_directives(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let kept = map.iter().filter(|(name, v)| !name.starts_with('$') && !v.is_null());
            Value::Object(kept.map(|(name, v)| (name.clone(), without_directives(v))).collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(without_directives).collect()),
        scalar => scalar.clone(),
    }
}

fn malformed(detail: &str) -> PatchError {
    PatchError::Malformed(format!("error applying strategic merge patch: {detail}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn patched(mut object: Value, patch: &Value) -> Value {
        apply(&mut object, patch, "io.k8s.api.core.v1.Pod").unwrap();
        object
    }

    #[test]
    fn keyed_lists_merge_and_other_lists_are_replaced() {
        let before = json!({"spec": {"containers": [{"name": "a", "image": "1", "args": ["x"]}, {"name": "b", "image": "1"}],
            "tolerations": [{"key": "k"}]}});
        let patch = json!({"spec": {"containers": [{"name": "a", "image": "2", "args": ["y"]}, {"name": "c", "image": "3"}],
            "tolerations": [{"key": "l"}]}});
        let after = json!({"spec": {"containers": [{"name": "a", "image": "2", "args": ["y"]}, {"name": "b", "image": "1"},
            {"name": "c", "image": "3"}], "tolerations": [{"key": "l"}]}});
        assert_eq!(patched(before, &patch), after);
    }

    #[test]
    fn directives_delete_and_replace() {
        let before = json!({"metadata": {"labels": {"a": "1", "b": "2"}, "finalizers": ["x", "y"]},
            "spec": {"containers": [{"name": "a"}, {"name": "b"}], "volumes": [{"name": "v", "emptyDir": {}}]}});
        let patch = json!({"metadata": {"labels": {"$patch": "replace", "c": "3"}, "$deleteFromPrimitiveList/finalizers": ["x"]},
            "spec": {"containers": [{"name": "a", "$patch": "delete"}],
                "volumes": [{"name": "v", "hostPath": {"path": "/"}, "$retainKeys": ["name", "hostPath"]}]}});
        let after = json!({"metadata": {"labels": {"c": "3"}, "finalizers": ["y"]},
            "spec": {"containers": [{"name": "b"}], "volumes": [{"name": "v", "hostPath": {"path": "/"}}]}});
        assert_eq!(patched(before, &patch), after);
    }

    #[test]
    fn null_removes_and_scalars_of_merged_lists_are_added_once() {
        let before = json!({"metadata": {"annotations": {"a": "1"}, "finalizers": ["x"]}});
        let patch = json!({"metadata": {"annotations": {"a": null}, "finalizers": ["x", "y"]}});
        assert_eq!(
            patched(before, &patch),
            json!({"metadata": {"annotations": {}, "finalizers": ["x", "y"]}})
        );
    }

    #[test]
    fn the_order_directive_sorts_and_is_not_stored() {
        let before = json!({"spec": {"containers": [{"name": "a"}, {"name": "x"}, {"name": "b"}]}});
        let patch = json!({"spec": {"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}],
            "containers": [{"name": "b", "image": "i"}]}});
        let after = json!({"spec": {"containers": [{"name": "b", "image": "i"}, {"name": "a"}, {"name": "x"}]}});
        assert_eq!(patched(before, &patch), after);
    }

    #[test]
    fn conditions_merge_by_type_and_need_it() {
        let before = json!({"status": {"conditions": [{"type": "A", "status": "True"}]}});
        let patch = json!({"status": {"conditions": [{"type": "B", "status": "False"}]}});
        let merged = patched(before.clone(), &patch);
        assert_eq!(merged["status"]["conditions"].as_array().unwrap().len(), 2);
        let mut object = before;
        let error = apply(
            &mut object,
            &json!({"status": {"conditions": [{"status": "x"}]}}),
            "io.k8s.api.core.v1.Pod",
        );
        assert!(
            error
                .unwrap_err()
                .to_string()
                .contains("does not contain declared merge key: type")
        );
    }
}
