//! The last step of a write: into the store, unless it is a dry run or changes nothing.

use std::sync::Arc;

use serde_json::Value;

use crate::{
    server::{call::Call, kind, status::ApiError},
    store::object::{self, Object, ObjectKey},
};

/// Adds a complete object, which is in its storage version.
pub fn insert(call: &Call, value: Value) -> Result<Object, ApiError> {
    let resource = &call.resource;
    let name = value["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let key = ObjectKey::new(call.namespace().unwrap_or_default(), name.clone());
    if call.query.dry_run {
        return match call.server.store.get(&resource.table, &key) {
            Some(_) => Err(ApiError::already_exists(&resource.key(), &name)),
            None => Ok(Arc::new(value)),
        };
    }
    let stored = call
        .server
        .store
        .create(&resource.table, &key, value)
        .map_err(|error| ApiError::from_store(&resource.key(), &name, &error))?;
    kind::stored(&call.server, resource);
    Ok(stored)
}

/// Replaces `old` by `new`, both in their storage version. Without a difference nothing is written; without the last
/// finalizer an object that is being deleted goes.
pub fn replace(call: &Call, old: &Object, new: Value) -> Result<Object, ApiError> {
    let resource = &call.resource;
    if new == **old {
        return Ok(old.clone());
    }
    let removes = is_finished(&new);
    if call.query.dry_run {
        return Ok(Arc::new(new));
    }
    let key = key_of(old);
    let expected = object::revision(old);
    let store = &call.server.store;
    let result = if removes {
        store.remove(&resource.table, &key, expected, new)
    } else {
        store.replace(&resource.table, &key, expected, new)
    };
    let stored = result.map_err(|error| ApiError::from_store(&resource.key(), &key.name, &error))?;
    kind::stored(&call.server, resource);
    if removes && resource.custom {
        // The last object that a definition waited for may have gone.
        kind::definition::finish_deletions(&call.server);
    }
    Ok(stored)
}

/// Takes an object away; `last` is what watchers see of it.
pub fn remove(call: &Call, old: &Object, last: Value) -> Result<Object, ApiError> {
    let resource = &call.resource;
    let key = key_of(old);
    if call.query.dry_run {
        return Ok(Arc::new(last));
    }
    let gone = call
        .server
        .store
        .remove(&resource.table, &key, object::revision(old), last)
        .map_err(|error| ApiError::from_store(&resource.key(), &key.name, &error))?;
    kind::stored(&call.server, resource);
    Ok(gone)
}

/// Place of a stored object.
#[must_use]
pub fn key_of(object: &Value) -> ObjectKey {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    ObjectKey::new(text("namespace"), text("name"))
}

/// Whether an object that is being deleted waits for nothing any more.
fn is_finished(object: &Value) -> bool {
    let metadata = &object["metadata"];
    let empty = |list: &Value| list.as_array().is_none_or(Vec::is_empty);
    let waits_in_spec =
        object["kind"] == "Namespace" && object["apiVersion"] == "v1" && !empty(&object["spec"]["finalizers"]);
    metadata["deletionTimestamp"].is_string()
        && metadata["deletionGracePeriodSeconds"].as_i64().unwrap_or(0) == 0
        && empty(&metadata["finalizers"])
        && !waits_in_spec
}
