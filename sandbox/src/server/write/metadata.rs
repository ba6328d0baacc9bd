//! Object metadata that the server owns (apimachinery `ValidateObjectMeta`, apiserver `rest.BeforeCreate/Update`).

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::name::{self, is_label, is_label_of_any_length};
use crate::{
    patch::managed::{self, Writer},
    schema::{Cause, subresource},
    server::{call::Call, registry::Resource, status::ApiError},
};

/// Fields that no client may set.
const SYSTEM: &[&str] = &[
    "resourceVersion",
    "selfLink",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
];
/// Bytes that all annotations of an object may have together.
const MAX_ANNOTATION_BYTES: usize = 256 << 10;

/// Now, as `metav1.Time` is written.
#[must_use]
pub fn now() -> Value {
    json!(Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
}

/// Gives a new object its uid, creation time and generation.
pub fn begin(resource: &Resource, object: &mut Value) {
    let counts = resource.custom || subresource::builtin_has_generation(&resource.kind);
    let Some(metadata) = object["metadata"].as_object_mut() else {
        return;
    };
    for field in SYSTEM {
        metadata.remove(*field);
    }
    drop_empty(metadata);
    metadata.insert("uid".into(), json!(uuid::Uuid::new_v4().to_string()));
    metadata.insert("creationTimestamp".into(), now());
    if counts {
        metadata.insert("generation".into(), json!(1));
    } else {
        metadata.remove("generation");
    }
}

/// An empty list or map is as none: metadata goes through a struct that leaves such fields out.
fn drop_empty(metadata: &mut Map<String, Value>) {
    metadata.retain(|_, value| match value {
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => true,
    });
}

/// Takes the fields that an update cannot change from the old object.
pub fn carry_over(resource: &Resource, new: &mut Value, old: &Value) -> Result<(), ApiError> {
    if !new["metadata"].is_object() {
        return Err(ApiError::bad_request("the object provided has no metadata"));
    }
    let before = &old["metadata"];
    let deletion = &new["metadata"]["deletionTimestamp"];
    if !deletion.is_null() && deletion != &before["deletionTimestamp"] {
        let cause = Cause::invalid("metadata.deletionTimestamp", deletion, "field is immutable");
        let name = before["name"].as_str().unwrap_or_default();
        return Err(ApiError::invalid(&resource.group, &resource.kind, name, vec![cause]));
    }
    let Some(metadata) = new["metadata"].as_object_mut() else {
        return Ok(());
    };
    metadata.insert("creationTimestamp".into(), before["creationTimestamp"].clone());
    for field in ["uid", "generateName", "namespace"] {
        let empty = metadata.get(field).is_none_or(|value| value.is_null() || value == "");
        if empty && !before[field].is_null() {
            metadata.insert(field.into(), before[field].clone());
        }
    }
    for field in ["deletionTimestamp", "deletionGracePeriodSeconds", "generation"] {
        match &before[field] {
            Value::Null => metadata.remove(field),
            value => metadata.insert(field.into(), value.clone()),
        };
    }
    drop_empty(metadata);
    metadata.remove("selfLink");
    metadata.insert("resourceVersion".into(), before["resourceVersion"].clone());
    Ok(())
}

/// Records which fields the request's manager owns after a write that is not an apply.
pub fn own(call: &Call, old: Option<&Value>, new: &mut Value) {
    let time = now();
    managed::track_update(
        old,
        new,
        call.resource.schema.root(),
        &writer(call, time.as_str().unwrap_or_default()),
    );
}

/// The request as the keeper of managed fields sees it.
pub fn writer<'a>(call: &'a Call, time: &'a str) -> Writer<'a> {
    Writer {
        manager: &call.manager,
        api_version: &call.api_version,
        subresource: call.path.subresource.as_deref().unwrap_or_default(),
        has_status: call.resource.has_status(),
        time,
    }
}

/// What is wrong with the metadata.
#[must_use]
pub fn check(call: &Call, new: &Value, old: Option<&Value>) -> Vec<Cause> {
    let resource = &call.resource;
    let metadata = &new["metadata"];
    let mut causes = Vec::new();
    check_name(resource, metadata, &mut causes);
    name::check_labels(metadata, &mut causes);
    check_finalizers(call, metadata, &mut causes);
    let annotations = metadata["annotations"].as_object().into_iter().flatten();
    let bytes: usize = annotations
        .map(|(key, value)| key.len() + value.as_str().map_or(0, str::len))
        .sum();
    name::check_annotation_keys(metadata, &mut causes);
    if bytes > MAX_ANNOTATION_BYTES {
        causes.push(Cause::too_long("metadata.annotations", MAX_ANNOTATION_BYTES as u64));
    }
    for (index, owner) in metadata["ownerReferences"].as_array().into_iter().flatten().enumerate() {
        let at = |field: &str| format!("metadata.ownerReferences[{index}].{field}");
        if owner["apiVersion"].as_str().is_none_or(str::is_empty) {
            causes.push(Cause::invalid(
                &at("apiVersion"),
                &json!(""),
                "version must not be empty",
            ));
        }
        for field in ["kind", "name", "uid"] {
            if owner[field].as_str().is_none_or(str::is_empty) {
                causes.push(Cause::required(&at(field), "must not be empty"));
            }
        }
    }
    check_controllers(metadata, &mut causes);
    let Some(old) = old else { return causes };
    for field in ["name", "namespace", "uid"] {
        if metadata[field] != old["metadata"][field] {
            causes.push(Cause::invalid(
                &format!("metadata.{field}"),
                &metadata[field],
                "field is immutable",
            ));
        }
    }
    check_new_finalizers(metadata, &old["metadata"], &mut causes);
    causes
}

/// One owner at most manages the object.
fn check_controllers(metadata: &Value, causes: &mut Vec<Cause>) {
    let owners = metadata["ownerReferences"].as_array().into_iter().flatten();
    let controllers: Vec<String> = owners
        .filter(|owner| owner["controller"] == true)
        .map(|owner| {
            let text = |field: &str| owner[field].as_str().unwrap_or_default();
            format!("{}/{}", text("kind"), text("name"))
        })
        .collect();
    if controllers.len() > 1 {
        let detail = format!(
            "Only one reference can have Controller set to true. Found \"true\" in references for {}",
            controllers.join(" and ")
        );
        causes.push(Cause::invalid(
            "metadata.ownerReferences",
            &metadata["ownerReferences"],
            &detail,
        ));
    }
}

/// Names of finalizers have a domain; of custom resources that is only advice.
fn check_finalizers(call: &Call, metadata: &Value, causes: &mut Vec<Cause>) {
    for (index, finalizer) in metadata["finalizers"].as_array().into_iter().flatten().enumerate() {
        let text = finalizer.as_str().unwrap_or_default();
        if text.contains('/') || matches!(text, "kubernetes" | "orphan" | "foregroundDeletion") {
            continue;
        }
        if call.resource.custom {
            call.warn(format!(
                "metadata.finalizers: {text:?}: prefer a domain-qualified finalizer name including a path (/) to avoid \
                 accidental conflicts with other finalizer writers"
            ));
        } else if !text.contains('.') {
            causes.push(Cause::invalid(
                &format!("metadata.finalizers[{index}]"),
                finalizer,
                "name is neither a standard finalizer name nor is it fully qualified",
            ));
        }
    }
}

fn check_new_finalizers(new: &Value, old: &Value, causes: &mut Vec<Cause>) {
    if old["deletionTimestamp"].is_null() {
        return;
    }
    let had = old["finalizers"].as_array().map(Vec::as_slice).unwrap_or_default();
    let added: Vec<String> = new["finalizers"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|finalizer| !had.contains(finalizer))
        .map(Value::to_string)
        .collect();
    if !added.is_empty() {
        causes.push(Cause::forbidden(
            "metadata.finalizers",
            &format!(
                "no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}",
                added.join(", ")
            ),
        ));
    }
}

fn check_name(resource: &Resource, metadata: &Value, causes: &mut Vec<Cause>) {
    let name = metadata["name"].as_str().unwrap_or_default();
    if resource.group == "rbac.authorization.k8s.io" {
        if name == "." || name == ".." || name.contains(['/', '%']) {
            causes.push(Cause::invalid(
                "metadata.name",
                &json!(name),
                "may not contain '/' or '%'",
            ));
        }
        return;
    }
    let label = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start \
                 and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is \
                 '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
    let first = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic \
                 character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for \
                 validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";
    let subdomain = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and \
                     must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation \
                     is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
    let (fits, longest, rule) = match resource.plural.as_str() {
        "namespaces" if resource.group.is_empty() && name.contains('.') => (false, 63, "must not contain dots"),
        "namespaces" if resource.group.is_empty() => (is_label(name), 63, label),
        "services" if resource.group.is_empty() => (
            is_label(name) && name.starts_with(|c: char| c.is_ascii_lowercase()),
            63,
            first,
        ),
        _ => (name.split('.').all(is_label_of_any_length), 253, subdomain),
    };
    if !fits && name.len() <= longest {
        causes.push(Cause::invalid("metadata.name", &json!(name), rule));
    }
    if name.len() > longest {
        causes.push(Cause::invalid(
            "metadata.name",
            &json!(name),
            &format!("must be no more than {longest} bytes"),
        ));
    }
}
