//! Sets and list maps: uniqueness, and which old item an item continues.

use serde_json::{Map, Value};

use super::{
    cause::Cause,
    path,
    structural::{ListType, Structural},
};

/// The key of a list map's item: the values of the key fields, defaults included; absent ones are left out.
#[must_use]
pub fn item_key(schema: &Structural, keys: &[String], item: &Value) -> Map<String, Value> {
    let default = |key: &str| schema.items.as_ref()?.properties.get(key)?.default.clone();
    let value = |key: &String| Some((key.clone(), item.get(key).cloned().or_else(|| default(key))?));
    keys.iter().filter_map(value).collect()
}

/// The item of `old` that `item` continues; only items of a list map have one.
#[must_use]
pub fn counterpart<'a>(schema: &Structural, item: &Value, old: Option<&'a Value>) -> Option<&'a Value> {
    let ListType::Map(keys) = &schema.list_type else {
        return None;
    };
    let wanted = item_key(schema, keys, item);
    old?.as_array()?
        .iter()
        .find(|candidate| item_key(schema, keys, candidate) == wanted)
}

/// Reports repeated items of sets and repeated keys of list maps, in `value` and below.
pub(crate) fn check(value: &Value, schema: &Structural, at: &str, causes: &mut Vec<Cause>) {
    match value {
        Value::Object(map) => {
            for (name, child) in map {
                if let Some(property) = schema.properties.get(name) {
                    check(child, property, &path::child(at, name), causes);
                } else if let Some(property) = schema.field(name) {
                    check(child, property, &path::key(at, name), causes);
                }
            }
        }
        Value::Array(items) => {
            array(items, schema, at, causes);
            if let Some(below) = schema.items.as_deref() {
                for (i, item) in items.iter().enumerate() {
                    check(item, below, &path::index(at, i), causes);
                }
            }
        }
        _ => {}
    }
}

fn array(items: &[Value], schema: &Structural, at: &str, causes: &mut Vec<Cause>) {
    let keys: Vec<Value> = match &schema.list_type {
        ListType::Atomic => return,
        ListType::Set => items.to_vec(),
        ListType::Map(names) => {
            if let Some(i) = items.iter().position(|item| !item.is_object() && !item.is_null()) {
                let detail = "must be an object for an array of list-type map";
                causes.push(Cause::invalid(&path::index(at, i), &items[i], detail));
                return;
            }
            items
                .iter()
                .map(|item| Value::Object(item_key(schema, names, item)))
                .collect()
        }
    };
    for (i, key) in keys.iter().enumerate() {
        // Only the second of several equal items is reported.
        if keys[..i].iter().filter(|earlier| *earlier == key).count() == 1 {
            causes.push(Cause::duplicate(&path::index(at, i), key));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn messages(schema: &Value, value: &Value) -> Vec<String> {
        let mut causes = Vec::new();
        check(value, &Structural::parse(schema).unwrap(), "l", &mut causes);
        causes.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_repeated_item_of_a_set_is_a_duplicate() {
        let schema = json!({"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}});
        assert_eq!(
            messages(&schema, &json!(["a", "b", "a", "a"])),
            [r#"l[2]: Duplicate value: "a""#]
        );
    }

    #[test]
    fn keys_of_a_list_map_count_with_their_defaults() {
        let schema = json!({"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["p", "t"],
            "items": {"type": "object", "properties": {"p": {"type": "integer"}, "t": {"type": "string", "default": "x"}}}});
        let value = json!([{"p": 1}, {"p": 1, "t": "y"}, {"p": 1, "t": "x"}]);
        assert_eq!(messages(&schema, &value), [r#"l[2]: Duplicate value: {"p":1,"t":"x"}"#]);
        let old = json!([{"p": 2}, {"p": 1, "v": 1}]);
        let parsed = Structural::parse(&schema).unwrap();
        assert_eq!(
            counterpart(&parsed, &json!({"p": 1, "t": "x"}), Some(&old)),
            Some(&old[1])
        );
    }
}
