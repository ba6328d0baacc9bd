//! `GET` of one object.

use crate::{
    server::{call::Call, reply::Reply, status::ApiError},
    store::StoreError,
};

/// Answers with the object.
pub fn get(call: &Call) -> Result<Reply, ApiError> {
    let current = call.server.store.revision();
    if let Some(asked) = call.query.resource_version.filter(|asked| *asked > current) {
        let error = StoreError::Future { asked, current };
        return Err(ApiError::from_store(&call.resource.key(), call.name(), &error));
    }
    Ok(super::answer(call, 200, call.stored()?.as_ref()))
}
