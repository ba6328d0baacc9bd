//! What happens to an object between the request and the store.
//!
//! Order of a creation: read (decode, prune) -> identify -> complete (system metadata, kind, defaults) -> check -> own
//! -> store. An update is the same with the old object at hand.

pub mod decode;
pub mod fields;
pub mod identity;
pub mod metadata;
pub mod name;
pub mod store;

use serde_json::Value;

use super::{call::Call, kind, status::ApiError, view};
use crate::{patch::managed, schema::subresource, store::object::Object};

/// Who owns the fields that a write sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ownership {
    /// The request's manager owns what it changes.
    Update,
    /// `metadata.managedFields` is already what it shall be.
    Settled,
}

/// Completes and checks an object and stores it as a new one. `object` is in the request's version.
pub fn create(call: &Call, mut object: Value, ownership: Ownership) -> Result<Object, ApiError> {
    let resource = &call.resource;
    identity::check_namespace_is_open(call, &object)?;
    kind::definition::check_is_open(call, &object)?;
    metadata::begin(resource, &mut object);
    if resource.custom && resource.has_status() {
        subresource::keep_status(&mut object, None);
    }
    kind::complete(call, &mut object, None)?;
    resource.schema.default(&mut object);
    if ownership == Ownership::Update {
        metadata::own(call, None, &mut object);
    }
    check(call, &object, None)?;
    store::insert(call, view::to_storage(resource, object))
}

/// Completes and checks `new`, which replaces `stored`, and stores it. `new` is in the request's version.
pub fn update(call: &Call, stored: &Object, mut new: Value, ownership: Ownership) -> Result<Object, ApiError> {
    let resource = &call.resource;
    let old = view::convert(resource, stored);
    let part = call
        .path
        .subresource
        .as_deref()
        .filter(|part| *part != "scale" && *part != "finalize");
    if part == Some("status") {
        new = kind::only_status(resource, &new, &old);
    } else if resource.has_status() {
        subresource::keep_status(&mut new, Some(&old));
    }
    metadata::carry_over(resource, &mut new, &old)?;
    kind::complete(call, &mut new, Some(&old))?;
    resource.schema.default(&mut new);
    if resource.custom || subresource::builtin_has_generation(&resource.kind) {
        let generation = subresource::generation(&new, Some(&old), resource.has_status());
        new["metadata"]["generation"] = generation.into();
    }
    if ownership == Ownership::Update {
        metadata::own(call, Some(&old), &mut new);
    }
    managed::keep_times(&mut new, &old);
    check(call, &new, Some(&old))?;
    store::replace(call, stored, view::to_storage(resource, new))
}

fn check(call: &Call, new: &Value, old: Option<&Value>) -> Result<(), ApiError> {
    let resource = &call.resource;
    let mut causes = metadata::check(call, new, old);
    let by_schema = resource.schema.validate(new, old);
    decode::check(call, new, &by_schema)?;
    // Owners are checked with the metadata, in other words.
    causes.extend(
        by_schema
            .into_iter()
            .filter(|cause| !cause.field.starts_with("metadata.ownerReferences")),
    );
    causes.extend(kind::check(call, new, old));
    if causes.is_empty() {
        return Ok(());
    }
    let name = new["metadata"]["name"].as_str().unwrap_or_default();
    Err(ApiError::invalid(&resource.group, &resource.kind, name, causes))
}
