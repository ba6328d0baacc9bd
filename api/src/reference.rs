//! Where models and data come from, as users write it.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The name of another object in the same namespace.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LocalObjectReference {
    /// Name of the object.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// The weights to begin with: exactly one member is set.
#[derive(Clone, Debug, Default, Deserialize, Eq, KubeSchema, PartialEq, Serialize)]
#[x_kube(validation = kube::core::Rule::new(
    "[has(self.checkpointRef), has(self.trainingJobRef), has(self.uri)].filter(x, x).size() == 1")
    .message("model takes exactly one of checkpointRef, trainingJobRef and uri"))]
#[x_kube(validation = kube::core::Rule::new("!has(self.randomSeed) || has(self.uri)")
    .message("model.randomSeed needs model.uri: only a directory with config and tokenizer can be initialised at random"))]
#[serde(rename_all = "camelCase")]
pub struct ModelReference {
    /// A ModelCheckpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_ref: Option<LocalObjectReference>,
    /// The result of a TrainingJob: waits until that job is complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training_job_ref: Option<LocalObjectReference>,
    /// A directory in Hugging Face layout: `pvc://claim/path`, `file:///path`, `hf://org/name[@revision]`,
    /// `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 2048),
        regex(pattern = r"^((pvc|file|s3|gs|az)://.+|hf://[^/@]+/[^/@]+(@.+)?)$")
    )]
    pub uri: Option<String>,
    /// Draw the weights from this seed in place of reading them (the directory holds config and tokenizer only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub random_seed: Option<i64>,
}

/// The claim that an object writes to.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Storage {
    /// Name of a PersistentVolumeClaim in the same namespace.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub claim_name: String,
}
