//! Desired state to Kubernetes objects: one controller per kind.
//!
//! A pass is `gather -> validate -> decide -> build -> apply -> report`. Only the first and the last two hold a client;
//! decisions and built objects are pure. A pass that finds nothing to do writes nothing.
//!
//! # Layout
//!
//! | file | what |
//! |---|---|
//! | [`mod@run`], [`config`] | the whole operator and its settings |
//! | [`dataset`], [`training_job`], [`model_checkpoint`], [`model_deployment`] | one controller each |
//! | [`attempt`] | when the pod of a run is made, replaced or given up |
//! | [`pod_view`], [`conditions`], [`model`], [`volumes`] | what a pod's status, conditions, model references and URIs say |
//! | [`worker_pod`], [`run_pod`], [`owner`] | the pod of any role, the one pod of a run, names and labels of children |
//! | [`cache`] | one watch per kind, what its copies leave out |
//! | [`triggers`], [`dependants`], [`calm`], [`controller`], [`requeue`] | who is reconciled when, and how |
//! | [`owned_pods`], [`latest`] | pods by owner and the newest copy of an object, own writes included |
//! | [`mod@apply`], [`mod@report`] | writes to the API server, the end of a pass |
//! | [`worker_client`], [`tokens`] | what is said to workers, and the tokens for it |
//! | [`leader`] | one of several operators makes passes; a deposed one writes nothing |
//! | [`context`], [`error`], [`refusal`], [`metrics`], [`http`], [`text`] | what all controllers share, one thing each |
//! | [`compute`], [`requests`] | how long passes compute, what they ask the API server for |
//! | [`crds`] | the generated definitions as YAML |

pub mod apply;
pub mod attempt;
pub mod cache;
pub mod calm;
pub mod compute;
pub mod conditions;
pub mod config;
pub mod context;
pub mod controller;
pub mod crds;
pub mod dataset;
pub mod dependants;
pub mod error;
pub mod http;
pub mod latest;
pub mod leader;
pub mod metrics;
pub mod model;
pub mod model_checkpoint;
pub mod model_deployment;
pub mod owned_pods;
pub mod owner;
pub mod pod_view;
pub mod refusal;
pub mod report;
pub mod requests;
pub mod requeue;
pub mod run;
pub mod run_pod;
pub mod text;
pub mod tokens;
pub mod training_job;
pub mod triggers;
pub mod volumes;
pub mod worker_client;
pub mod worker_pod;

#[cfg(test)]
mod passes;

pub use self::{
    config::OperatorConfig,
    error::Error,
    run::{run, run_elected},
};
