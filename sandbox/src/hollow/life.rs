//! What a hollow pod does next, from what the API shows of it.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, PodStatus};

use super::Life;
use crate::node::{restart::RestartPolicy, status};

/// Annotation with the seconds after which this pod finishes.
pub const RUN_FOR_ANNOTATION: &str = "hollow.sandbox.flotilla.dev/run-for";
/// Environment variable of any container with the same, for pods whose annotations somebody else writes.
pub const RUN_FOR_ENV: &str = "HOLLOW_RUN_FOR";

/// The next thing that happens to a pod.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// Its containers begin.
    Run,
    /// Its containers reach their goal.
    Finish,
    /// Its containers end because it is deleted.
    Stop,
    /// It goes from the API.
    Remove,
    /// Nothing, until `Some` time or for good.
    Rest(Option<Timestamp>),
}

/// What `pod` does next.
pub fn next(pod: &Pod, life: &Life, now: Timestamp) -> Step {
    let running = running_since(pod);
    if pod.metadata.deletion_timestamp.is_some() {
        return if running.is_some() { Step::Stop } else { Step::Remove };
    }
    if status::terminal_phase(pod).is_some() {
        return Step::Rest(None);
    }
    let Some(since) = running else { return Step::Run };
    if status::restart_policy(pod) == RestartPolicy::Always {
        return Step::Rest(None);
    }
    let length = run_for(pod)
        .or(life.run_for)
        .and_then(|length| SignedDuration::try_from(length).ok());
    match length.and_then(|length| since.checked_add(length).ok()) {
        Some(end) if end <= now => Step::Finish,
        end => Step::Rest(end),
    }
}

/// When the running containers of `pod` began; None where none runs.
pub fn running_since(pod: &Pod) -> Option<Timestamp> {
    let statuses = pod
        .status
        .as_ref()
        .and_then(|status| status.container_statuses.as_ref());
    let states = statuses
        .into_iter()
        .flatten()
        .filter_map(|status| status.state.as_ref());
    states
        .filter_map(|state| state.running.as_ref())
        .find_map(|running| running.started_at.as_ref().map(|time| time.0))
}

/// What the pod itself says about its length; an unreadable value counts as none.
fn run_for(pod: &Pod) -> Option<Duration> {
    let annotation = pod
        .metadata
        .annotations
        .as_ref()
        .and_then(|annotations| annotations.get(RUN_FOR_ANNOTATION));
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let mut variables = containers.flat_map(|container| container.env.iter().flatten());
    let text = annotation.or_else(|| {
        variables
            .find(|variable| variable.name == RUN_FOR_ENV)
            .and_then(|variable| variable.value.as_ref())
    })?;
    let seconds = text.trim().parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}

/// Drops what no step reads, so that a fleet of many pods stays small.
pub fn slim(pod: &mut Pod) {
    pod.metadata.managed_fields = None;
    pod.metadata.labels = None;
    pod.metadata.owner_references = None;
    if let Some(spec) = &mut pod.spec {
        let containers = spec.containers.iter_mut();
        for container in containers.chain(spec.init_containers.iter_mut().flatten()) {
            let mut kept = std::mem::take(container);
            container.name = kept.name;
            container.image = kept.image;
            container.resources = kept.resources.take();
            container.env = kept.env.take().map(|mut env| {
                env.retain(|variable| variable.name == RUN_FOR_ENV);
                env
            });
        }
        spec.volumes = None;
        spec.tolerations = None;
        spec.affinity = None;
        spec.security_context = None;
    }
    if let Some(status) = &mut pod.status {
        *status = PodStatus {
            phase: status.phase.take(),
            conditions: status.conditions.take(),
            container_statuses: status.container_statuses.take(),
            init_container_statuses: status.init_container_statuses.take(),
            qos_class: status.qos_class.take(),
            start_time: status.start_time.take(),
            reason: status.reason.take(),
            message: status.message.take(),
            ..PodStatus::default()
        };
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const BEGUN: &str = "2026-01-01T00:00:00Z";

    fn at(seconds: i64) -> Timestamp {
        let begun: Timestamp = BEGUN.parse().unwrap();
        begun + SignedDuration::from_secs(seconds)
    }

    fn pod(metadata: &Value, policy: &str, status: &Value) -> Pod {
        let env = json!([{"name": RUN_FOR_ENV, "value": "60"}, {"name": "HOME", "value": "/"}]);
        let spec = json!({"restartPolicy": policy, "containers": [{"name": "c", "image": "i", "env": env}]});
        serde_json::from_value(json!({"metadata": metadata, "spec": spec, "status": status})).unwrap()
    }

    fn running() -> Value {
        json!({"phase": "Running", "containerStatuses": [{"name": "c", "image": "i", "imageID": "i", "ready": true,
            "restartCount": 0, "state": {"running": {"startedAt": BEGUN}}}]})
    }

    #[test]
    fn a_pod_runs_until_its_time_is_over() {
        let life = Life::default();
        assert_eq!(next(&pod(&json!({}), "Never", &json!({})), &life, at(0)), Step::Run);
        let running = pod(&json!({}), "Never", &running());
        assert_eq!(next(&running, &life, at(59)), Step::Rest(Some(at(60))));
        assert_eq!(next(&running, &life, at(60)), Step::Finish);
        let ended = pod(&json!({}), "Never", &json!({"phase": "Succeeded"}));
        assert_eq!(next(&ended, &life, at(90)), Step::Rest(None));
    }

    #[test]
    fn the_annotation_outranks_the_environment_and_that_the_fleet() {
        let life = Life {
            run_for: Some(Duration::from_secs(600)),
            ..Life::default()
        };
        let annotated = json!({"annotations": {RUN_FOR_ANNOTATION: "5"}});
        assert_eq!(next(&pod(&annotated, "Never", &running()), &life, at(5)), Step::Finish);
        assert_eq!(
            next(&pod(&json!({}), "Never", &running()), &life, at(5)),
            Step::Rest(Some(at(60)))
        );
        let mut plain = pod(&json!({}), "Never", &running());
        plain.spec.as_mut().unwrap().containers[0].env = None;
        assert_eq!(next(&plain, &life, at(5)), Step::Rest(Some(at(600))));
    }

    #[test]
    fn a_server_never_finishes() {
        let server = pod(&json!({}), "Always", &running());
        assert_eq!(next(&server, &Life::default(), at(3600)), Step::Rest(None));
    }

    #[test]
    fn a_deleted_pod_ends_before_it_goes() {
        let deleted = json!({"deletionTimestamp": BEGUN});
        let life = Life::default();
        assert_eq!(next(&pod(&deleted, "Never", &running()), &life, at(1)), Step::Stop);
        assert_eq!(next(&pod(&deleted, "Never", &json!({})), &life, at(1)), Step::Remove);
        let failed = json!({"phase": "Failed"});
        assert_eq!(next(&pod(&deleted, "Never", &failed), &life, at(1)), Step::Remove);
    }

    #[test]
    fn a_slim_pod_takes_the_same_steps() {
        let annotated = json!({"annotations": {RUN_FOR_ANNOTATION: "5"}, "labels": {"a": "b"}});
        for metadata in [json!({}), annotated, json!({"deletionTimestamp": BEGUN})] {
            for status in [json!({}), running(), json!({"phase": "Failed"})] {
                let whole = pod(&metadata, "Never", &status);
                let mut slimmed = whole.clone();
                slim(&mut slimmed);
                for seconds in [0, 5, 60] {
                    let life = Life::default();
                    assert_eq!(next(&slimmed, &life, at(seconds)), next(&whole, &life, at(seconds)));
                }
            }
        }
    }
}
