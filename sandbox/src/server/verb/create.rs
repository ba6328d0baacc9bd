//! `POST` to a collection.

use serde_json::Value;

use crate::server::{
    call::Call,
    reply::Reply,
    status::ApiError,
    write::{self, Ownership, fields, identity},
};

/// How often a generated name that is taken is drawn anew (as the real server).
const GENERATED_NAMES: usize = 8;

/// Creates the object of the body.
pub fn create(call: &Call, body: &[u8]) -> Result<Reply, ApiError> {
    let object = fields::read(call, body)?;
    if object["metadata"]["resourceVersion"]
        .as_str()
        .is_some_and(|version| !matches!(version, "" | "0"))
    {
        let why = "resourceVersion should not be set on objects to be created";
        return Err(ApiError::new(500, "", why));
    }
    let generated = object["metadata"]["name"].as_str().is_none_or(str::is_empty);
    for attempt in 1.. {
        let mut object: Value = object.clone();
        identity::settle(call, &mut object)?;
        match write::create(call, object, Ownership::Update) {
            Err(error) if error.reason == "AlreadyExists" && generated && attempt < GENERATED_NAMES => {}
            Err(error) => return Err(error),
            Ok(stored) => return Ok(super::answer(call, 201, &stored)),
        }
    }
    Err(ApiError::internal("no free name was found"))
}
