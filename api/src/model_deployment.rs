//! `ModelDeployment`: a served model.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{conversion::Template, pod::PodSettings, reference::ModelReference, role::Purpose};

/// A served model.
#[derive(Clone, CustomResource, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[kube(
    group = "flotilla.dev",
    version = "v1alpha1",
    kind = "ModelDeployment",
    plural = "modeldeployments",
    shortname = "mdep",
    category = "flotilla",
    namespaced,
    cel,
    status = "ModelDeploymentStatus",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    doc = "A served model: policy, critic, or both from one copy of the weights.",
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.ready"),
    printcolumn(name = "Purpose", type_ = "string", json_path = ".spec.purpose"),
    printcolumn(name = "Checkpoint", type_ = "string", json_path = ".status.checkpoint"),
    printcolumn(name = "URL", type_ = "string", json_path = ".status.url"),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.message", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = kube::core::Rule::new("self.metadata.name.size() <= 52")
        .message("the name may have at most 52 characters: pods are named after it"),
    validation = kube::core::Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')")
        .message("the name must begin with a letter and have no dots: the Service is named after it")
)]
#[x_kube(validation = kube::core::Rule::new("!has(self.model.randomSeed)")
    .message("a ModelDeployment serves trained weights: model.randomSeed is for TrainingJobs"))]
#[serde(rename_all = "camelCase")]
pub struct ModelDeploymentSpec {
    /// The model to serve. A change replaces the pods one by one.
    pub model: ModelReference,
    /// Which endpoints are offered.
    #[serde(default)]
    pub purpose: Purpose,
    /// Pods that serve.
    #[serde(default = "default_replicas")]
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: i32,
    /// Name under which `/v1/models` lists it; the object's name if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub served_model_name: Option<String>,
    /// How a comparison becomes the user's text; `critic-short` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub critic_template: Option<Template>,
    /// Longest prompt plus completion, in tokens.
    #[serde(default = "default_max_model_len")]
    #[schemars(range(min = 1, max = 1048576))]
    pub max_model_len: i64,
    /// GPUs of a replica that share the model, each with a part of every matrix: for a model that one GPU cannot hold. Each
    /// pod needs so many (`serve.resources.limits`: `nvidia.com/gpu`). A change replaces the pods one by one.
    #[serde(default = "default_tensor_parallel")]
    #[schemars(range(min = 1, max = 8))]
    pub tensor_parallel: i32,
    /// Requests that may wait in a replica; one more is answered 429.
    #[serde(default = "default_max_queue")]
    #[schemars(range(min = 1, max = 100_000))]
    pub max_queue: i64,
    /// A replica that is not ready after so long is replaced.
    #[serde(default = "default_startup_deadline")]
    #[schemars(range(min = 1))]
    pub startup_deadline_seconds: i64,
    /// A replica that goes has so long to finish its requests.
    #[serde(default = "default_drain_timeout")]
    #[schemars(range(min = 0, max = 86400))]
    pub drain_timeout_seconds: i64,
    /// The pods.
    #[serde(default)]
    pub serve: PodSettings,
}

fn default_replicas() -> i32 {
    1
}

fn default_max_model_len() -> i64 {
    8192
}

fn default_tensor_parallel() -> i32 {
    1
}

fn default_max_queue() -> i64 {
    256
}

fn default_startup_deadline() -> i64 {
    600
}

fn default_drain_timeout() -> i64 {
    30
}

/// One word for where a deployment stands.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum DeploymentPhase {
    /// Its model is not there yet.
    #[default]
    Waiting,
    /// Replicas start or are replaced.
    Progressing,
    /// All replicas serve the model of the spec.
    Available,
    /// Replicas cannot start; `message` says why.
    Degraded,
    /// `spec.replicas` is 0.
    ScaledToZero,
}

/// What is known of a deployment.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ModelDeploymentStatus {
    /// Generation of the spec that this status is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// One word for where it stands.
    pub phase: DeploymentPhase,
    /// Why it stands there, for people.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Conditions: Ready, Available, Progressing, ModelLoaded.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// Pods that exist (for `/scale`).
    pub replicas: i32,
    /// Pods whose model is loaded and that answer.
    pub ready_replicas: i32,
    /// Pods of the current revision.
    pub updated_replicas: i32,
    /// `1/2`: ready of wanted.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub ready: String,
    /// Label selector of the pods, as text (for `/scale`).
    #[serde(skip_serializing_if = "String::is_empty")]
    pub selector: String,
    /// Hash of what the newest pods run.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub update_revision: String,
    /// ModelCheckpoint or URI that is served.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub checkpoint: String,
    /// Digest of the weights that ready pods loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_digest: Option<String>,
    /// Address of the Service inside the cluster (or the sandbox).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Failures of pods of the current revision.
    pub failures: u32,
}
