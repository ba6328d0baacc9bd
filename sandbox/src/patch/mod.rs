//! How a client changes an object: JSON patch, merge patch, strategic merge patch and server-side apply.
//!
//! Pure functions on [`serde_json::Value`]; the time of an apply is an argument.
//!
//! # Layout
//!
//! | file | what it holds |
//! |---|---|
//! | `merge.rs` | RFC 7386 |
//! | `json.rs` | RFC 6902, with the API server's refusals |
//! | `strategic.rs` | strategic merge patch of built-in kinds |
//! | `apply.rs` | server-side apply |
//! | `managed.rs` | `metadata.managedFields`, kept up to date by other writes |
//! | `fields.rs`, `typed.rs` | sets of paths; values seen through their schema |

pub mod apply;
pub mod fields;
pub mod json;
pub mod managed;
pub mod merge;
pub mod strategic;
mod typed;

/// A patch that cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum PatchError {
    /// The patch text has the wrong shape: answered with 400.
    #[error("{0}")]
    Malformed(String),
    /// The patch does not fit this object: answered with 422.
    #[error("{0}")]
    Unprocessable(String),
}
