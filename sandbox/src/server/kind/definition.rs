//! CustomResourceDefinitions: names are accepted and the API served at once, where the real server takes a moment.

use serde_json::{Value, json};

use crate::{
    schema::{self, Cause},
    server::{
        ApiServer,
        call::Call,
        status::ApiError,
        write::{metadata, store::key_of},
    },
    store::object::{self, ObjectKey, ResourceKey},
};

/// API group of definitions.
pub const GROUP: &str = "apiextensions.k8s.io";
/// Keeps a definition until its objects are gone.
pub const FINALIZER: &str = "customresourcecleanup.apiextensions.k8s.io";

/// The table of definitions.
#[must_use]
pub fn table() -> ResourceKey {
    ResourceKey::new(GROUP, "customresourcedefinitions")
}

/// Names, finalizer and status of a definition.
pub fn complete(call: &Call, definition: &mut Value, old: Option<&Value>) {
    let names = definition["spec"]["names"].clone();
    let kind = names["kind"].as_str().unwrap_or_default();
    if names["singular"].as_str().is_none_or(str::is_empty) {
        definition["spec"]["names"]["singular"] = json!(kind.to_lowercase());
    }
    if names["listKind"].as_str().is_none_or(str::is_empty) {
        definition["spec"]["names"]["listKind"] = json!(format!("{kind}List"));
    }
    if definition["spec"]["conversion"].is_null() {
        definition["spec"]["conversion"] = json!({"strategy": "None"});
    }
    if old.is_none() {
        definition["metadata"]["finalizers"] = json!([FINALIZER]);
    }
    if call.path.subresource.as_deref() == Some("status") {
        return;
    }
    let rival = rival(call, definition);
    definition["status"] = status(definition, old, rival.as_deref());
}

/// Another definition of the same group that has one of the names.
fn rival(call: &Call, definition: &Value) -> Option<String> {
    let own = &definition["metadata"]["name"];
    let spec = &definition["spec"];
    let all = call.server.store.list(&table(), None);
    let mut others = all.objects.iter().filter(|(_, other)| {
        other["metadata"]["name"] != *own
            && other["spec"]["group"] == spec["group"]
            && (other["spec"]["names"]["kind"] == spec["names"]["kind"]
                || other["spec"]["names"]["plural"] == spec["names"]["plural"])
    });
    others.next().map(|(key, _)| key.name.clone())
}

fn status(definition: &Value, old: Option<&Value>, rival: Option<&str>) -> Value {
    let spec = &definition["spec"];
    let before = old.map_or(&Value::Null, |old| &old["status"]);
    let condition = |kind: &str, state: &str, reason: &str, message: &str| {
        let known = before["conditions"].as_array().into_iter().flatten();
        let same = known
            .into_iter()
            .find(|known| known["type"] == kind && known["status"] == state);
        let since = same.map_or_else(metadata::now, |same| same["lastTransitionTime"].clone());
        json!({"type": kind, "status": state, "reason": reason, "message": message, "lastTransitionTime": since})
    };
    let conditions = match rival {
        None => [
            condition("NamesAccepted", "True", "NoConflicts", "no conflicts found"),
            condition(
                "Established",
                "True",
                "InitialNamesAccepted",
                "the initial names have been accepted",
            ),
        ],
        Some(rival) => [
            condition(
                "NamesAccepted",
                "False",
                "Conflict",
                &format!("names are already in use by {rival}"),
            ),
            condition("Established", "False", "NotAccepted", "not all names are accepted"),
        ],
    };
    let mut versions: Vec<Value> = before["storedVersions"].as_array().cloned().unwrap_or_default();
    let storage = spec["versions"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|version| version["storage"] == true);
    if let Some(storage) = storage
        && !versions.contains(&storage["name"])
    {
        versions.push(storage["name"].clone());
    }
    let mut all = Value::Array(conditions.to_vec());
    let kept = before["conditions"].as_array().into_iter().flatten();
    for other in kept.filter(|other| other["type"] != "NamesAccepted" && other["type"] != "Established") {
        if let Some(list) = all.as_array_mut() {
            list.push(other.clone());
        }
    }
    json!({"acceptedNames": spec["names"], "conditions": all, "storedVersions": versions})
}

/// What is wrong with a definition.
#[must_use]
pub fn check(new: &Value, old: Option<&Value>) -> Vec<Cause> {
    let mut causes = schema::crd::check(new);
    if let Some(old) = old {
        for field in ["group", "scope"] {
            if new["spec"][field] != old["spec"][field] {
                causes.push(Cause::invalid(
                    &format!("spec.{field}"),
                    &new["spec"][field],
                    "field is immutable",
                ));
            }
        }
    }
    causes
}

/// No new object of a definition that is being deleted.
pub fn check_is_open(call: &Call, object: &Value) -> Result<(), ApiError> {
    if !call.resource.custom {
        return Ok(());
    }
    let definition = call
        .server
        .store
        .get(&table(), &ObjectKey::new("", call.resource.key().to_string()));
    match definition {
        Some(definition) if definition["metadata"]["deletionTimestamp"].is_string() => {
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            let why = "create not allowed while custom resource definition is terminating";
            Err(ApiError::forbidden(&call.resource.key(), name, why))
        }
        _ => Ok(()),
    }
}

/// Deletes the objects of definitions that are being deleted, and then the definitions. Objects with finalizers keep
/// their definition until the finalizers are gone.
pub fn finish_deletions(server: &ApiServer) {
    for (_, definition) in server.store.list(&table(), None).objects {
        if definition["metadata"]["deletionTimestamp"].is_null() {
            continue;
        }
        let spec = &definition["spec"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let objects = ResourceKey::new(text(&spec["group"]), text(&spec["names"]["plural"]));
        for (key, found) in server.store.list(&objects, None).objects {
            let waits = found["metadata"]["finalizers"]
                .as_array()
                .is_some_and(|list| !list.is_empty());
            let revision = object::revision(&found);
            let mut last = found.as_ref().clone();
            // A rival write wins; the next pass sees what it left.
            if !waits {
                server.store.remove(&objects, &key, revision, last).ok();
            } else if last["metadata"]["deletionTimestamp"].is_null() {
                last["metadata"]["deletionTimestamp"] = metadata::now();
                last["metadata"]["deletionGracePeriodSeconds"] = json!(0);
                server.store.replace(&objects, &key, revision, last).ok();
            }
        }
        if server.store.list(&objects, None).objects.is_empty() {
            let mut last = definition.as_ref().clone();
            last["metadata"]["finalizers"] = json!([]);
            let revision = object::revision(&definition);
            if server
                .store
                .remove(&table(), &key_of(&definition), revision, last)
                .is_ok()
            {
                server.refresh_registry();
            }
        }
    }
}
