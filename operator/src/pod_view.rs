//! What a Pod's status says about the one container in it.

use flotilla_api::{
    names::{CONTAINER, exit, label},
    progress::Progress,
};
use k8s_openapi::{
    api::core::v1::{ContainerStateTerminated, ContainerStatus, Pod, PodStatus},
    jiff::Timestamp,
};

/// Pod reasons that say "the node took it away", not "it failed" (kubelet, node lifecycle and preemption).
const DISRUPTIONS: [&str; 6] = [
    "Evicted",
    "NodeLost",
    "NodeShutdown",
    "Terminated",
    "Preempting",
    "Shutdown",
];

/// One pod, as decisions see it.
#[derive(Clone, Debug, PartialEq)]
pub struct PodView {
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Number of the attempt it belongs to; 0 for pods that are not counted.
    pub attempt: u32,
    /// Its place among the rollout pods of its run; None for all others.
    pub index: Option<u32>,
    /// What it runs, as a hash; empty for pods of runs.
    pub revision: String,
    /// Its address, once it has one.
    pub ip: Option<String>,
    /// When it was made.
    pub created: Timestamp,
    /// It was asked to stop.
    pub terminating: bool,
    /// It answers its readiness probe.
    pub ready: bool,
    /// Since when `ready` has been as it is.
    pub ready_since: Option<Timestamp>,
    /// How often the kubelet restarted its container.
    pub container_restarts: u32,
    /// The kubelet waits ever longer before it starts the container again.
    pub crash_loops: bool,
    /// Where it stands.
    pub stage: PodStage,
    /// How its container ended before the kubelet restarted it.
    pub crash: Option<Exit>,
}

/// Where a pod stands.
#[derive(Clone, Debug, PartialEq)]
pub enum PodStage {
    /// Its container has not begun.
    Pending {
        /// It has a node.
        scheduled: bool,
        /// Why it waits, if the scheduler or the kubelet say so.
        message: Option<String>,
    },
    /// Its container runs.
    Running,
    /// Its container ended and stays ended.
    Exited(Exit),
}

/// How a container ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Exit {
    /// Its exit code; None where only the pod's phase is known.
    pub code: Option<i32>,
    /// It was taken away (eviction, preemption, deletion): not a failure.
    pub disrupted: bool,
    /// When it ended, if known.
    pub at: Option<Timestamp>,
    /// The worker's last word, if it left one.
    pub progress: Option<Box<Progress>>,
    /// What the kubelet says about it.
    pub reason: String,
}

impl Exit {
    /// One sentence for people: the worker's own message where it left one.
    pub fn message(&self) -> String {
        let said = self.progress.as_ref().map_or("", |progress| progress.message.as_str());
        let code = self
            .code
            .map_or_else(|| "no exit code".to_owned(), |code| format!("exit code {code}"));
        match (said.is_empty(), self.reason.is_empty()) {
            (false, _) => said.to_owned(),
            (true, false) => format!("{code}: {}", self.reason),
            (true, true) => code,
        }
    }

    /// The worker said that a new attempt would end the same way.
    pub fn is_permanent(&self) -> bool {
        self.code == Some(exit::PERMANENT)
    }
}

impl PodView {
    /// Reads a pod. `now` stands in for a creation time that is not there yet.
    pub fn of(pod: &Pod, now: Timestamp) -> Self {
        let meta = &pod.metadata;
        let label = |name| meta.labels.as_ref().and_then(|labels| labels.get(name));
        let status = pod.status.clone().unwrap_or_default();
        let container = container(&status);
        let ready = status
            .conditions
            .iter()
            .flatten()
            .find(|condition| condition.type_ == "Ready");
        let terminating = meta.deletion_timestamp.is_some();
        Self {
            name: meta.name.clone().unwrap_or_default(),
            uid: meta.uid.clone().unwrap_or_default(),
            attempt: label(label::ATTEMPT).and_then(|text| text.parse().ok()).unwrap_or(0),
            index: label(label::INDEX).and_then(|text| text.parse().ok()),
            revision: label(label::REVISION).cloned().unwrap_or_default(),
            ip: status.pod_ip.clone().filter(|ip| !ip.is_empty()),
            created: meta.creation_timestamp.as_ref().map_or(now, |time| time.0),
            terminating,
            ready: ready.is_some_and(|condition| condition.status == "True"),
            ready_since: ready
                .and_then(|condition| condition.last_transition_time.as_ref())
                .map(|time| time.0),
            container_restarts: container.map_or(0, |status| u32::try_from(status.restart_count).unwrap_or(0)),
            crash_loops: container
                .and_then(|status| status.state.as_ref()?.waiting.as_ref()?.reason.as_deref())
                .is_some_and(|reason| reason == "CrashLoopBackOff"),
            stage: stage(pod, &status, container),
            crash: container
                .and_then(|status| {
                    let last = status.last_state.as_ref().and_then(|state| state.terminated.as_ref());
                    status
                        .state
                        .as_ref()
                        .and_then(|state| state.terminated.as_ref())
                        .or(last)
                })
                .map(|terminated| exit(Some(terminated), &status)),
        }
    }

    /// What its owner decides by: readiness and address, restarts, its end, and why it waits.
    pub fn news(&self) -> impl PartialEq + use<> {
        let waits = match &self.stage {
            PodStage::Pending { message, .. } => message.clone(),
            PodStage::Running | PodStage::Exited(_) => None,
        };
        let crashes = (self.container_restarts, self.crash_loops, self.crash.clone());
        let stands = (self.uid.clone(), self.ready, self.ip.clone(), self.terminating);
        (stands, crashes, self.exit().cloned(), waits)
    }

    /// Whether nothing happened to it yet.
    pub fn is_fresh(&self) -> bool {
        !self.terminating && matches!(self.stage, PodStage::Pending { message: None, .. })
    }

    /// Whether it is ready in `later` and nothing else is news there.
    pub fn became_ready(&self, later: &Self) -> bool {
        let apart_from_readiness = |view: &Self| {
            let view = Self {
                ready: true,
                ip: None,
                ..view.clone()
            };
            view.news()
        };
        !self.ready && later.ready && apart_from_readiness(self) == apart_from_readiness(later)
    }

    /// Whether it still counts: neither ended nor asked to stop.
    pub fn is_live(&self) -> bool {
        !self.terminating && !matches!(self.stage, PodStage::Exited(_))
    }

    /// How it ended, if it did.
    pub fn exit(&self) -> Option<&Exit> {
        match &self.stage {
            PodStage::Exited(exit) => Some(exit),
            PodStage::Pending { .. } | PodStage::Running => None,
        }
    }

    /// Whether its container runs.
    pub fn is_running(&self) -> bool {
        matches!(self.stage, PodStage::Running)
    }
}

fn container(status: &PodStatus) -> Option<&ContainerStatus> {
    status
        .container_statuses
        .iter()
        .flatten()
        .find(|status| status.name == CONTAINER)
}

fn stage(pod: &Pod, status: &PodStatus, container: Option<&ContainerStatus>) -> PodStage {
    let state = container.and_then(|status| status.state.as_ref());
    let terminated = state.and_then(|state| state.terminated.as_ref());
    let never_restarts = pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref()) == Some("Never");
    match status.phase.as_deref() {
        Some("Succeeded" | "Failed") => PodStage::Exited(exit(terminated, status)),
        _ if never_restarts && terminated.is_some() => PodStage::Exited(exit(terminated, status)),
        _ if state.is_some_and(|state| state.running.is_some() || state.terminated.is_some()) => PodStage::Running,
        Some("Running") => PodStage::Running,
        _ => pending(status, container),
    }
}

fn pending(status: &PodStatus, container: Option<&ContainerStatus>) -> PodStage {
    let scheduled = status
        .conditions
        .iter()
        .flatten()
        .find(|condition| condition.type_ == "PodScheduled");
    let unscheduled = scheduled.filter(|condition| condition.status == "False");
    let waiting = container
        .and_then(|status| status.state.as_ref())
        .and_then(|state| state.waiting.as_ref())
        .filter(|waiting| {
            waiting
                .reason
                .as_deref()
                .is_some_and(|reason| reason != "ContainerCreating")
        });
    let message = match (unscheduled, waiting) {
        (Some(condition), _) => condition.message.clone().or_else(|| condition.reason.clone()),
        (None, Some(waiting)) => {
            let reason = waiting.reason.as_deref().unwrap_or("waiting");
            Some(
                waiting
                    .message
                    .as_ref()
                    .map_or_else(|| reason.to_owned(), |text| format!("{reason}: {text}")),
            )
        }
        (None, None) => None,
    };
    PodStage::Pending {
        scheduled: scheduled.is_some_and(|condition| condition.status == "True"),
        message,
    }
}

fn exit(terminated: Option<&ContainerStateTerminated>, status: &PodStatus) -> Exit {
    let text = terminated
        .and_then(|state| state.message.as_deref())
        .unwrap_or_default();
    let progress = serde_json::from_str::<Box<Progress>>(text).ok();
    let pod_reason = status.reason.as_deref().unwrap_or_default();
    let target = |type_: &str| {
        let mut conditions = status.conditions.iter().flatten();
        conditions.any(|condition| condition.type_ == type_ && condition.status == "True")
    };
    let kubelet = [
        terminated.and_then(|state| state.reason.as_deref()).unwrap_or_default(),
        if progress.is_none() { text } else { "" },
        pod_reason,
        status.message.as_deref().unwrap_or_default(),
    ];
    Exit {
        code: terminated.map(|state| state.exit_code),
        disrupted: DISRUPTIONS.contains(&pod_reason) || target("DisruptionTarget"),
        at: terminated
            .and_then(|state| state.finished_at.as_ref())
            .map(|time| time.0),
        progress,
        reason: kubelet
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join(": "),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn view(status: &Value) -> PodView {
        let pod = json!({
            "metadata": {"name": "a-train-2", "uid": "u", "labels": {label::ATTEMPT: "2"}},
            "spec": {"restartPolicy": "Never", "containers": []},
            "status": status,
        });
        PodView::of(&serde_json::from_value(pod).expect("a pod"), Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn the_workers_last_word_is_read_from_the_termination_message() {
        let message = r#"{"stage":"Failed","message":"no rows"}"#;
        let pod = view(
            &json!({"phase": "Failed", "containerStatuses": [{"name": "worker", "image": "", "imageID": "",
            "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": 78, "message": message, "reason": "Error"}}}]}),
        );
        let exit = pod.exit().expect("ended");
        assert!(exit.is_permanent());
        assert_eq!(exit.message(), "no rows");
        assert_eq!(pod.attempt, 2);
    }

    #[test]
    fn a_killed_container_is_described_by_the_kubelet() {
        let pod = view(
            &json!({"phase": "Failed", "containerStatuses": [{"name": "worker", "image": "", "imageID": "",
            "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}]}),
        );
        assert_eq!(pod.exit().expect("ended").message(), "exit code 137: OOMKilled");
    }

    #[test]
    fn an_evicted_pod_did_not_fail() {
        let pod = view(&json!({"phase": "Failed", "reason": "Evicted", "message": "low on memory"}));
        let exit = pod.exit().expect("ended");
        assert!(exit.disrupted);
        assert_eq!(exit.message(), "no exit code: Evicted: low on memory");
    }

    #[test]
    fn a_pod_without_a_node_says_why() {
        let pod = view(
            &json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False",
            "reason": "Unschedulable", "message": "0/3 nodes have nvidia.com/gpu"}]}),
        );
        let message = Some("0/3 nodes have nvidia.com/gpu".to_owned());
        assert_eq!(
            pod.stage,
            PodStage::Pending {
                scheduled: false,
                message
            }
        );
    }
}
