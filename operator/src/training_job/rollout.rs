//! The rollout pods of a run: which are made, which go, and what the learner is told.
//!
//! A rollout pod has a place (from 0) and a number in that place, both in its name, so making it twice is making it once. A
//! container that crashes is started again by the kubelet; a pod that is lost is replaced by the next number of its place,
//! after a delay that grows with that number. Neither restarts the learner, which asks another pod meanwhile.

use flotilla_api::{
    names::reason,
    rollout::{RolloutPod, RolloutPods},
    training_job::RolloutStatus,
};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use sha2::{Digest as _, Sha256};

use super::{decide::Decision, gather::Observed};
use crate::{
    pod_view::{Exit, PodStage, PodView},
    worker_client::address,
};

/// Delay before the second pod of a place.
const FIRST_DELAY: SignedDuration = SignedDuration::from_secs(1);
/// Longest delay between two pods of a place.
const LONGEST_DELAY: SignedDuration = SignedDuration::from_secs(60);
/// A pod that lived for so long says nothing about its successor: the delay begins anew.
const LONG_LIFE: SignedDuration = SignedDuration::from_mins(10);

/// A pod to make.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Place {
    /// Its place, from 0.
    pub index: u32,
    /// Its number in that place, from 1.
    pub attempt: u32,
}

/// One step towards the wanted rollout pods.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Fleet {
    /// How many are wanted.
    pub wanted: u32,
    /// Pods to make.
    pub create: Vec<Place>,
    /// Names and UIDs of pods to stop.
    pub remove: Vec<(String, String)>,
    /// What happened to the pods whose places are filled again.
    pub lost: Vec<String>,
    /// When the next place is to be filled.
    pub look_again: Option<Timestamp>,
}

/// Decides the step. Only a run whose learner is there, or about to be, has rollout pods; `can_make` says whether what they
/// refer to is there too.
pub fn decide(observed: &Observed, decision: &Decision, can_make: bool) -> Fleet {
    let wanted = match decision {
        Decision::Start { .. } | Decision::BackOff { .. } | Decision::Watch => observed.job.spec.roles.rollout.replicas,
        Decision::Rest { .. }
        | Decision::Expire
        | Decision::Hold(_)
        | Decision::Suspend { .. }
        | Decision::Complete(_)
        | Decision::Fail { .. } => 0,
    };
    let mut fleet = Fleet {
        wanted,
        ..Fleet::default()
    };
    for index in (0..wanted).filter(|_| can_make) {
        fill(&mut fleet, observed, index);
    }
    fleet.remove = observed
        .rollout
        .iter()
        .filter(|pod| goes(observed, pod, wanted))
        .map(identity)
        .collect();
    fleet
}

/// The newest pod of a place: they are sorted by place and attempt.
fn newest_of(observed: &Observed, index: u32) -> Option<&PodView> {
    let end = observed.rollout.partition_point(|pod| pod.index <= Some(index));
    let last = observed.rollout.get(..end)?.last()?;
    (last.index == Some(index)).then_some(last)
}

fn fill(fleet: &mut Fleet, observed: &Observed, index: u32) {
    let Some(newest) = newest_of(observed, index) else {
        return fleet.create.push(Place { index, attempt: 1 });
    };
    if newest.is_live() {
        return;
    }
    let from = may_follow(newest, observed.now);
    if from > observed.now {
        fleet.look_again = Some(fleet.look_again.map_or(from, |known| known.min(from)));
        return;
    }
    let why = newest
        .exit()
        .map_or_else(|| "it was asked to stop".to_owned(), Exit::message);
    fleet.lost.push(format!("{}: {why}", newest.name));
    fleet.create.push(Place {
        index,
        attempt: newest.attempt + 1,
    });
}

/// When the place of a pod that does not count any more may be filled. One that was asked to stop is no sign of trouble.
fn may_follow(pod: &PodView, now: Timestamp) -> Timestamp {
    let Some(exit) = pod.exit().filter(|_| !pod.terminating) else {
        return now;
    };
    let ended = exit.at.unwrap_or(pod.created);
    let lived = ended.duration_since(pod.created);
    let doublings = if lived > LONG_LIFE {
        0
    } else {
        pod.attempt.saturating_sub(1).min(6)
    };
    let delay = FIRST_DELAY
        .checked_mul(1_i32 << doublings)
        .map_or(LONGEST_DELAY, |delay| delay.min(LONGEST_DELAY));
    ended.checked_add(delay).unwrap_or(now)
}

/// Pods in places that are not wanted, and those that ended and have a successor: until then its number is read off them.
fn goes(observed: &Observed, pod: &PodView, wanted: u32) -> bool {
    let index = pod.index.unwrap_or(u32::MAX);
    let succeeded = || newest_of(observed, index).is_some_and(|newest| newest.attempt > pod.attempt);
    !pod.terminating && (index >= wanted || (pod.exit().is_some() && succeeded()))
}

fn identity(pod: &PodView) -> (String, String) {
    (pod.name.clone(), pod.uid.clone())
}

/// The end of a run whose rollout pods cannot work: one says that a new attempt would end the same way, or one crashes over
/// and over, more often than `failurePolicy.maxRestarts` allows.
pub fn failure(observed: &Observed) -> Option<Decision> {
    let limit = observed.job.spec.failure_policy.max_restarts;
    let live = || observed.rollout.iter().filter(|pod| pod.is_live() && !pod.ready);
    let crash = |pod: &PodView| pod.crash.as_ref().map(Exit::message).unwrap_or_default();
    if let Some(pod) = live().find(|pod| pod.crash.as_ref().is_some_and(Exit::is_permanent)) {
        return Some(Decision::Fail {
            reason: reason::PERMANENT_FAILURE,
            message: format!("rollout pod {}: {}", pod.name, crash(pod)),
        });
    }
    let looping = live().find(|pod| pod.crash_loops && pod.container_restarts > limit)?;
    Some(Decision::Fail {
        reason: reason::RESTART_LIMIT,
        message: format!(
            "rollout pod {} crashed {} times, more than failurePolicy.maxRestarts ({limit}) allows, last with {}",
            looping.name,
            looping.container_restarts,
            crash(looping)
        ),
    })
}

/// What a running learner is to be told: the ready pods, unless its progress shows that it knows them.
pub fn news_for_learner(observed: &Observed, decision: &Decision) -> Option<(String, RolloutPods)> {
    let separate = observed.job.spec.roles.rollout.replicas > 0 && *decision == Decision::Watch;
    let learner = observed.pod.as_ref().filter(|pod| separate && pod.is_live())?;
    let known = observed
        .live
        .as_ref()?
        .rollout
        .as_ref()
        .map(|rollout| rollout.revision.as_str());
    let pods = ready(observed);
    (known != Some(pods.revision.as_str())).then(|| learner.ip.clone().map(|ip| (ip, pods)))?
}

/// The ready rollout pods. The revision names exactly this list; a container that was started again makes another one.
fn ready(observed: &Observed) -> RolloutPods {
    let mut digest = Sha256::new();
    let mut pods = Vec::new();
    for pod in observed.rollout.iter().filter(|pod| pod.is_live() && pod.ready) {
        let Some(ip) = &pod.ip else { continue };
        digest.update(format!("{}\n{ip}\n{}\n", pod.uid, pod.container_restarts));
        pods.push(RolloutPod {
            name: pod.name.clone(),
            uid: pod.uid.clone(),
            address: address(ip),
        });
    }
    let mut revision = hex::encode(digest.finalize());
    revision.truncate(16);
    RolloutPods { revision, pods }
}

/// What the status says of the rollout pods; None for a run that samples in its learner.
pub fn status(observed: &Observed, fleet: &Fleet) -> Option<RolloutStatus> {
    if observed.job.spec.roles.rollout.replicas == 0 {
        return None;
    }
    let known = observed.status.rollout.clone().unwrap_or_default();
    let live = || {
        observed
            .rollout
            .iter()
            .filter(|pod| pod.is_live() && pod.index < Some(fleet.wanted))
    };
    let ready = u32::try_from(live().filter(|pod| pod.ready).count()).unwrap_or(u32::MAX);
    let told = observed.news().and_then(|news| news.rollout.as_ref());
    Some(RolloutStatus {
        replicas: fleet.wanted,
        ready_replicas: ready,
        ready: format!("{ready}/{}", fleet.wanted),
        restarts: known.restarts.max(restarts(observed, fleet)),
        weight_version: told.and_then(|told| told.weight_version).or(known.weight_version),
        message: live().find_map(trouble).unwrap_or_default(),
    })
}

/// Pods that took the place of another one, and containers that were started again.
fn restarts(observed: &Observed, fleet: &Fleet) -> u32 {
    let made = fleet.create.iter().map(|place| (place.index, place.attempt, 0));
    let there = observed
        .rollout
        .iter()
        .map(|pod| (pod.index.unwrap_or_default(), pod.attempt, pod.container_restarts));
    let mut newest = std::collections::BTreeMap::new();
    let mut containers = 0_u32;
    for (index, attempt, restarted) in made.chain(there) {
        let known = newest.entry(index).or_insert(attempt);
        *known = attempt.max(*known);
        containers = containers.saturating_add(restarted);
    }
    let replaced = newest.values().map(|attempt| attempt - 1);
    replaced.fold(containers, u32::saturating_add)
}

/// Why a pod is not ready, where there is something to say.
fn trouble(pod: &PodView) -> Option<String> {
    let why = match &pod.stage {
        _ if pod.ready => None,
        PodStage::Pending { message, .. } => message.clone(),
        PodStage::Running | PodStage::Exited(_) => pod.crash.as_ref().map(Exit::message),
    };
    why.map(|why| format!("{}: {why}", pod.name))
}
