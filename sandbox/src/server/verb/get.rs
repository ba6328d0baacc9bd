//! `GET` of one object.

use crate::server::{call::Call, reply::Reply, status::ApiError};

/// Answers with the object.
pub fn get(call: &Call) -> Result<Reply, ApiError> {
    Ok(super::answer(call, 200, call.stored()?.as_ref()))
}
