//! What the operator tells a learner about its rollout pods.

use serde::{Deserialize, Serialize};

/// Body of `PUT /v1/rollout-pods`: every rollout pod that is ready at this moment. A list replaces the one before.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RolloutPods {
    /// Names the list; the learner repeats it in its progress, so that nobody has to remember what it was told.
    pub revision: String,
    /// The pods, by name.
    pub pods: Vec<RolloutPod>,
}

/// A rollout pod that is ready.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RolloutPod {
    /// Its name, for logs.
    pub name: String,
    /// Its UID: a pod of the same name and address that was made later holds no weights yet.
    pub uid: String,
    /// `ip:port`, IPv6 in brackets.
    pub address: String,
}
