//! Which pods are made and which go: a new one is ready before an old one goes, and at most one is in excess.

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::pod_view::{Exit, PodStage, PodView};

/// Pods beyond `replicas` while they are replaced.
const SURGE: usize = 1;

/// What the pods move towards.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// How many.
    pub replicas: usize,
    /// What they run.
    pub revision: &'a str,
    /// Stem of their names.
    pub stem: &'a str,
    /// Seconds that a pod has to become ready.
    pub startup_deadline: i64,
    /// The time of this pass.
    pub now: Timestamp,
}

/// One step of the move.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Rollout {
    /// Names of pods to make.
    pub create: Vec<String>,
    /// Names and UIDs of pods to stop, with their grace period.
    pub remove: Vec<(String, String)>,
    /// Names of those among them that were not ready in time.
    pub late: Vec<String>,
    /// When the next pod runs out of time to become ready.
    pub look_again: Option<Timestamp>,
}

impl Rollout {
    /// Stops every pod.
    pub fn nothing_but(pods: &[PodView]) -> Self {
        Self {
            remove: pods.iter().filter(|pod| !pod.terminating).map(identity).collect(),
            ..Self::default()
        }
    }

    fn removes(&self, pod: &PodView) -> bool {
        self.remove.iter().any(|(name, _)| *name == pod.name)
    }
}

/// Decides the next step. `pods` are all pods of the deployment, oldest first.
pub fn decide(wanted: &Wanted<'_>, pods: &[PodView]) -> Rollout {
    if wanted.replicas == 0 {
        return Rollout::nothing_but(pods);
    }
    let mut step = Rollout::default();
    clear_away(&mut step, wanted, pods);
    let live = |step: &Rollout| {
        pods.iter()
            .filter(|pod| pod.is_live() && !step.removes(pod))
            .collect::<Vec<_>>()
    };
    let (current, old): (Vec<_>, Vec<_>) = live(&step).into_iter().partition(|pod| pod.revision == wanted.revision);
    shrink(&mut step, wanted.replicas, &current);
    retire(&mut step, wanted.replicas, &current, &old);
    let remaining = live(&step).len();
    grow(&mut step, wanted, pods, current.len(), remaining);
    step
}

/// Pods that ended, and pods of the current revision that were not ready in time, make room for others.
fn clear_away(step: &mut Rollout, wanted: &Wanted<'_>, pods: &[PodView]) {
    for pod in pods.iter().filter(|pod| !pod.terminating) {
        if matches!(pod.stage, PodStage::Exited(_)) {
            step.remove.push(identity(pod));
            continue;
        }
        // Weights that do not match their digest will not match in another pod either.
        let hopeless = pod.crash.as_ref().is_some_and(Exit::is_permanent);
        if pod.ready || hopeless || pod.revision != wanted.revision {
            continue;
        }
        let since = pod.ready_since.map_or(pod.created, |since| since.max(pod.created));
        let Ok(due) = since.checked_add(SignedDuration::from_secs(wanted.startup_deadline)) else {
            continue;
        };
        if due <= wanted.now {
            step.remove.push(identity(pod));
            step.late.push(pod.name.clone());
        } else {
            step.look_again = Some(step.look_again.map_or(due, |known| known.min(due)));
        }
    }
}

/// Pods of the current revision beyond the wanted number: those that do not serve first, then the newest.
fn shrink(step: &mut Rollout, replicas: usize, current: &[&PodView]) {
    let mut order: Vec<_> = current.to_vec();
    order.sort_by_key(|pod| (pod.ready, std::cmp::Reverse(pod.created)));
    let excess = current.len().saturating_sub(replicas);
    step.remove.extend(order.into_iter().take(excess).map(identity));
}

/// Pods of older revisions: those that do not serve at once, the others as far as enough serve without them.
fn retire(step: &mut Rollout, replicas: usize, current: &[&PodView], old: &[&PodView]) {
    let (serving, idle): (Vec<&PodView>, Vec<&PodView>) = old.iter().partition(|pod| pod.ready);
    step.remove.extend(idle.into_iter().map(identity));
    let ready = current.iter().filter(|pod| pod.ready).count().min(replicas) + serving.len();
    let spare = ready.saturating_sub(replicas);
    step.remove.extend(serving.into_iter().take(spare).map(identity));
}

fn grow(step: &mut Rollout, wanted: &Wanted<'_>, pods: &[PodView], current: usize, live: usize) {
    let missing = wanted.replicas.saturating_sub(current);
    let room = (wanted.replicas + SURGE).saturating_sub(live);
    let name = |number: usize| format!("{}-{}-{number}", wanted.stem, wanted.revision);
    // Names of pods that still end are taken.
    let free = (0..).map(name).filter(|name| pods.iter().all(|pod| pod.name != *name));
    step.create.extend(free.take(missing.min(room)));
}

fn identity(pod: &PodView) -> (String, String) {
    (pod.name.clone(), pod.uid.clone())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("in range")
    }

    fn wanted(replicas: usize, now: i64) -> Wanted<'static> {
        Wanted {
            replicas,
            revision: "new",
            stem: "critic-serve",
            startup_deadline: 600,
            now: at(now),
        }
    }

    fn pod(revision: &str, number: usize, ready: bool) -> PodView {
        PodView {
            name: format!("critic-serve-{revision}-{number}"),
            uid: format!("{revision}{number}"),
            attempt: 0,
            index: None,
            revision: revision.into(),
            ip: None,
            created: at(i64::try_from(number).expect("small")),
            terminating: false,
            ready,
            ready_since: None,
            container_restarts: 0,
            crash_loops: false,
            stage: PodStage::Running,
            crash: None,
        }
    }

    fn crash(code: i32) -> Exit {
        Exit {
            code: Some(code),
            disrupted: false,
            at: None,
            progress: None,
            reason: String::new(),
        }
    }

    fn removed(step: &Rollout) -> Vec<&str> {
        step.remove.iter().map(|(name, _)| name.as_str()).collect()
    }

    #[test]
    fn a_new_deployment_starts_all_replicas_at_once() {
        let step = decide(&wanted(2, 0), &[]);
        assert_eq!(step.create, ["critic-serve-new-0", "critic-serve-new-1"]);
    }

    #[test]
    fn an_old_pod_goes_only_when_its_successor_is_ready() {
        let old = pod("old", 0, true);
        let step = decide(&wanted(1, 0), std::slice::from_ref(&old));
        assert_eq!((step.create.len(), step.remove.len()), (1, 0));
        let step = decide(&wanted(1, 0), &[old.clone(), pod("new", 0, false)]);
        assert_eq!((step.create.len(), step.remove.len()), (0, 0));
        let step = decide(&wanted(1, 0), &[old, pod("new", 0, true)]);
        assert_eq!(removed(&step), ["critic-serve-old-0"]);
    }

    #[test]
    fn an_old_pod_that_does_not_serve_goes_at_once() {
        let step = decide(&wanted(1, 0), &[pod("old", 0, false)]);
        assert_eq!((removed(&step), step.create.len()), (vec!["critic-serve-old-0"], 1));
    }

    #[test]
    fn scaling_in_takes_the_newest_and_those_that_do_not_serve_first() {
        let pods = [pod("new", 0, true), pod("new", 1, false), pod("new", 2, true)];
        assert_eq!(
            removed(&decide(&wanted(1, 0), &pods)),
            ["critic-serve-new-1", "critic-serve-new-2"]
        );
        assert_eq!(decide(&wanted(0, 0), &pods).remove.len(), 3);
    }

    #[test]
    fn a_replica_that_is_not_ready_in_time_is_replaced() {
        let step = decide(&wanted(1, 600), &[pod("new", 0, false)]);
        assert_eq!(step.late, ["critic-serve-new-0"]);
        assert_eq!(step.create, ["critic-serve-new-1"]);
        assert_eq!(
            decide(&wanted(1, 599), &[pod("new", 0, false)]).look_again,
            Some(at(600))
        );
    }

    #[test]
    fn a_replica_whose_weights_are_wrong_is_not_replaced_over_and_over() {
        let hopeless = PodView {
            crash: Some(crash(78)),
            ..pod("new", 0, false)
        };
        assert_eq!(decide(&wanted(1, 9999), &[hopeless]), Rollout::default());
    }

    #[test]
    fn an_evicted_replica_is_replaced_under_another_name() {
        let evicted = PodView {
            stage: PodStage::Exited(crash(137)),
            ..pod("new", 0, false)
        };
        let step = decide(&wanted(1, 0), &[evicted]);
        assert_eq!(removed(&step), ["critic-serve-new-0"]);
        assert_eq!(step.create, ["critic-serve-new-1"]);
    }

    fn any_pods() -> impl Strategy<Value = Vec<PodView>> {
        let drawn = (any::<bool>(), any::<bool>(), any::<bool>(), 0_u8..8);
        proptest::collection::vec(drawn, 0..8).prop_map(|pods| {
            let view = |(number, (new, ready, terminating, kind)): (usize, (bool, bool, bool, u8))| {
                let mut view = pod(if new { "new" } else { "old" }, number, ready && kind > 1);
                view.terminating = terminating;
                if kind == 0 {
                    view.stage = PodStage::Exited(crash(137));
                }
                view
            };
            pods.into_iter().enumerate().map(view).collect()
        })
    }

    proptest! {
        #[test]
        fn a_step_never_takes_away_service_and_never_exceeds_the_surge(pods in any_pods(), replicas in 0_usize..5) {
            let step = decide(&wanted(replicas, 0), &pods);
            let left = |pod: &&PodView| pod.is_live() && !step.removes(pod);
            let ready = |pod: &&PodView| pod.is_live() && pod.ready;
            let (before, after) = (pods.iter().filter(ready).count(), pods.iter().filter(left).filter(|pod| pod.ready).count());
            prop_assert!(after >= before.min(replicas), "{before} served, {after} do, {replicas} are wanted");
            let live = pods.iter().filter(left).count();
            prop_assert!(step.create.is_empty() || live + step.create.len() <= replicas + SURGE);
            prop_assert!(step.create.iter().all(|name| pods.iter().all(|pod| pod.name != *name)));
        }

        #[test]
        fn steps_lead_to_the_wanted_pods_and_stop_there(pods in any_pods(), replicas in 0_usize..5) {
            let mut pods = pods;
            for round in 0..40 {
                pods.retain(|pod| !pod.terminating);
                let step = decide(&wanted(replicas, 0), &pods);
                let waits = pods.iter().any(|pod| !pod.ready);
                if step.create.is_empty() && step.remove.is_empty() && !waits {
                    prop_assert_eq!(pods.len(), replicas);
                    prop_assert!(pods.iter().all(|pod| pod.revision == "new" && pod.is_live()));
                    return Ok(());
                }
                for pod in &mut pods {
                    pod.terminating |= step.removes(pod);
                    pod.ready |= pod.is_live();
                }
                for (number, name) in step.create.into_iter().enumerate() {
                    pods.push(PodView { name, ..pod("new", 100 + round * 10 + number, true) });
                }
            }
            prop_assert!(false, "it never stops");
        }
    }
}
