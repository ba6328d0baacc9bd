//! `TrainingJob`: one run.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    algorithm::Algorithm,
    evaluation::{Guard, Score},
    pod::PodSettings,
    reference::{LocalObjectReference, ModelReference, Storage},
    reward::Reward,
    role::Precision,
};

/// One run: base model, datasets, rewards, algorithm, checkpoints.
#[derive(Clone, CustomResource, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[kube(
    group = "flotilla.dev",
    version = "v1alpha1",
    kind = "TrainingJob",
    plural = "trainingjobs",
    shortname = "tj",
    category = "flotilla",
    namespaced,
    cel,
    status = "TrainingJobStatus",
    doc = "One training run: a base model, datasets, rewards and an algorithm (exactly one of grpo and sft).",
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Step", type_ = "string", json_path = ".status.progress.steps"),
    printcolumn(name = "Reward", type_ = "string", json_path = ".status.progress.reward"),
    printcolumn(name = "Accuracy", type_ = "string", json_path = ".status.progress.accuracy",
        description = "Accuracy of the first evaluation set, held out"),
    printcolumn(name = "ETA", type_ = "string", json_path = ".status.progress.eta"),
    printcolumn(name = "Checkpoint", type_ = "string", json_path = ".status.lastCheckpoint.name"),
    printcolumn(name = "Restarts", type_ = "integer", json_path = ".status.restarts", priority = 1),
    printcolumn(name = "Rollout", type_ = "string", json_path = ".status.rollout.ready", priority = 1,
        description = "Rollout pods that are ready, of those wanted; empty where rollouts are colocated"),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.message", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = kube::core::Rule::new("self.metadata.name.size() <= 52")
        .message("the name may have at most 52 characters: pods and checkpoints are named after it")
)]
#[x_kube(validation = kube::core::Rule::new("!has(self.algorithm.grpo) || (has(self.rewards) && self.rewards.size() > 0)")
    .message("grpo needs at least one reward"))]
#[x_kube(validation = kube::core::Rule::new("!has(self.algorithm.sft) || !has(self.rewards) || self.rewards.size() == 0")
    .message("sft takes no rewards"))]
#[x_kube(validation = kube::core::Rule::new("has(self.rewards) == has(oldSelf.rewards)")
    .message("rewards is immutable"))]
#[x_kube(validation = kube::core::Rule::new("!has(self.algorithm.grpo) || !has(self.model.randomSeed)")
    .message("grpo needs trained weights: model.randomSeed is for sft"))]
#[x_kube(validation = kube::core::Rule::new(
    "!has(self.evaluation) || !has(self.evaluation.guard) || self.evaluation.sets.exists(s, s.name == self.evaluation.guard.set)")
    .message("evaluation.guard.set must be the name of one of evaluation.sets"))]
#[x_kube(validation = kube::core::Rule::new(
    "!has(self.algorithm.sft) || !has(self.roles) || !has(self.roles.rollout) || !has(self.roles.rollout.replicas) || self.roles.rollout.replicas == 0")
    .message("sft samples nothing: roles.rollout.replicas is for grpo"))]
#[x_kube(validation = kube::core::Rule::new(
    "(has(self.roles) && has(self.roles.rollout) && has(self.roles.rollout.replicas) && self.roles.rollout.replicas > 0) == \
     (has(oldSelf.roles) && has(oldSelf.roles.rollout) && has(oldSelf.roles.rollout.replicas) && oldSelf.roles.rollout.replicas > 0)")
    .message("roles.rollout.replicas may change, but not between none and some: that decides where rollouts run"))]
#[serde(rename_all = "camelCase")]
pub struct TrainingJobSpec {
    /// Stop the run after a checkpoint and free its pods; unset to continue.
    #[serde(default)]
    pub suspend: bool,
    /// The weights to begin with; for grpo also the frozen reference. Immutable.
    #[x_kube(validation = kube::core::Rule::new("self == oldSelf").message("model is immutable"))]
    pub model: ModelReference,
    /// Datasets to train on. Immutable.
    #[x_kube(validation = kube::core::Rule::new("self == oldSelf").message("datasets is immutable"))]
    #[schemars(length(min = 1, max = 16))]
    pub datasets: Vec<TrainingDataset>,
    /// How the weights change: exactly one of grpo and sft. Immutable.
    #[x_kube(validation = kube::core::Rule::new("self == oldSelf").message("algorithm is immutable"))]
    pub algorithm: Algorithm,
    /// Terms of the reward (grpo), summed by weight. Immutable.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(validation = kube::core::Rule::new("self == oldSelf").message("rewards is immutable"))]
    #[schemars(length(max = 8))]
    pub rewards: Vec<Reward>,
    /// Held-out measurements during the run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluation: Option<EvaluationPlan>,
    /// Seed of every draw of the run: the same seed gives the same run on the CPU. Immutable.
    #[serde(default)]
    #[x_kube(validation = kube::core::Rule::new("self == oldSelf").message("seed is immutable"))]
    #[schemars(range(min = 0))]
    pub seed: i64,
    /// Precision of weights and gradients. Immutable.
    #[serde(default)]
    #[x_kube(validation = kube::core::Rule::new("self == oldSelf").message("precision is immutable"))]
    pub precision: TrainingPrecision,
    /// What is written, where, and how much of it is kept.
    pub checkpoint: CheckpointPolicy,
    /// When to try again and when to give up.
    #[serde(default)]
    pub failure_policy: FailurePolicy,
    /// Pods by role.
    #[serde(default)]
    pub roles: Roles,
    /// The run fails when it has been active for so long (waiting and suspension do not count).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub active_deadline_seconds: Option<i64>,
    /// The object is deleted so long after `status.completionTime`. Checkpoints stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub ttl_seconds_after_finished: Option<i64>,
}

/// Precision of weights and gradients: `Auto` is that of the model's files on a GPU, and F32 on a CPU. BF16 has no second copy of
/// the weights, rounds updates stochastically, and is trained in on a GPU only.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum TrainingPrecision {
    /// That of the model's files on a GPU (BF16 for files in 16 bits), F32 on a CPU.
    #[default]
    Auto,
    /// 32 bits.
    F32,
    /// 16 bits, rounded stochastically.
    BF16,
}

impl TrainingPrecision {
    /// As a worker is told; None where it decides.
    pub fn dtype(self) -> Option<Precision> {
        match self {
            Self::Auto => None,
            Self::F32 => Some(Precision::F32),
            Self::BF16 => Some(Precision::Bf16),
        }
    }
}

/// A dataset to train on.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TrainingDataset {
    /// The Dataset.
    pub dataset_ref: LocalObjectReference,
}

/// Held-out measurements during a run.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EvaluationPlan {
    /// Measure after each so many steps; 0: only before the first and after the last.
    #[serde(default)]
    pub every_steps: u32,
    /// What to measure. The first set is the one that `kubectl get` shows.
    #[schemars(length(min = 1, max = 16))]
    pub sets: Vec<EvaluationSet>,
    /// Stop before a second ability is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guard: Option<Guard>,
}

/// A held-out set.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EvaluationSet {
    /// Name under which its scores are reported, for example `critic`.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    /// A Dataset whose format is preference or exactMatch.
    pub dataset_ref: LocalObjectReference,
    /// Use only the first rows (0: all).
    #[serde(default)]
    pub max_rows: u32,
}

/// What is written, where, and how much of it is kept.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointPolicy {
    /// The claim that receives checkpoints, metrics and the plot.
    pub storage: Storage,
    /// Write after each so many steps (0: only the last).
    #[serde(default = "default_every")]
    pub every_steps: u32,
    /// Checkpoints kept; the last one always is.
    #[serde(default = "default_keep")]
    #[schemars(range(min = 1, max = 1000))]
    pub keep_last: u32,
    /// Seconds that a suspended or deleted run has to write a checkpoint before its pods are killed.
    #[serde(default = "default_on_suspend")]
    #[schemars(range(min = 0, max = 86400))]
    pub on_suspend_timeout_seconds: u32,
}

fn default_every() -> u32 {
    10
}

fn default_keep() -> u32 {
    3
}

fn default_on_suspend() -> u32 {
    60
}

/// When to try again and when to give up. Suspension, eviction and preemption are no failures.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FailurePolicy {
    /// Lost pods before the run fails.
    pub max_restarts: u32,
}

impl Default for FailurePolicy {
    fn default() -> Self {
        Self { max_restarts: 6 }
    }
}

/// Pods by role.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Roles {
    /// The pod that trains. Without rollout pods it samples too (colocated).
    pub learner: Learner,
    /// Pods that sample for the learner (grpo).
    pub rollout: Rollout,
}

/// Pods that sample completions with the learner's newest weights. A lost one is replaced and never restarts the learner.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Rollout {
    /// How many; 0: the learner samples in its own process. May be changed while the run goes on, but not from or to 0.
    #[schemars(range(min = 0, max = 1024))]
    pub replicas: u32,
    /// Threads that share a pod's prompts on the CPU.
    #[schemars(range(min = 1, max = 256))]
    pub threads: u32,
    /// Image, resources and overrides.
    pub pod: PodSettings,
}

impl Default for Rollout {
    fn default() -> Self {
        Self {
            replicas: 0,
            threads: 2,
            pod: PodSettings::default(),
        }
    }
}

/// The pod that trains.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Learner {
    /// Threads that share a batch on the CPU.
    #[schemars(range(min = 1, max = 256))]
    pub threads: u32,
    /// Image, resources and overrides.
    pub pod: PodSettings,
}

impl Default for Learner {
    fn default() -> Self {
        Self {
            threads: 2,
            pod: PodSettings::default(),
        }
    }
}

/// One word for where a run stands; conditions say why.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum TrainingPhase {
    /// Something it refers to is not there yet.
    #[default]
    Waiting,
    /// Its pods have no node yet or load the model.
    Starting,
    /// It trains.
    Running,
    /// It was suspended and saves its state.
    Suspending,
    /// It was suspended.
    Suspended,
    /// A pod was lost; a new one continues.
    Restarting,
    /// It reached its goal. Final.
    Complete,
    /// It cannot reach its goal. Final.
    Failed,
}

/// What is known of a run.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TrainingJobStatus {
    /// Generation of the spec that this status is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// One word for where it stands.
    pub phase: TrainingPhase,
    /// Why it stands there, for people.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Conditions: Ready, Suspended, PodsScheduled, ModelLoaded, Running, Complete, Failed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// When its first pod was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When it became Complete or Failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// Learner pods that failed and were replaced.
    pub restarts: u32,
    /// Number of the current learner pod; pods of other attempts do not count.
    pub attempt: u32,
    /// The rollout pods; absent where rollouts are colocated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutStatus>,
    /// How far it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<TrainingProgress>,
    /// Scores of the model that the run began with, by set.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub initial_scores: Vec<Score>,
    /// Newest scores, by set.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub scores: Vec<Score>,
    /// Newest stable checkpoint; the run's result once it is complete.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_checkpoint: Option<LastCheckpoint>,
}

/// What is known of a run's rollout pods.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RolloutStatus {
    /// Pods that are wanted now: none while the run waits, is suspended or finished.
    pub replicas: u32,
    /// Pods whose model is loaded and that answer.
    pub ready_replicas: u32,
    /// `2/3`: ready of wanted.
    pub ready: String,
    /// Pods that were lost and replaced, and containers that the kubelet restarted. The learner goes on meanwhile.
    pub restarts: u32,
    /// Step after which the weights of the newest samples were made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_version: Option<u32>,
    /// Why pods are missing, for people.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// How far a run is. The texts are what `kubectl get` prints.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TrainingProgress {
    /// Steps done.
    pub step: u32,
    /// Steps of the whole run.
    pub total_steps: u32,
    /// `40/80`.
    pub steps: String,
    /// Mean reward of the newest step (grpo), `0.91`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reward: Option<String>,
    /// Newest loss, `0.1234`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<String>,
    /// Newest accuracy of the first evaluation set, `93.1%`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<String>,
    /// Mean k3 KL estimate against the reference at the newest step (grpo), `0.0213`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl: Option<String>,
    /// Time until the goal at the present pace, `2m10s`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta: Option<String>,
    /// When the numbers last changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_update_time: Option<Time>,
}

/// A stable checkpoint.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LastCheckpoint {
    /// Name of its ModelCheckpoint.
    pub name: String,
    /// Step after which it was written.
    pub step: u32,
    /// `sha256:<hex>` of its manifest.
    pub digest: String,
}
