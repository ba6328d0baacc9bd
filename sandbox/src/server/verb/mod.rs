//! The verbs, one file each.

pub mod apply;
pub mod create;
pub mod delete;
pub mod get;
pub mod list;
pub mod patch;
pub mod update;
pub mod watch;

use serde_json::Value;

use super::{
    call::Call,
    negotiate::Form,
    reply::{self, Reply},
    table, view,
};

/// One object in the form and version that the request asks for; `object` is as stored.
#[must_use]
pub fn answer(call: &Call, code: u16, object: &Value) -> Reply {
    let converted = view::convert(&call.resource, object);
    match call.form {
        Form::Object => reply::json(code, &converted),
        Form::Metadata => reply::json(code, &view::metadata_only(&converted)),
        Form::Table => {
            let table = table::table(call, std::iter::once(converted.as_ref()), true);
            reply::json(code, &table)
        }
    }
}
