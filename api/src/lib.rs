//! The contract between the people who write resources, the operator that reconciles them and the worker that runs in
//! the pods.
//!
//! # Layout
//!
//! | file | what |
//! |---|---|
//! | [`training_job`], [`model_deployment`], [`model_checkpoint`], [`dataset`] | one kind each (feature `crd`) |
//! | [`crd`] | the generated definitions (feature `crd`) |
//! | [`role`] | [`role::RoleConfig`]: what the operator writes into a pod and the worker reads |
//! | [`progress`] | what a worker answers on `/progress` and leaves in its termination message |
//! | [`rollout`] | what the operator tells a learner about its rollout pods |
//! | [`algorithm`], [`reward`], [`conversion`], [`evaluation`] | the parts that specs and role configs share |
//! | [`names`] | every label, annotation, port, mount path, condition and reason |
//!
//! Without the feature `crd` this crate links no Kubernetes type: the worker reads its role and nothing else.

#![cfg_attr(
    feature = "crd",
    allow(clippy::duplicated_attributes, reason = "each printcolumn repeats the same keys")
)]

pub mod algorithm;
pub mod conversion;
pub mod evaluation;
pub mod names;
pub mod progress;
pub mod reward;
pub mod role;
pub mod rollout;

#[cfg(feature = "crd")]
pub mod crd;
#[cfg(feature = "crd")]
pub mod dataset;
#[cfg(feature = "crd")]
pub mod model_checkpoint;
#[cfg(feature = "crd")]
pub mod model_deployment;
#[cfg(feature = "crd")]
pub mod pod;
#[cfg(feature = "crd")]
pub mod reference;
#[cfg(feature = "crd")]
pub mod training_job;

#[cfg(feature = "crd")]
pub use {
    dataset::{Dataset, DatasetSpec, DatasetStatus},
    model_checkpoint::{ModelCheckpoint, ModelCheckpointSpec, ModelCheckpointStatus},
    model_deployment::{ModelDeployment, ModelDeploymentSpec, ModelDeploymentStatus},
    training_job::{TrainingJob, TrainingJobSpec, TrainingJobStatus},
};
