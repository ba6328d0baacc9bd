//! `Dataset`: an immutable revision of data, converted into verifiable rows.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{conversion::Conversion, pod::PodSettings, progress::ConversionReport, reference::Storage};

/// An immutable revision of data.
#[derive(Clone, CustomResource, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[kube(
    group = "flotilla.dev",
    version = "v1alpha1",
    kind = "Dataset",
    plural = "datasets",
    shortname = "dset",
    category = "flotilla",
    namespaced,
    cel,
    status = "DatasetStatus",
    doc = "An immutable revision of data: where the rows come from and how they become verifiable signals.",
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Rows", type_ = "integer", json_path = ".status.report.rowsOut"),
    printcolumn(name = "Bad", type_ = "integer", json_path = ".status.report.badRecords"),
    printcolumn(name = "Images", type_ = "integer", json_path = ".status.report.images", priority = 1),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.message", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = kube::core::Rule::new("self.metadata.name.size() <= 52")
        .message("the name may have at most 52 characters: pods are named after it")
)]
#[serde(rename_all = "camelCase")]
pub struct DatasetSpec {
    /// Where the rows come from. Immutable.
    #[x_kube(validation = kube::core::Rule::new("self == oldSelf").message("source is immutable: make a new Dataset"))]
    pub source: DataSource,
    /// How rows are converted. Immutable.
    #[x_kube(validation = kube::core::Rule::new("self == oldSelf").message("conversion is immutable: make a new Dataset"))]
    pub conversion: Conversion,
    /// The claim that receives the canonical rows. Immutable.
    #[x_kube(validation = kube::core::Rule::new("self == oldSelf").message("storage is immutable: make a new Dataset"))]
    pub storage: Storage,
    /// Lost conversion pods before the Dataset fails.
    #[serde(default = "default_max_restarts")]
    pub max_restarts: u32,
    /// The conversion pod.
    #[serde(default)]
    pub prepare: PodSettings,
}

fn default_max_restarts() -> u32 {
    3
}

/// Where rows come from.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DataSource {
    /// A parquet or JSONL file, or a directory of them: `pvc://claim/path` or `file:///path`.
    #[schemars(length(max = 2048), regex(pattern = r"^(pvc|file)://.+"))]
    pub uri: String,
}

/// One word for where a Dataset stands.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum DatasetPhase {
    /// Its pod has not begun.
    #[default]
    Pending,
    /// Rows are being converted.
    Preparing,
    /// The canonical rows can be used. Final.
    Ready,
    /// The rows cannot be used. Final.
    Failed,
}

/// What is known of a Dataset.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DatasetStatus {
    /// Generation of the spec that this status is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// One word for where it stands.
    pub phase: DatasetPhase,
    /// Why it stands there, for people; for too many bad rows it names the first.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Conditions: Ready, Failed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// When it became Ready or Failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// Conversion pods that failed and were replaced.
    pub restarts: u32,
    /// Number of the current pod; pods of other attempts do not count.
    pub attempt: u32,
    /// What the conversion counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<ConversionReport>,
}
