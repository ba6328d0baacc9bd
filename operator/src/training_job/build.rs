//! What a decision writes: pods and what they mount, ModelCheckpoints, and what is to go.

use flotilla_api::{ModelCheckpoint, rollout::RolloutPods, training_job::LastCheckpoint};

use super::{
    checkpoints::{self, Registry},
    decide::Decision,
    gather::Observed,
    rollout::{self, Fleet, Place},
    validate::Plan,
};
use crate::{
    apply::RunObjects,
    error::{Error, Result},
    pod_view::PodView,
    run_pod::Run,
    worker_pod::{WorkerPod, config_map},
};

/// Seconds that a rollout pod has to stop; it keeps nothing, and what it was asked for another one is asked for.
const ROLLOUT_GRACE_SECONDS: i64 = 5;

/// Everything that one pass writes besides the status.
#[derive(Debug, Default)]
pub struct Objects {
    /// New pods: learner and rollout pods together.
    pub pods: RunObjects,
    /// Checkpoints to register.
    pub register: Vec<ModelCheckpoint>,
    /// Names and UIDs of ModelCheckpoints to delete.
    pub forget: Vec<(String, String)>,
    /// The newest checkpoint.
    pub last: Option<LastCheckpoint>,
    /// Names and UIDs of pods to stop, with the grace that suspension grants.
    pub stop: Vec<(String, String)>,
    /// Rollout pods to stop at once, by name and UID.
    pub release: Vec<(String, String)>,
    /// What the learner at this address is to know about its rollout pods.
    pub tell: Option<(String, RolloutPods)>,
    /// The job itself is to be deleted.
    pub expire: bool,
}

/// Builds what `decision` asks for; `plan` is there whenever a learner is started.
pub fn build(
    observed: &Observed,
    decision: &Decision,
    fleet: &Fleet,
    plan: Option<&Plan>,
    image: &str,
) -> Result<Objects> {
    let Registry { register, forget, last } = checkpoints::plan(observed);
    let mut pods = match (decision, plan) {
        (Decision::Start { attempt, .. }, Some(plan)) => learner(observed, plan, *attempt, image)?,
        _ => RunObjects::default(),
    };
    if let Some(plan) = plan {
        add_rollout(&mut pods, observed, plan, &fleet.create, image)?;
    }
    Ok(Objects {
        pods,
        register,
        forget,
        last,
        stop: stopped(observed, decision),
        release: fleet.remove.clone(),
        tell: rollout::news_for_learner(observed, decision),
        expire: *decision == Decision::Expire,
    })
}

fn learner(observed: &Observed, plan: &Plan, attempt: u32, image: &str) -> Result<RunObjects> {
    Run {
        owner: &observed.owner,
        names: &observed.names,
        config: &plan.learner,
        settings: &observed.job.spec.roles.learner.pod,
        default_image: image,
        attempt,
        grace_seconds: i64::from(observed.job.spec.checkpoint.on_suspend_timeout_seconds),
    }
    .build()
}

/// Rollout pods share one role and the learner's token: what a pod of many mounts is made once.
fn add_rollout(
    objects: &mut RunObjects,
    observed: &Observed,
    plan: &Plan,
    places: &[Place],
    image: &str,
) -> Result<()> {
    let Some(config) = plan.rollout.as_ref().filter(|_| !places.is_empty()) else {
        return Ok(());
    };
    let (owner, names) = (&observed.owner, &observed.rollout_names);
    let (role, token) = (names.config_map(), observed.names.token());
    for place in places {
        let pod = WorkerPod {
            owner,
            name: names.member(place.index, place.attempt),
            config,
            config_map: &role,
            token: &token,
            settings: &observed.job.spec.roles.rollout.pod,
            default_image: image,
            attempt: Some(place.attempt),
            index: Some(place.index),
            revision: None,
            grace_seconds: ROLLOUT_GRACE_SECONDS,
        };
        objects.pods.push(pod.build()?);
    }
    let what = format!("the role of {role}");
    let config_map = config_map(owner, role, config).map_err(|source| Error::Serialize { what, source })?;
    objects.config_maps.push(config_map);
    Ok(())
}

/// The current pod when the run stops, with one that was made after it and is not in the status yet, and ended pods of older
/// attempts (the one before the current is kept for its logs).
fn stopped(observed: &Observed, decision: &Decision) -> Vec<(String, String)> {
    let stops = matches!(
        decision,
        Decision::Suspend { stop: true } | Decision::Fail { .. } | Decision::Rest { .. }
    );
    let current = observed.pod.as_ref().filter(|pod| stops && pod.is_live());
    let attempt = observed.status.attempt;
    let rests = stops || matches!(decision, Decision::Suspend { .. });
    let old = observed
        .others
        .iter()
        .filter(|pod| !pod.terminating && pod.attempt + 1 < attempt);
    let next = observed
        .others
        .iter()
        .filter(|pod| rests && pod.attempt > attempt && pod.is_live());
    current.into_iter().chain(old).chain(next).map(identity).collect()
}

fn identity(pod: &PodView) -> (String, String) {
    (pod.name.clone(), pod.uid.clone())
}
