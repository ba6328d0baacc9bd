//! Questions about the caller: who am I, what may I do. The sandbox has one user, who may do everything.

use serde_json::{Value, json};

use super::{
    call::Call,
    reply::{self, Reply},
    status::ApiError,
    write::{fields, metadata},
};

/// Whether a resource is only ever created, never stored.
#[must_use]
pub fn is_review(call: &Call) -> bool {
    matches!(
        call.resource.group.as_str(),
        "authorization.k8s.io" | "authentication.k8s.io"
    )
}

/// Answers a review.
pub fn answer(call: &Call, body: &[u8]) -> Result<Reply, ApiError> {
    let mut review: Value = fields::read(call, body)?;
    if !review["metadata"].is_object() {
        review["metadata"] = json!({});
    }
    review["metadata"]["creationTimestamp"] = metadata::now();
    review["status"] = match call.resource.kind.as_str() {
        "SelfSubjectReview" => json!({"userInfo": {"username": call.user.name, "groups": call.user.groups}}),
        "SelfSubjectRulesReview" => json!({
            "resourceRules": [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}],
            "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}],
            "incomplete": false,
        }),
        "SubjectAccessReview" | "LocalSubjectAccessReview" => {
            let user = review["spec"]["user"].as_str().unwrap_or_default();
            json!({"allowed": user == call.user.name})
        }
        _ => json!({"allowed": true}),
    };
    Ok(reply::json(201, &review))
}
