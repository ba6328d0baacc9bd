//! What the server does for single kinds beyond their schema: the strategies of the real API server, and those of its
//! admission plugins that change objects.

mod configuration;
mod container;
pub mod definition;
pub mod event;
pub mod pod;
mod service;

use std::sync::Arc;

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use super::{ApiServer, call::Call, registry::Resource, status::ApiError};
use crate::schema::{Cause, subresource};

/// Fills in what the kind's strategy sets. `old` is absent at creation.
pub fn complete(call: &Call, object: &mut Value, old: Option<&Value>) -> Result<(), ApiError> {
    let resource = &call.resource;
    if resource.custom {
        return Ok(());
    }
    match resource.kind.as_str() {
        "Pod" => pod::complete(call, object, old)?,
        "Namespace" => complete_namespace(call, object, old),
        "Secret" => merge_string_data(object),
        "PersistentVolumeClaim" | "PersistentVolume" if old.is_none() => object["status"] = json!({"phase": "Pending"}),
        "Service" => service::complete(object, old),
        "PodDisruptionBudget" if old.is_none() => subresource::keep_status(object, None),
        "CustomResourceDefinition" => definition::complete(call, object, old),
        _ => {}
    }
    Ok(())
}

/// What is wrong with an object beyond its schema.
#[must_use]
pub fn check(call: &Call, new: &Value, old: Option<&Value>) -> Vec<Cause> {
    let resource = &call.resource;
    if resource.custom {
        return Vec::new();
    }
    if let Some(causes) = match resource.kind.as_str() {
        "ConfigMap" | "Secret" => Some(configuration::check(new, old)),
        "Service" => Some(service::check(new, old)),
        "Lease" => Some(check_lease(new)),
        "Event" if resource.group.is_empty() && old.is_none() => Some(event::check(new)),
        "PodDisruptionBudget" => Some(check_budget(new)),
        _ => None,
    } {
        return causes;
    }
    match (resource.kind.as_str(), old) {
        ("Pod", Some(old)) if call.path.subresource.is_none() => pod::check_update(new, old),
        ("Pod", None) => pod::check(new),
        ("CustomResourceDefinition", old) => definition::check(new, old),
        ("PersistentVolumeClaim", Some(old)) => check_claim(new, old),
        ("RoleBinding" | "ClusterRoleBinding", Some(old)) if new["roleRef"] != old["roleRef"] => {
            vec![Cause::invalid("roleRef", &new["roleRef"], "field is immutable")]
        }
        _ => Vec::new(),
    }
}

/// On `/status`: what of `new` is taken. Of custom resources only the status; of built-ins also labels, annotations and
/// finalizers, as their strategies do.
#[must_use]
pub fn only_status(resource: &Resource, new: &Value, old: &Value) -> Value {
    let mut taken = subresource::only_status(new, old);
    if !resource.custom {
        for field in ["labels", "annotations", "finalizers"] {
            match &new["metadata"][field] {
                Value::Null => {
                    if let Some(metadata) = taken["metadata"].as_object_mut() {
                        metadata.remove(field);
                    }
                }
                value => taken["metadata"][field] = value.clone(),
            }
        }
    }
    taken
}

/// Called after each write of a resource.
pub fn stored(server: &Arc<ApiServer>, resource: &Resource) {
    if resource.group == definition::GROUP && !resource.custom {
        server.refresh_registry();
    }
}

/// Drops nulls, which mean absence in every built-in kind.
pub fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

fn complete_namespace(call: &Call, object: &mut Value, old: Option<&Value>) {
    let name = object["metadata"]["name"].clone();
    object["metadata"]["labels"]["kubernetes.io/metadata.name"] = name;
    match old {
        None => {
            object["spec"] = json!({"finalizers": ["kubernetes"]});
            object["status"] = json!({"phase": "Active"});
        }
        // Only /finalize changes these.
        Some(old) if call.path.subresource.as_deref() != Some("finalize") => {
            object["spec"]["finalizers"] = old["spec"]["finalizers"].clone();
            drop_nulls(object);
        }
        Some(_) => {}
    }
}

/// `stringData` goes into `data`, encoded.
fn merge_string_data(object: &mut Value) {
    let Some(fields) = object.as_object_mut() else { return };
    let Some(Value::Object(texts)) = fields.remove("stringData") else {
        return;
    };
    for (key, text) in texts {
        let encoded = STANDARD.encode(text.as_str().unwrap_or_default());
        object["data"][key] = json!(encoded);
    }
}

fn check_lease(lease: &Value) -> Vec<Cause> {
    let spec = &lease["spec"];
    let mut causes = Vec::new();
    for (field, least, rule) in [
        ("leaseDurationSeconds", 1, "must be greater than 0"),
        ("leaseTransitions", 0, "must be greater than or equal to 0"),
    ] {
        if spec[field].as_i64().is_some_and(|number| number < least) {
            causes.push(Cause::invalid(&format!("spec.{field}"), &spec[field], rule));
        }
    }
    causes
}

fn check_budget(budget: &Value) -> Vec<Cause> {
    let spec = &budget["spec"];
    if spec["minAvailable"].is_null() || spec["maxUnavailable"].is_null() {
        return Vec::new();
    }
    let why = "minAvailable and maxUnavailable cannot be both set";
    vec![Cause::invalid("spec", spec, why)]
}

/// Only the requested size of a claim can change, and its volume be set once.
fn check_claim(new: &Value, old: &Value) -> Vec<Cause> {
    let fixed = |claim: &Value| {
        let mut spec = claim["spec"].clone();
        if let Some(fields) = spec.as_object_mut() {
            fields.remove("resources");
            fields.remove("volumeAttributesClassName");
            if old["spec"]["volumeName"].is_null() {
                fields.remove("volumeName");
            }
            if old["spec"]["storageClassName"].is_null() {
                fields.remove("storageClassName");
            }
        }
        spec
    };
    if fixed(new) == fixed(old) {
        return Vec::new();
    }
    vec![Cause::forbidden(
        "spec",
        "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims",
    )]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn string_data_is_encoded_into_data() {
        let mut secret = json!({"stringData": {"a": "x"}, "data": {"b": "eQ=="}});
        merge_string_data(&mut secret);
        assert_eq!(secret, json!({"data": {"a": "eA==", "b": "eQ=="}}));
    }
}
