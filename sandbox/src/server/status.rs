//! Errors as Kubernetes answers them: `kind: Status` with code, reason, message and details (apimachinery
//! `api/errors`). Wording is that of the real API server, because clients and people match on it.

use serde_json::{Value, json};

use crate::{
    schema::{Cause, summary},
    store::{StoreError, object::ResourceKey},
};

/// What `details` names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Details {
    /// Name of the object.
    pub name: String,
    /// API group.
    pub group: String,
    /// Kind or plural, as the real server has it for the reason.
    pub kind: String,
    /// uid of the object.
    pub uid: String,
    /// What is wrong, field by field.
    pub causes: Vec<Cause>,
    /// For 429 and 504.
    pub retry_after_seconds: Option<u32>,
}

/// A failed request.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status.
    pub code: u16,
    /// Machine-readable reason.
    pub reason: &'static str,
    /// In words.
    pub message: String,
    /// What it is about. Boxed: an error is rarely built but its size is carried everywhere.
    pub details: Option<Box<Details>>,
}

impl ApiError {
    /// Any error without details.
    pub fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason,
            message: message.into(),
            details: None,
        }
    }

    fn about(mut self, group: &str, kind: &str, name: &str) -> Self {
        self.details = Some(Box::new(Details {
            name: name.into(),
            group: group.into(),
            kind: kind.into(),
            ..Details::default()
        }));
        self
    }

    /// 404 for an object.
    #[must_use]
    pub fn not_found(resource: &ResourceKey, name: &str) -> Self {
        Self::new(404, "NotFound", format!("{resource} \"{name}\" not found")).about(
            &resource.group,
            &resource.plural,
            name,
        )
    }

    /// 404 for a path that no API serves.
    #[must_use]
    pub fn no_such_path() -> Self {
        Self::new(404, "NotFound", "the server could not find the requested resource").about("", "", "")
    }

    /// 409 at creation.
    #[must_use]
    pub fn already_exists(resource: &ResourceKey, name: &str) -> Self {
        Self::new(409, "AlreadyExists", format!("{resource} \"{name}\" already exists")).about(
            &resource.group,
            &resource.plural,
            name,
        )
    }

    /// 409 with the operation's own explanation.
    #[must_use]
    pub fn conflict(resource: &ResourceKey, name: &str, why: &str) -> Self {
        Self::new(
            409,
            "Conflict",
            format!("Operation cannot be fulfilled on {resource} \"{name}\": {why}"),
        )
        .about(&resource.group, &resource.plural, name)
    }

    /// 409 because the object changed since it was read.
    #[must_use]
    pub fn modified(resource: &ResourceKey, name: &str) -> Self {
        Self::conflict(
            resource,
            name,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    /// 409 of a server-side apply, with one cause per field.
    #[must_use]
    pub fn apply_conflict(message: impl Into<String>, causes: Vec<Cause>) -> Self {
        let mut error = Self::new(409, "Conflict", message);
        error.details = Some(Box::new(Details {
            causes,
            ..Details::default()
        }));
        error
    }

    /// 422 with one cause per field.
    #[must_use]
    pub fn invalid(group: &str, kind: &str, name: &str, causes: Vec<Cause>) -> Self {
        let qualified = if group.is_empty() {
            kind.to_owned()
        } else {
            format!("{kind}.{group}")
        };
        let text = summary(&causes);
        let mut error =
            Self::new(422, "Invalid", format!("{qualified} \"{name}\" is invalid: {text}")).about(group, kind, name);
        if let Some(details) = &mut error.details {
            details.causes = causes;
        }
        error
    }

    /// 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// 401.
    #[must_use]
    pub fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// 403 for an object, with the policy's explanation.
    #[must_use]
    pub fn forbidden(resource: &ResourceKey, name: &str, why: &str) -> Self {
        Self::new(403, "Forbidden", format!("{resource} \"{name}\" is forbidden: {why}")).about(
            &resource.group,
            &resource.plural,
            name,
        )
    }

    /// 403 in a namespace that is being deleted.
    #[must_use]
    pub fn namespace_terminating(resource: &ResourceKey, name: &str, namespace: &str) -> Self {
        let why = format!("unable to create new content in namespace {namespace} because it is being terminated");
        let mut error = Self::forbidden(resource, name, &why);
        if let Some(details) = &mut error.details {
            details.causes = vec![Cause::namespace_terminating(namespace)];
        }
        error
    }

    /// 405.
    #[must_use]
    pub fn method_not_allowed(resource: &ResourceKey) -> Self {
        Self::new(
            405,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource",
        )
        .about(&resource.group, &resource.plural, "")
    }

    /// 406.
    #[must_use]
    pub fn not_acceptable(accepted: &str) -> Self {
        Self::new(
            406,
            "NotAcceptable",
            format!("only the following media types are accepted: {accepted}"),
        )
    }

    /// 410 of a list or watch from a forgotten version.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    /// 413.
    #[must_use]
    pub fn too_large(limit: usize) -> Self {
        Self::new(
            413,
            "RequestEntityTooLarge",
            format!("Request entity too large: limit is {limit}"),
        )
    }

    /// 415.
    #[must_use]
    pub fn unsupported_media_type(accepted: &str) -> Self {
        Self::new(
            415,
            "UnsupportedMediaType",
            format!("the body of the request was in an unknown format - accepted media types include: {accepted}"),
        )
    }

    /// 429.
    #[must_use]
    pub fn too_many_requests(message: &str, retry_after_seconds: u32) -> Self {
        let mut error = Self::new(429, "TooManyRequests", message);
        error.details = Some(Box::new(Details {
            retry_after_seconds: Some(retry_after_seconds),
            ..Details::default()
        }));
        error
    }

    /// 500.
    pub fn internal(message: impl std::fmt::Display) -> Self {
        Self::new(500, "InternalError", format!("Internal error occurred: {message}"))
    }

    /// What the store's refusal means for the client.
    #[must_use]
    pub fn from_store(resource: &ResourceKey, name: &str, error: &StoreError) -> Self {
        match error {
            StoreError::Exists(_) => Self::already_exists(resource, name),
            StoreError::Missing(_) => Self::not_found(resource, name),
            StoreError::Stale { .. } => Self::modified(resource, name),
            StoreError::Compacted { .. } => Self::expired(error.to_string()),
            StoreError::Future { .. } => {
                let mut answer = Self::new(504, "Timeout", format!("Timeout: {error}"));
                answer.details = Some(Box::new(Details {
                    retry_after_seconds: Some(1),
                    causes: vec![Cause::version_too_large()],
                    ..Details::default()
                }));
                answer
            }
            StoreError::Persist(error) => Self::internal(error),
        }
    }

    /// `kind: Status`, as it goes over the wire.
    #[must_use]
    pub fn to_status(&self) -> Value {
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code,
        });
        if let Some(details) = &self.details {
            status["details"] = details.to_value();
        }
        status
    }
}

impl Details {
    fn to_value(&self) -> Value {
        let mut value = json!({});
        for (key, text) in [
            ("name", &self.name),
            ("group", &self.group),
            ("kind", &self.kind),
            ("uid", &self.uid),
        ] {
            if !text.is_empty() {
                value[key] = json!(text);
            }
        }
        if !self.causes.is_empty() {
            value["causes"] = self.causes.iter().map(cause_value).collect();
        }
        if let Some(seconds) = self.retry_after_seconds {
            value["retryAfterSeconds"] = json!(seconds);
        }
        value
    }
}

fn cause_value(cause: &Cause) -> Value {
    let mut value = json!({"reason": cause.reason.as_str(), "message": cause.message});
    if !cause.field.is_empty() {
        value["field"] = json!(cause.field);
    }
    value
}

/// `Status` of a deletion that is complete.
#[must_use]
pub fn deleted(resource: &ResourceKey, name: &str, uid: &str) -> Value {
    let details = Details {
        name: name.into(),
        group: resource.group.clone(),
        kind: resource.plural.clone(),
        uid: uid.into(),
        ..Details::default()
    };
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details.to_value()})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_cause_stands_alone_and_several_stand_in_brackets() {
        let cause = |field: &str| Cause::required(field, "");
        let one = ApiError::invalid("flotilla.dev", "TrainingJob", "a", vec![cause("spec.model")]);
        assert_eq!(
            one.message,
            "TrainingJob.flotilla.dev \"a\" is invalid: spec.model: Required value"
        );
        let two = ApiError::invalid("", "Pod", "a", vec![cause("x"), cause("y")]);
        assert_eq!(
            two.message,
            "Pod \"a\" is invalid: [x: Required value, y: Required value]"
        );
        assert_eq!(two.to_status()["details"]["causes"][1]["field"], "y");
    }

    #[test]
    fn a_missing_object_of_a_group_is_named_with_the_group() {
        let error = ApiError::not_found(&ResourceKey::new("flotilla.dev", "datasets"), "a");
        assert_eq!(error.message, "datasets.flotilla.dev \"a\" not found");
        assert_eq!(error.to_status()["details"]["kind"], "datasets");
    }
}
