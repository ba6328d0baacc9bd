//! Name and namespace of what is written.

use rand::Rng;
use serde_json::{Value, json};

use crate::{
    schema::Cause,
    server::{call::Call, status::ApiError},
    store::object::{ObjectKey, ResourceKey},
};

/// Letters of generated names (apimachinery `rand`: no vowels, nothing that looks like another).
const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
/// Longest prefix of a generated name.
const MAX_PREFIX: usize = 58;

/// Makes namespace and name of a new object agree with the path.
pub fn settle(call: &Call, object: &mut Value) -> Result<(), ApiError> {
    if !object["metadata"].is_object() {
        object["metadata"] = json!({});
    }
    settle_namespace(call, object)?;
    let metadata = &mut object["metadata"];
    let has_name = metadata["name"].as_str().is_some_and(|name| !name.is_empty());
    if !has_name && let Some(prefix) = metadata["generateName"].as_str().filter(|prefix| !prefix.is_empty()) {
        let prefix: String = prefix.chars().take(MAX_PREFIX).collect();
        metadata["name"] = json!(format!("{prefix}{}", random_suffix()));
    }
    if metadata["name"].as_str().is_none_or(str::is_empty) {
        let cause = Cause::required("metadata.name", "name or generateName is required");
        return Err(ApiError::invalid(
            &call.resource.group,
            &call.resource.kind,
            "",
            vec![cause],
        ));
    }
    Ok(())
}

/// Makes the namespace of an object agree with the path.
pub fn settle_namespace(call: &Call, object: &mut Value) -> Result<(), ApiError> {
    let metadata = &mut object["metadata"];
    let given = metadata["namespace"].as_str().unwrap_or_default();
    match call.namespace() {
        Some(namespace) if given.is_empty() => metadata["namespace"] = json!(namespace),
        Some(namespace) if given != namespace => {
            return Err(ApiError::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
        Some(_) => {}
        None if call.resource.namespaced => {
            return Err(ApiError::bad_request(
                "an empty namespace may not be set during creation",
            ));
        }
        None => {
            if let Some(metadata) = metadata.as_object_mut() {
                metadata.remove("namespace");
            }
        }
    }
    Ok(())
}

/// The name in the body is that of the path.
pub fn check_name(call: &Call, object: &mut Value) -> Result<(), ApiError> {
    let wanted = call.name();
    match object["metadata"]["name"].as_str().filter(|name| !name.is_empty()) {
        Some(given) if given != wanted => Err(ApiError::bad_request(format!(
            "the name of the object ({given}) does not match the name on the URL ({wanted})"
        ))),
        Some(_) => Ok(()),
        None => {
            object["metadata"]["name"] = json!(wanted);
            Ok(())
        }
    }
}

/// Nothing new comes into a namespace that is missing or being deleted.
pub fn check_namespace_is_open(call: &Call, object: &Value) -> Result<(), ApiError> {
    let Some(namespace) = call.namespace() else {
        return Ok(());
    };
    let namespaces = ResourceKey::new("", "namespaces");
    let found = call.server.store.get(&namespaces, &ObjectKey::new("", namespace));
    let Some(found) = found else {
        return Err(ApiError::not_found(&namespaces, namespace));
    };
    if found["metadata"]["deletionTimestamp"].is_null() {
        return Ok(());
    }
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    Err(ApiError::namespace_terminating(&call.resource.key(), name, namespace))
}

fn random_suffix() -> String {
    let mut random = rand::rng();
    (0..5)
        .map(|_| char::from(LETTERS[random.random_range(0..LETTERS.len())]))
        .collect()
}
