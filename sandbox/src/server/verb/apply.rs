//! `PATCH` with `application/apply-patch+yaml`: server-side apply.

use crate::server::{call::Call, reply::Reply, status::ApiError};

/// Applies the body for its manager.
pub fn apply(call: &Call, body: &[u8]) -> Result<Reply, ApiError> {
    let _ = (call, body);
    Err(ApiError::unsupported_media_type("application/json-patch+json"))
}
