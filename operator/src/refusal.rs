//! Why a spec cannot be acted on now.

use flotilla_api::names::reason;

/// A spec that cannot be acted on: a condition of the object, never a failed pass.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Refusal {
    /// CamelCase reason of the condition.
    pub reason: &'static str,
    /// What to change or to wait for.
    pub message: String,
}

impl Refusal {
    /// The spec asks for something that cannot be.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self {
            reason: reason::INVALID_SPEC,
            message: message.into(),
        }
    }

    /// Something it refers to is not there.
    pub fn waiting(message: impl Into<String>) -> Self {
        Self {
            reason: reason::WAITING_FOR_REFERENCE,
            message: message.into(),
        }
    }
}
