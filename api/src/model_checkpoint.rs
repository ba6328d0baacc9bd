//! `ModelCheckpoint`: an immutable set of weights.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pod::PodSettings;

/// An immutable set of weights.
#[derive(Clone, CustomResource, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[kube(
    group = "flotilla.dev",
    version = "v1alpha1",
    kind = "ModelCheckpoint",
    plural = "modelcheckpoints",
    shortname = "ckpt",
    category = "flotilla",
    namespaced,
    cel,
    status = "ModelCheckpointStatus",
    doc = "An immutable set of weights: where they lie, their digest, and which job and step made them.",
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Job", type_ = "string", json_path = ".spec.producedBy.name"),
    printcolumn(name = "Step", type_ = "integer", json_path = ".spec.producedBy.step"),
    printcolumn(name = "Size", type_ = "string", json_path = ".status.size"),
    printcolumn(name = "Digest", type_ = "string", json_path = ".spec.digest", priority = 1),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.message", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[x_kube(validation = kube::core::Rule::new("has(self.producedBy) == has(oldSelf.producedBy)")
    .message("producedBy is immutable: make a new ModelCheckpoint"))]
#[serde(rename_all = "camelCase")]
pub struct ModelCheckpointSpec {
    /// Directory in Hugging Face layout: `pvc://claim/path`, `file:///path`, `hf://org/name[@revision]`,
    /// `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`.
    #[schemars(
        length(max = 2048),
        regex(pattern = r"^((pvc|file|s3|gs|az)://.+|hf://[^/@]+/[^/@]+(@.+)?)$")
    )]
    #[x_kube(validation = kube::core::Rule::new("self == oldSelf").message("uri is immutable: make a new ModelCheckpoint"))]
    pub uri: String,
    /// `sha256:<hex>` of its manifest; loading refuses any other.
    #[schemars(regex(pattern = "^sha256:[0-9a-f]{64}$"))]
    #[x_kube(validation = kube::core::Rule::new("self == oldSelf").message("digest is immutable: make a new ModelCheckpoint"))]
    pub digest: String,
    /// Which run and step made it; absent for imported weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = kube::core::Rule::new("self == oldSelf").message("producedBy is immutable: make a new ModelCheckpoint"))]
    pub produced_by: Option<ProducedBy>,
    /// Bytes of all files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub size_bytes: Option<i64>,
    /// Scores, `<set>/accuracy` and so on.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
    /// The pod that checks the digest of imported weights.
    #[serde(default)]
    pub verify: PodSettings,
}

/// Which run and step made a checkpoint.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ProducedBy {
    /// Name of the TrainingJob.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// UID of the TrainingJob.
    #[schemars(length(min = 1, max = 63))]
    pub uid: String,
    /// Step after which it was written.
    #[schemars(range(min = 0))]
    pub step: i64,
}

/// One word for where a checkpoint stands.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum CheckpointPhase {
    /// Its digest has not been checked.
    #[default]
    Pending,
    /// A pod reads every file.
    Verifying,
    /// Files and digest agree.
    Available,
    /// Files and digest differ, or files are missing. Final.
    Refused,
}

/// What is known of a checkpoint.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ModelCheckpointStatus {
    /// Generation of the spec that this status is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// One word for where it stands.
    pub phase: CheckpointPhase,
    /// Why it stands there, for people.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// `3.4 MB`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    /// Number of the current verification pod.
    pub attempt: u32,
    /// Conditions: Ready.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}
