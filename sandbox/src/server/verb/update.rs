//! `PUT` of one object.

use serde_json::Value;

use crate::{
    schema::Cause,
    server::{
        call::Call,
        reply::Reply,
        status::ApiError,
        write::{self, Ownership, fields, identity},
    },
    store::object,
};

/// How often a write without a version of its own is tried again after a rival's.
pub const ATTEMPTS: usize = 16;

/// Replaces the object by the body.
pub fn update(call: &Call, body: &[u8]) -> Result<Reply, ApiError> {
    let mut object = fields::read(call, body)?;
    identity::check_name(call, &mut object)?;
    identity::settle_namespace(call, &mut object)?;
    let given = version(&object)?;
    for attempt in 1.. {
        let stored = match call.stored() {
            Err(error) if error.reason == "NotFound" && given.is_none() && may_create(call) => {
                identity::settle(call, &mut object)?;
                match write::create(call, object.clone(), Ownership::Update) {
                    Err(error) if error.reason == "AlreadyExists" && attempt < ATTEMPTS => continue,
                    created => return Ok(super::answer(call, 201, created?.as_ref())),
                }
            }
            found => found?,
        };
        check_preconditions(call, &object, &stored, given)?;
        match write::update(call, &stored, object.clone(), Ownership::Update) {
            Err(error) if error.reason == "Conflict" && given.is_none() && attempt < ATTEMPTS => {}
            Err(error) => return Err(error),
            Ok(stored) => return Ok(super::answer(call, 200, &stored)),
        }
    }
    Err(ApiError::internal("too many attempts"))
}

/// Kinds that an update makes where they are not there (`AllowCreateOnUpdate` of their strategies).
fn may_create(call: &Call) -> bool {
    let resource = &call.resource;
    !resource.custom
        && call.path.subresource.is_none()
        && (matches!(resource.plural.as_str(), "leases" | "endpoints" | "events" | "services")
            || resource.group == "rbac.authorization.k8s.io")
}

/// The version that the writer read; none if it does not care.
pub fn version(object: &Value) -> Result<Option<u64>, ApiError> {
    match object["metadata"]["resourceVersion"].as_str() {
        None | Some("" | "0") => Ok(None),
        Some(text) => text
            .parse()
            .map(Some)
            .map_err(|_| ApiError::new(500, "", format!("strconv.ParseUint: parsing {text:?}: invalid syntax"))),
    }
}

/// Version and uid are those of the stored object, where the writer gives them.
pub fn check_preconditions(call: &Call, new: &Value, stored: &Value, given: Option<u64>) -> Result<(), ApiError> {
    let resource = &call.resource;
    match given {
        Some(given) if given != object::revision(stored) => {
            return Err(ApiError::modified(&resource.key(), call.name()));
        }
        None if resource.custom => {
            let cause = Cause::invalid("metadata.resourceVersion", &0.into(), "must be specified for an update");
            return Err(ApiError::invalid(
                &resource.group,
                &resource.plural,
                call.name(),
                vec![cause],
            ));
        }
        _ => {}
    }
    let (wanted, actual) = (new["metadata"]["uid"].as_str(), stored["metadata"]["uid"].as_str());
    if let Some(wanted) = wanted.filter(|uid| !uid.is_empty())
        && Some(wanted) != actual
    {
        let actual = actual.unwrap_or_default();
        let why = format!("Precondition failed: UID in precondition: {wanted}, UID in object meta: {actual}");
        return Err(ApiError::conflict(&resource.key(), call.name(), &why));
    }
    Ok(())
}
