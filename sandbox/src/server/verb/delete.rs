//! `DELETE` of one object or of a collection (apiserver `rest.BeforeDelete`).

use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{list, update::ATTEMPTS};
use crate::{
    schema::Cause,
    server::{
        call::Call,
        kind::definition,
        reply::{self, Reply},
        request,
        status::{self, ApiError},
        write::{metadata, store},
    },
    store::object::{Object, ResourceKey},
};

/// Namespaces that a cluster cannot do without (admission plugin NamespaceLifecycle).
const PROTECTED: &[&str] = &["default", "kube-system", "kube-public"];

/// `meta/v1 DeleteOptions`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Options {
    grace_period_seconds: Option<i64>,
    propagation_policy: Option<String>,
    orphan_dependents: Option<bool>,
    preconditions: Option<Preconditions>,
    dry_run: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Preconditions {
    uid: Option<String>,
    resource_version: Option<String>,
}

/// Deletes the object.
pub fn delete(mut call: Call, body: &[u8]) -> Result<Reply, ApiError> {
    let options = read_options(&mut call, body)?;
    let (object, gone) = delete_one(&call, &options)?;
    let returns_object = !gone
        || matches!(
            call.resource.plural.as_str(),
            "pods" | "services" | "persistentvolumeclaims" | "persistentvolumes" | "serviceaccounts" | "namespaces"
        );
    if returns_object && !(gone && call.resource.plural == "namespaces") {
        return Ok(super::answer(&call, 200, &object));
    }
    let uid = object["metadata"]["uid"].as_str().unwrap_or_default();
    Ok(reply::json(
        200,
        &status::deleted(&call.resource.key(), call.name(), uid),
    ))
}

/// Deletes what the selectors of the query select.
pub fn delete_collection(mut call: Call, body: &[u8]) -> Result<Reply, ApiError> {
    call.check_fields()?;
    let options = read_options(&mut call, body)?;
    let found = call.server.store.list(&call.resource.table, call.namespace());
    let mut path = call.path.clone();
    let mut deleted = Vec::new();
    for (key, object) in found.objects {
        if !call.selects(&object) {
            continue;
        }
        path.name = Some(key.name.clone());
        path.namespace = Some(key.namespace.clone()).filter(|namespace| !namespace.is_empty());
        call.path = path.clone();
        match delete_one(&call, &options) {
            Err(error) if error.reason != "NotFound" => return Err(error),
            Err(_) => {}
            Ok((object, _)) => deleted.push((key, object)),
        }
    }
    let metadata = json!({"resourceVersion": call.server.store.revision().to_string()});
    Ok(list::write(&call, &deleted, metadata))
}

/// Deletes a pod in favour of an eviction.
pub fn evict(call: &Call, body: &Value) -> Result<(), ApiError> {
    let options = serde_json::from_value(body["deleteOptions"].clone()).unwrap_or_default();
    delete_one(call, &options).map(|_| ())
}

fn read_options(call: &mut Call, body: &[u8]) -> Result<Options, ApiError> {
    let mut options = Options::default();
    if !body.is_empty() {
        let value = reply::decode(call.content_type.as_deref(), body)?;
        options = serde_json::from_value(value)
            .map_err(|error| ApiError::bad_request(format!("reading DeleteOptions: {error}")))?;
    }
    options.grace_period_seconds = options.grace_period_seconds.or(call.query.grace_period_seconds);
    options.propagation_policy = options
        .propagation_policy
        .or_else(|| call.query.propagation_policy.clone());
    if let (Some(policy), Some(_)) = (&options.propagation_policy, options.orphan_dependents) {
        let why = "orphanDependents and deletionPropagation cannot be both set";
        let cause = Cause::invalid("propagationPolicy", &json!(policy), why);
        return Err(ApiError::invalid("meta.k8s.io", "DeleteOptions", "", vec![cause]));
    }
    if let Some(orphan) = options.orphan_dependents
        && options.propagation_policy.is_none()
    {
        options.propagation_policy = Some(if orphan { "Orphan" } else { "Background" }.into());
    }
    for value in &options.dry_run {
        call.query.dry_run |= request::read_dry_run(value, "DeleteOptions")?;
    }
    match options.propagation_policy.as_deref() {
        None | Some("Orphan" | "Background" | "Foreground") => Ok(options),
        Some(other) => {
            let known = ["Foreground", "Background", "Orphan", "nil"].map(|policy| json!(policy));
            let cause = Cause::not_supported("propagationPolicy", &json!(other), &known);
            Err(ApiError::invalid("meta.k8s.io", "DeleteOptions", "", vec![cause]))
        }
    }
}

/// Deletes, or marks as being deleted; says whether the object is gone.
fn delete_one(call: &Call, options: &Options) -> Result<(Object, bool), ApiError> {
    if call.resource.is_core("namespaces") && PROTECTED.contains(&call.name()) {
        let why = "this namespace may not be deleted";
        return Err(ApiError::forbidden(&call.resource.key(), call.name(), why));
    }
    for attempt in 1.. {
        let stored = call.stored()?;
        check_preconditions(call, options, &stored)?;
        match mark(call, options, &stored) {
            Err(error) if error.reason == "Conflict" && attempt < ATTEMPTS => {}
            Ok(done) => {
                if !call.query.dry_run {
                    definition::finish_deletions(&call.server);
                }
                return Ok(done);
            }
            Err(error) => return Err(error),
        }
    }
    Err(ApiError::internal("too many attempts"))
}

fn check_preconditions(call: &Call, options: &Options, stored: &Value) -> Result<(), ApiError> {
    let Some(wanted) = &options.preconditions else {
        return Ok(());
    };
    let metadata = &stored["metadata"];
    let pairs = [
        ("UID", &wanted.uid, &metadata["uid"], "deleted and then recreated"),
        (
            "ResourceVersion",
            &wanted.resource_version,
            &metadata["resourceVersion"],
            "modified",
        ),
    ];
    for (name, wanted, actual, what) in pairs {
        let actual = actual.as_str().unwrap_or_default();
        if let Some(wanted) = wanted
            && wanted != actual
        {
            let why = format!(
                "the {name} in the precondition ({wanted}) does not match the {name} in record ({actual}). The object \
                 might have been {what}"
            );
            let kind = ResourceKey::new(call.resource.group.clone(), call.resource.kind.clone());
            return Err(ApiError::conflict(&kind, call.name(), &why));
        }
    }
    Ok(())
}

fn mark(call: &Call, options: &Options, stored: &Object) -> Result<(Object, bool), ApiError> {
    let mut new = stored.as_ref().clone();
    let finalizers = finalizers(&new, options.propagation_policy.as_deref());
    let holds_content =
        call.resource.is_core("namespaces") && !new["spec"]["finalizers"].as_array().is_none_or(Vec::is_empty);
    let waits = !finalizers.is_empty() || holds_content;
    let had = new["metadata"]["finalizers"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    if finalizers != had {
        new["metadata"]["finalizers"] = Value::Array(finalizers);
    }
    let grace = grace(call, options, &new);
    if grace == 0 && !waits {
        return Ok((store::remove(call, stored, new)?, true));
    }
    let marked = new["metadata"]["deletionTimestamp"].is_string();
    let left = new["metadata"]["deletionGracePeriodSeconds"].as_i64().unwrap_or(0);
    if !marked || grace < left {
        let ends = Timestamp::now().saturating_add(SignedDuration::from_secs(grace));
        let ends = ends.map_err(ApiError::internal)?;
        new["metadata"]["deletionTimestamp"] = json!(ends.strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
        new["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
        if let Some(generation) = new["metadata"]["generation"]
            .as_i64()
            .filter(|generation| *generation > 0)
        {
            new["metadata"]["generation"] = json!(generation + 1);
        }
    }
    if call.resource.is_core("namespaces") {
        new["status"]["phase"] = json!("Terminating");
    }
    if call.resource.group == definition::GROUP {
        terminate_definition(&mut new);
    }
    Ok((store::replace(call, stored, new)?, false))
}

fn terminate_definition(definition: &mut Value) {
    let condition = json!({"type": "Terminating", "status": "True", "reason": "InstanceDeletionPending",
        "message": "CustomResourceDefinition marked for deletion; CustomResource deletion will begin soon",
        "lastTransitionTime": metadata::now()});
    if let Some(conditions) = definition["status"]["conditions"].as_array_mut()
        && !conditions.iter().any(|known| known["type"] == "Terminating")
    {
        conditions.push(condition);
    }
}

/// The finalizers after a deletion with this policy: the garbage collector takes its own away when it is done.
fn finalizers(object: &Value, policy: Option<&str>) -> Vec<Value> {
    let mut list = object["metadata"]["finalizers"].as_array().cloned().unwrap_or_default();
    let add = match policy {
        None => return list,
        Some("Orphan") => Some("orphan"),
        Some("Foreground") => Some("foregroundDeletion"),
        Some(_) => None,
    };
    list.retain(|name| name != "orphan" && name != "foregroundDeletion" || add.is_some_and(|add| name == add));
    if let Some(add) = add
        && !list.iter().any(|name| name == add)
    {
        list.push(json!(add));
    }
    list
}

/// Seconds until the object must be gone; only pods on a node have any.
fn grace(call: &Call, options: &Options, object: &Value) -> i64 {
    if !call.resource.is_core("pods") {
        return 0;
    }
    let unassigned = object["spec"]["nodeName"].as_str().is_none_or(str::is_empty);
    let ended = matches!(object["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    if unassigned || ended {
        return 0;
    }
    let own = object["spec"]["terminationGracePeriodSeconds"].as_i64().unwrap_or(30);
    let grace = options.grace_period_seconds.unwrap_or(own);
    // A negative period of the spec means the shortest one (kubernetes pod strategy).
    let grace = if grace < 0 { 1 } else { grace };
    match object["metadata"]["deletionGracePeriodSeconds"].as_i64() {
        Some(left) if object["metadata"]["deletionTimestamp"].is_string() => {
            options.grace_period_seconds.map_or(left, |asked| asked.clamp(0, left))
        }
        _ => grace,
    }
}
