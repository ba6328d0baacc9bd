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
        request::FieldValidation,
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
            Err(error) if is_race(&error) && version(&config.0)?.is_none() && attempt < ATTEMPTS => {}
            other => return other,
        }
    }
    Err(ApiError::internal("too many attempts"))
}

fn is_race(error: &ApiError) -> bool {
    let disputed = error.details.as_ref().is_some_and(|details| !details.causes.is_empty());
    (error.reason == "Conflict" && !disputed) || error.reason == "AlreadyExists"
}

/// A configuration, complete, and how refusals name it.
type Config = (Value, Untyped);

fn read(call: &Call, body: &[u8]) -> Result<Config, ApiError> {
    let mut config: Value =
        serde_yaml::from_slice(body).map_err(|error| ApiError::bad_request(format!("error decoding YAML: {error}")))?;
    if !config.is_object() {
        return Err(ApiError::bad_request("error decoding YAML: the object is not a map"));
    }
    if call.query.field_validation == FieldValidation::Strict
        && let Err(error) = serde_yaml::from_slice::<serde_yaml::Value>(body)
    {
        return Err(ApiError::bad_request(format!(
            "error strict decoding patch: error converting YAML to JSON: {error}"
        )));
    }
    check_type(call, &config)?;
    let untyped = Untyped::of(call, &config);
    fields::check_kind(call, &mut config)?;
    identity::check_name(call, &mut config)?;
    identity::settle_namespace(call, &mut config)?;
    if !call.resource.custom {
        kind::drop_nulls(&mut config);
    }
    let mut pruned = config.clone();
    if let Some(path) = call.resource.schema.prune(&mut pruned).first() {
        return Err(untyped.refuse(&format!(".{path}: field not declared in schema")));
    }
    Ok((config, untyped))
}

/// The configuration says the kind and version of the path.
fn check_type(call: &Call, config: &Value) -> Result<(), ApiError> {
    let text = |field: &str| config[field].as_str().unwrap_or_default();
    let (kind, version) = (text("kind"), text("apiVersion"));
    if (kind, version) == (&call.resource.kind, &call.api_version) {
        return Ok(());
    }
    let version = qualified(version);
    Err(ApiError::bad_request(format!(
        "invalid object type: {version}, Kind={kind}"
    )))
}

/// `group/version`, with the slash also where the group is the core one.
fn qualified(api_version: &str) -> String {
    if api_version.contains('/') {
        api_version.to_owned()
    } else {
        format!("/{api_version}")
    }
}

/// A configuration that cannot be seen through the schema, as refusals name it: by what it says itself.
#[derive(Debug)]
struct Untyped(String);

impl Untyped {
    fn of(call: &Call, config: &Value) -> Self {
        let text = |field: &str| config["metadata"][field].as_str().unwrap_or_default();
        Self(format!(
            "{}/{}; {}, Kind={}",
            text("namespace"),
            text("name"),
            qualified(&call.api_version),
            call.resource.kind
        ))
    }

    fn refuse(&self, why: &str) -> ApiError {
        ApiError::new(
            500,
            "",
            format!("failed to create typed patch object ({}): {why}", self.0),
        )
    }
}

fn merged(call: &Call, live: Option<&Value>, (config, untyped): &Config) -> Result<Value, ApiError> {
    let time = metadata::now();
    let writer = metadata::writer(call, time.as_str().unwrap_or_default());
    let mut merged =
        merge(live, config, call.resource.schema.root(), &writer, call.query.force).map_err(|error| match &error {
            ApplyError::Conflicts(_) => ApiError::apply_conflict(error.to_string(), error.causes()),
            ApplyError::Ambiguous(why) => untyped.refuse(why),
            ApplyError::HasManagedFields => ApiError::bad_request(error.to_string()),
        })?;
    patch::settle(call, &mut merged, &[])?;
    Ok(merged)
}

fn create(call: &Call, config: &Config) -> Result<object::Object, ApiError> {
    if config.0["metadata"]["uid"].as_str().is_some_and(|uid| !uid.is_empty()) {
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

fn update(call: &Call, config: &Config, stored: &object::Object) -> Result<object::Object, ApiError> {
    if version(&config.0)?.is_some_and(|given| given != object::revision(stored)) {
        return Err(ApiError::modified(&call.resource.key(), call.name()));
    }
    let live = view::convert(&call.resource, stored);
    let new = merged(call, Some(&live), config)?;
    write::update(call, stored, new, Ownership::Settled)
}
