//! From the bytes of a request to an object without unknown fields.

use serde_json::Value;

use crate::{
    schema::{Cause, duplicate, unknown_field},
    server::{call::Call, kind, reply, request::FieldValidation, status::ApiError},
};

/// Decodes a body as an object of the call's kind; unknown and duplicate fields are treated as the query says.
pub fn read(call: &Call, body: &[u8]) -> Result<Value, ApiError> {
    let mut object = reply::decode(call.content_type.as_deref(), body)?;
    check_kind(call, &mut object)?;
    if !call.resource.custom {
        kind::drop_nulls(&mut object);
    }
    let mut errors = duplicate::duplicate_fields(body);
    errors.extend(prune(call, &mut object));
    report(call, &errors)?;
    Ok(object)
}

/// Drops unknown fields; returns a sentence for each.
pub fn prune(call: &Call, object: &mut Value) -> Vec<String> {
    call.resource
        .schema
        .prune(object)
        .iter()
        .map(|path| unknown_field(path))
        .collect()
}

/// Refuses, warns or says nothing.
pub fn report(call: &Call, errors: &[String]) -> Result<(), ApiError> {
    if errors.is_empty() {
        return Ok(());
    }
    let resource = &call.resource;
    match call.query.field_validation {
        FieldValidation::Ignore => Ok(()),
        FieldValidation::Warn => {
            errors.iter().for_each(|error| call.warn(error));
            Ok(())
        }
        FieldValidation::Strict => Err(ApiError::bad_request(format!(
            "{kind} in version \"{version}\" cannot be handled as a {kind}: strict decoding error: {errors}",
            kind = resource.kind,
            version = resource.version,
            errors = errors.join(", "),
        ))),
    }
}

/// The object says the kind and version that the path says; what it leaves out is filled in.
pub fn check_kind(call: &Call, object: &mut Value) -> Result<(), ApiError> {
    let resource = &call.resource;
    let wanted = resource.api_version();
    let text = |field: &str| object[field].as_str().unwrap_or_default().to_owned();
    let (kind, version) = (text("kind"), text("apiVersion"));
    if resource.custom {
        return check_custom_kind(call, object, &kind, &version);
    }
    let fits = |given: &str, wanted: &str| given.is_empty() || given == wanted;
    if !fits(&kind, &resource.kind) || !fits(&version, &wanted) {
        let short = version.rsplit('/').next().unwrap_or_default();
        return Err(undecodable(
            call,
            &kind,
            short,
            &format!("no kind {kind:?} is registered for version {version:?} here"),
        ));
    }
    object["kind"] = resource.kind.clone().into();
    object["apiVersion"] = wanted.into();
    Ok(())
}

fn check_custom_kind(call: &Call, object: &Value, kind: &str, version: &str) -> Result<(), ApiError> {
    let resource = &call.resource;
    let wanted = resource.api_version();
    if kind.is_empty() {
        return Err(ApiError::bad_request(format!(
            "the object provided is unrecognized (must be of type {}): Object 'Kind' is missing in '{object}'",
            resource.kind
        )));
    }
    if version != wanted {
        return Err(ApiError::bad_request(format!(
            "the API version in the data ({version}) does not match the expected API version ({wanted})"
        )));
    }
    if kind != resource.kind {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let cause = Cause::invalid("kind", &kind.into(), &format!("must be {}", resource.kind));
        return Err(ApiError::invalid(&resource.group, kind, name, vec![cause]));
    }
    Ok(())
}

/// 400 of a body that says it is of `kind` in `version` and cannot be read as the call's kind.
pub fn undecodable(call: &Call, kind: &str, version: &str, why: &str) -> ApiError {
    let wanted = &call.resource.kind;
    ApiError::bad_request(format!(
        "{kind} in version \"{version}\" cannot be handled as a {wanted}: {why}"
    ))
}
