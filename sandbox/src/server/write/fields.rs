//! From the bytes of a request to an object without unknown fields.

use serde_json::Value;

use crate::{
    schema::{duplicate, unknown_field},
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
    match object["apiVersion"].as_str().filter(|text| !text.is_empty()) {
        Some(given) if given != wanted => {
            return Err(ApiError::bad_request(format!(
                "the API version in the data ({given}) does not match the expected API version ({wanted})"
            )));
        }
        Some(_) => {}
        None => object["apiVersion"] = wanted.into(),
    }
    match object["kind"].as_str().filter(|text| !text.is_empty()) {
        Some(given) if given != resource.kind => Err(ApiError::bad_request(format!(
            "the kind in the data ({given}) does not match the expected kind ({})",
            resource.kind
        ))),
        Some(_) => Ok(()),
        None => {
            object["kind"] = resource.kind.clone().into();
            Ok(())
        }
    }
}
