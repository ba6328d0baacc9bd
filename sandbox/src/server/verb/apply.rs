//! `PATCH` with `application/apply-patch+yaml`: server-side apply.

use serde_json::Value;

use super::{
    patch,
    update::{ATTEMPTS, version},
};
use crate::{
    patch::apply::{ApplyError, apply as merge},
    schema::Cause,
    server::{
        call::Call,
        kind,
        reply::Reply,
        status::ApiError,
        view,
        write::{self, Ownership, fields, identity, metadata},
    },
    store::object,
};

/// Applies the body for its manager; creates the object if there is none.
pub fn apply(call: &Call, body: &[u8]) -> Result<Reply, ApiError> {
    if call.query.field_manager.is_none() {
        let cause = Cause::required("fieldManager", "is required for apply patch");
        return Err(ApiError::invalid("meta.k8s.io", "PatchOptions", "", vec![cause]));
    }
    let config = read(call, body)?;
    for attempt in 1.. {
        let result = match call.server.store.get(&call.resource.table, &call.key()) {
            Some(stored) => update(call, &config, &stored).map(|written| super::answer(call, 200, &written)),
            None if call.path.subresource.is_some() => Err(ApiError::not_found(&call.resource.key(), call.name())),
            None => create(call, &config).map(|written| super::answer(call, 201, &written)),
        };
        match result {
            // A rival was faster: what it left is merged with, unless a field or a version is in dispute.
            Err(error) if is_race(&error) && version(&config)?.is_none() && attempt < ATTEMPTS => {}
            other => return other,
        }
    }
    Err(ApiError::internal("too many attempts"))
}

fn is_race(error: &ApiError) -> bool {
    let disputed = error.details.as_ref().is_some_and(|details| !details.causes.is_empty());
    (error.reason == "Conflict" && !disputed) || error.reason == "AlreadyExists"
}

fn read(call: &Call, body: &[u8]) -> Result<Value, ApiError> {
    let mut config: Value =
        serde_yaml::from_slice(body).map_err(|error| ApiError::bad_request(format!("error decoding YAML: {error}")))?;
    if !config.is_object() {
        return Err(ApiError::bad_request("error decoding YAML: the object is not a map"));
    }
    fields::check_kind(call, &mut config)?;
    identity::check_name(call, &mut config)?;
    identity::settle_namespace(call, &mut config)?;
    if !call.resource.custom {
        kind::drop_nulls(&mut config);
    }
    let mut pruned = config.clone();
    if let Some(path) = call.resource.schema.prune(&mut pruned).first() {
        let place = match call.namespace() {
            Some(namespace) => format!("{namespace}/{}", call.name()),
            None => format!("/{}", call.name()),
        };
        return Err(ApiError::new(
            500,
            "",
            format!(
                "failed to create typed patch object ({place}; {}, Kind={}): .{path}: field not declared in schema",
                call.api_version, call.resource.kind
            ),
        ));
    }
    Ok(config)
}

fn merged(call: &Call, live: Option<&Value>, config: &Value) -> Result<Value, ApiError> {
    let time = metadata::now();
    let writer = metadata::writer(call, time.as_str().unwrap_or_default());
    let mut merged =
        merge(live, config, call.resource.schema.root(), &writer, call.query.force).map_err(|error| match &error {
            ApplyError::Conflicts(_) => ApiError::apply_conflict(error.to_string(), error.causes()),
            ApplyError::Ambiguous(_) | ApplyError::HasManagedFields => ApiError::bad_request(error.to_string()),
        })?;
    patch::settle(call, &mut merged, &[])?;
    Ok(merged)
}

fn create(call: &Call, config: &Value) -> Result<object::Object, ApiError> {
    if config["metadata"]["uid"].as_str().is_some_and(|uid| !uid.is_empty()) {
        return Err(ApiError::conflict(
            &call.resource.key(),
            call.name(),
            "uid mismatch: the provided object specified uid, and no existing object was found",
        ));
    }
    let mut object = merged(call, None, config)?;
    identity::settle(call, &mut object)?;
    write::create(call, object, Ownership::Settled)
}

fn update(call: &Call, config: &Value, stored: &object::Object) -> Result<object::Object, ApiError> {
    if version(config)?.is_some_and(|given| given != object::revision(stored)) {
        return Err(ApiError::modified(&call.resource.key(), call.name()));
    }
    let live = view::convert(&call.resource, stored);
    let new = merged(call, Some(&live), config)?;
    write::update(call, stored, new, Ownership::Settled)
}
