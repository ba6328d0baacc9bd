//! A stored object as a request sees it: in the version asked for, whole, as metadata, or as a row of a table.

use std::borrow::Cow;

use serde::{Serialize, Serializer, ser::SerializeMap};
use serde_json::{Value, json};

use super::{kind::event, registry::Resource};

/// The object in the version of `resource`.
#[must_use]
pub fn convert<'a>(resource: &Resource, object: &'a Value) -> Cow<'a, Value> {
    if resource.group == "events.k8s.io" {
        return Cow::Owned(event::from_core(object));
    }
    let wanted = resource.api_version();
    if object["apiVersion"] == wanted.as_str() {
        return Cow::Borrowed(object);
    }
    let mut converted = object.clone();
    converted["apiVersion"] = Value::String(wanted);
    Cow::Owned(converted)
}

/// The object in the version in which it is stored.
#[must_use]
pub fn to_storage(resource: &Resource, mut object: Value) -> Value {
    if resource.group == "events.k8s.io" {
        return event::to_core(&object);
    }
    object["apiVersion"] = Value::String(resource.storage_api_version.clone());
    object
}

/// `PartialObjectMetadata` of an object.
#[must_use]
pub fn metadata_only(object: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"]})
}

/// An item of a list of built-ins: such items carry neither `apiVersion` nor `kind`.
#[derive(Debug)]
pub struct BareItem<'a>(pub Cow<'a, Value>);

impl Serialize for BareItem<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Some(fields) = self.0.as_object() else {
            return self.0.serialize(serializer);
        };
        let mut map = serializer.serialize_map(None)?;
        for (key, value) in fields.iter().filter(|(key, _)| *key != "apiVersion" && *key != "kind") {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}
