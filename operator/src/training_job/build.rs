//! What a decision writes: the learner's objects, ModelCheckpoints, and what is to go.

use flotilla_api::{ModelCheckpoint, role::RoleConfig, training_job::LastCheckpoint};

use super::{
    checkpoints::{self, Registry},
    decide::Decision,
    gather::Observed,
};
use crate::{apply::RunObjects, error::Result, pod_view::PodView, run_pod::Run};

/// Everything that one pass writes besides the status.
#[derive(Debug, Default)]
pub struct Objects {
    /// A new learner.
    pub learner: Option<Box<RunObjects>>,
    /// Checkpoints to register.
    pub register: Vec<ModelCheckpoint>,
    /// Names and UIDs of ModelCheckpoints to delete.
    pub forget: Vec<(String, String)>,
    /// The newest checkpoint.
    pub last: Option<LastCheckpoint>,
    /// Names and UIDs of pods to stop, with the grace that suspension grants.
    pub stop: Vec<(String, String)>,
    /// The job itself is to be deleted.
    pub expire: bool,
}

/// Builds what `decision` asks for; `plan` is there whenever a learner is started.
pub fn build(observed: &Observed, decision: &Decision, plan: Option<&RoleConfig>, image: &str) -> Result<Objects> {
    let Registry { register, forget, last } = checkpoints::plan(observed);
    let learner = match (decision, plan) {
        (Decision::Start { attempt, .. }, Some(config)) => Some(Box::new(learner(observed, config, *attempt, image)?)),
        _ => None,
    };
    Ok(Objects {
        learner,
        register,
        forget,
        last,
        stop: stopped(observed, decision),
        expire: *decision == Decision::Expire,
    })
}

fn learner(observed: &Observed, config: &RoleConfig, attempt: u32, image: &str) -> Result<RunObjects> {
    Run {
        owner: &observed.owner,
        names: &observed.names,
        config,
        settings: &observed.job.spec.roles.learner.pod,
        default_image: image,
        attempt,
        grace_seconds: i64::from(observed.job.spec.checkpoint.on_suspend_timeout_seconds),
    }
    .build()
}

/// The current pod when the run stops, and ended pods of older attempts (the one before the current is kept for its logs).
fn stopped(observed: &Observed, decision: &Decision) -> Vec<(String, String)> {
    let stops = matches!(
        decision,
        Decision::Suspend { stop: true } | Decision::Fail { .. } | Decision::Rest { .. }
    );
    let current = observed.pod.as_ref().filter(|pod| stops && pod.is_live());
    let old = observed
        .older
        .iter()
        .filter(|pod| !pod.terminating && pod.attempt + 1 < observed.status.attempt);
    current.into_iter().chain(old).map(identity).collect()
}

fn identity(pod: &PodView) -> (String, String) {
    (pod.name.clone(), pod.uid.clone())
}
