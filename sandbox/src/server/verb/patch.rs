//! `PATCH` of one object, in each of the five formats.

use serde_json::Value;

use super::update::{ATTEMPTS, version};
use crate::{
    patch::{self, PatchError},
    schema::{Cause, builtin},
    server::{
        call::Call,
        kind,
        reply::Reply,
        status::ApiError,
        view,
        write::{self, Ownership, fields, identity},
    },
    store::object,
};

const ACCEPTED: &str = "application/json-patch+json, application/merge-patch+json, \
                        application/strategic-merge-patch+json, application/apply-patch+yaml";

const ACCEPTED_CUSTOM: &str = "application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml";

/// A patch that is not an apply.
#[derive(Debug)]
enum Format {
    Json,
    Merge,
    Strategic,
}

/// Applies the body to the object.
pub fn patch(call: &Call, body: &[u8]) -> Result<Reply, ApiError> {
    let media = call
        .content_type
        .as_deref()
        .unwrap_or_default()
        .split(';')
        .next()
        .unwrap_or_default()
        .trim();
    let format = match media {
        "application/json-patch+json" => Format::Json,
        "application/merge-patch+json" => Format::Merge,
        "application/strategic-merge-patch+json" if !call.resource.custom => Format::Strategic,
        _ if call.resource.custom => return Err(ApiError::unsupported_media_type(ACCEPTED_CUSTOM)),
        _ => return Err(ApiError::unsupported_media_type(ACCEPTED)),
    };
    let patch: Value = serde_json::from_slice(body)
        .map_err(|error| ApiError::bad_request(format!("error decoding patch: {error}")))?;
    for attempt in 1.. {
        match once(call, &format, &patch, body) {
            // Without a version in the patch a rival's write is no reason to fail.
            Err((error, false)) if error.reason == "Conflict" && attempt < ATTEMPTS => {}
            Err((error, _)) => return Err(error),
            Ok(reply) => return Ok(reply),
        }
    }
    Err(ApiError::internal("too many attempts"))
}

/// One attempt; an error says whether it stands whatever others write.
fn once(call: &Call, format: &Format, patch: &Value, text: &[u8]) -> Result<Reply, (ApiError, bool)> {
    let fixed = |error: ApiError| (error, true);
    let stored = call.stored().map_err(fixed)?;
    let old = view::convert(&call.resource, &stored);
    let mut new = old.clone().into_owned();
    let applied = match format {
        Format::Json => patch::json::apply(&mut new, patch),
        Format::Merge => patch::merge::apply(&mut new, patch),
        Format::Strategic => patch::strategic::apply(&mut new, patch, definition_name(call)),
    };
    applied.map_err(|error| fixed(refusal(&error)))?;
    settle(call, &mut new, text).map_err(fixed)?;
    let given = version(&new).map_err(fixed)?;
    if given.is_some_and(|given| given != object::revision(&stored)) {
        return Err(fixed(ApiError::modified(&call.resource.key(), call.name())));
    }
    let written = write::update(call, &stored, new, Ownership::Update);
    let written = written.map_err(|error| (error, false))?;
    Ok(super::answer(call, 200, &written))
}

/// The patched object is of the kind and has no unknown fields; `text` is the patch, which a refusal quotes.
pub fn settle(call: &Call, new: &mut Value, text: &[u8]) -> Result<(), ApiError> {
    fields::check_kind(call, new)?;
    if !call.resource.custom {
        kind::drop_nulls(new);
    }
    let unknown = fields::prune(call, new);
    if call.query.field_validation == crate::server::request::FieldValidation::Strict && !unknown.is_empty() {
        let resource = &call.resource;
        let detail = format!("strict decoding error: {}", unknown.join(", "));
        let cause = Cause::invalid("patch", &String::from_utf8_lossy(text).into(), &detail);
        return Err(ApiError::invalid(
            &resource.group,
            &resource.kind,
            call.name(),
            vec![cause],
        ));
    }
    fields::report(call, &unknown)?;
    identity::check_name(call, new)?;
    identity::settle_namespace(call, new)
}

/// Name of the OpenAPI definition of a built-in kind; empty where there is none.
fn definition_name(call: &Call) -> &'static str {
    let resource = &call.resource;
    builtin::find(&resource.group, &resource.version, &resource.kind)
        .and_then(builtin::definition_name)
        .unwrap_or_default()
}

fn refusal(error: &PatchError) -> ApiError {
    match error {
        PatchError::Malformed(text) => ApiError::bad_request(text.clone()),
        PatchError::Unprocessable(text) => ApiError::new(422, "Invalid", text.clone()),
    }
}
