//! What a ModelDeployment's status says after a pass.

use flotilla_api::{
    ModelDeploymentStatus,
    model_deployment::DeploymentPhase,
    names::{condition, reason},
};

use super::{apply::Applied, build::selector, gather::Observed, rollout::Rollout, validate::Plan};
use crate::{
    conditions::Conditions,
    pod_view::{Exit, PodStage, PodView},
    refusal::Refusal,
    report::Note,
};

/// Container restarts after which a replica is said to fail rather than to start.
const PATIENCE: u32 = 3;

/// What a pass found out and did.
#[derive(Debug)]
pub struct News<'a> {
    /// What pods should run.
    pub plan: Result<&'a Plan, &'a Refusal>,
    /// What was decided.
    pub rollout: &'a Rollout,
    /// What was written.
    pub applied: &'a Applied,
    /// What a ready pod loaded, where it was asked.
    pub digest: Option<String>,
}

/// The next status and the events that the change is worth.
pub fn next_status(observed: &Observed, news: &News<'_>) -> (ModelDeploymentStatus, Vec<Note>) {
    let mut status = observed.status.clone();
    status.observed_generation = observed.deployment.metadata.generation;
    let labels = selector(&observed.owner);
    let labels: Vec<_> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    status.selector = labels.join(",");
    if news.applied.url.is_some() {
        status.url.clone_from(&news.applied.url);
    }
    if let Ok(plan) = news.plan {
        if status.update_revision != plan.revision {
            status.update_revision.clone_from(&plan.revision);
            status.model_digest = None;
        }
        status.checkpoint.clone_from(&plan.checkpoint);
    }
    if news.digest.is_some() {
        status.model_digest.clone_from(&news.digest);
    }
    count(&mut status, observed);
    judge(&mut status, observed, news);
    let notes = notes(&status, observed, news);
    (status, notes)
}

fn is_current(status: &ModelDeploymentStatus, pod: &PodView) -> bool {
    pod.revision == status.update_revision
}

fn count(status: &mut ModelDeploymentStatus, observed: &Observed) {
    let number = |count: usize| i32::try_from(count).unwrap_or(i32::MAX);
    let live = || observed.pods.iter().filter(|pod| pod.is_live());
    status.replicas = number(live().count());
    status.ready_replicas = number(live().filter(|pod| pod.ready).count());
    status.updated_replicas = number(live().filter(|pod| is_current(status, pod)).count());
    status.ready = format!("{}/{}", status.ready_replicas, observed.deployment.spec.replicas);
    status.failures = live()
        .filter(|pod| is_current(status, pod))
        .map(|pod| pod.container_restarts)
        .sum();
}

fn judge(status: &mut ModelDeploymentStatus, observed: &Observed, news: &News<'_>) {
    let wanted = observed.deployment.spec.replicas;
    let ready_current = observed
        .pods
        .iter()
        .filter(|pod| pod.is_live() && pod.ready && is_current(status, pod))
        .count();
    let settled = status.updated_replicas == wanted
        && status.replicas == wanted
        && i32::try_from(ready_current).is_ok_and(|ready| ready == wanted);
    let trouble = trouble(status, observed);
    let (phase, message) = match (news.plan, trouble) {
        (Err(refusal), _) => (DeploymentPhase::Waiting, refusal.message.clone()),
        (Ok(_), _) if wanted == 0 && status.replicas == 0 => (DeploymentPhase::ScaledToZero, String::new()),
        (Ok(_), Some(text)) => (DeploymentPhase::Degraded, text),
        (Ok(_), None) if settled => (DeploymentPhase::Available, String::new()),
        (Ok(_), None) => (DeploymentPhase::Progressing, progress(status, observed)),
    };
    status.phase = phase;
    status.message.clone_from(&message);
    let (available, loaded) = (status.ready_replicas >= wanted, ready_current > 0);
    let generation = observed.deployment.metadata.generation;
    let mut conditions = Conditions::new(&mut status.conditions, generation, observed.now);
    match news.plan {
        Ok(_) => conditions.set(condition::READY, true, "Resolved", ""),
        Err(refusal) => conditions.set(condition::READY, false, refusal.reason, &refusal.message),
    }
    let name = match phase {
        DeploymentPhase::Waiting => "Waiting",
        DeploymentPhase::Progressing => "Progressing",
        DeploymentPhase::Available => "AllReplicasReady",
        DeploymentPhase::Degraded => "ReplicasFail",
        DeploymentPhase::ScaledToZero => "ScaledToZero",
    };
    conditions.set(condition::AVAILABLE, available, name, "");
    conditions.set(
        condition::PROGRESSING,
        phase == DeploymentPhase::Progressing,
        name,
        &message,
    );
    conditions.set(
        condition::MODEL_LOADED,
        loaded,
        if loaded { "Loaded" } else { "NotLoaded" },
        "",
    );
}

/// Why replicas of the current revision cannot start, if they cannot.
fn trouble(status: &ModelDeploymentStatus, observed: &Observed) -> Option<String> {
    let mut failing = observed.pods.iter().filter(|pod| {
        let crashed = pod.crash.as_ref();
        let hopeless = crashed.is_some_and(Exit::is_permanent);
        is_current(status, pod)
            && pod.is_live()
            && !pod.ready
            && (hopeless || crashed.is_some() && pod.container_restarts >= PATIENCE)
    });
    let pod = failing.next()?;
    let message = pod.crash.as_ref().map(Exit::message).unwrap_or_default();
    Some(format!("pod {}: {message}", pod.name))
}

fn progress(status: &ModelDeploymentStatus, observed: &Observed) -> String {
    let waiting = observed.pods.iter().find_map(|pod| match &pod.stage {
        PodStage::Pending {
            message: Some(text), ..
        } if is_current(status, pod) => Some((pod, text)),
        _ => None,
    });
    match waiting {
        Some((pod, text)) => format!("pod {} waits: {text}", pod.name),
        None => format!(
            "{} of {} replicas run the newest revision, {} are ready",
            status.updated_replicas, observed.deployment.spec.replicas, status.ready_replicas
        ),
    }
}

fn notes(status: &ModelDeploymentStatus, observed: &Observed, news: &News<'_>) -> Vec<Note> {
    let mut notes = Vec::new();
    for name in &news.applied.created {
        notes.push(Note::normal(reason::PODS_CREATED, format!("pod {name} was created")).about("Pod", name));
    }
    for name in &news.rollout.late {
        let limit = observed.deployment.spec.startup_deadline_seconds;
        let text = format!("pod {name} was not ready within {limit} s");
        notes.push(Note::warning(reason::DEADLINE, text).about("Pod", name));
    }
    let before = &observed.status;
    if status.phase != before.phase {
        match status.phase {
            DeploymentPhase::Available => {
                notes.push(Note::normal(
                    "Available",
                    format!("{} serves on every replica", status.checkpoint),
                ));
            }
            DeploymentPhase::Degraded => notes.push(Note::warning("ReplicasFail", &status.message)),
            DeploymentPhase::Waiting | DeploymentPhase::Progressing | DeploymentPhase::ScaledToZero => {}
        }
    }
    notes
}
