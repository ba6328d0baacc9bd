//! What a kubelet would have observed of a hollow pod.

use std::net::Ipv4Addr;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};

use super::life;
use crate::node::{
    record::{Exit, PodRecord, State},
    status::{OWN_CONDITIONS, pod_status},
};

/// How the containers of a pod end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct End<'a> {
    /// Exit code.
    pub code: i32,
    /// Reason of the terminated state.
    pub reason: &'static str,
    /// Termination message.
    pub message: &'a str,
}

/// The status of `pod` with its containers running, or ended by `end`; the kubelet's own conditions only.
pub fn status(pod: &Pod, ip: Ipv4Addr, host: Ipv4Addr, end: Option<End<'_>>, now: Timestamp) -> PodStatus {
    let mut status = pod_status(pod, &record(pod, ip, end, now), host, now);
    let conditions = status.conditions.get_or_insert_default();
    conditions.retain(|condition| OWN_CONDITIONS.contains(&condition.type_.as_str()));
    status
}

fn record(pod: &Pod, ip: Ipv4Addr, end: Option<End<'_>>, now: Timestamp) -> PodRecord {
    let since = life::running_since(pod).unwrap_or(now);
    let exit = |end: End<'_>| Exit {
        code: end.code,
        signal: None,
        reason: end.reason.to_owned(),
        message: (!end.message.is_empty()).then(|| end.message.to_owned()),
        started_at: since,
        finished_at: now,
        container_id: None,
    };
    let mut record = PodRecord::new(pod, since);
    record.ip = Some(ip);
    record.prepared = true;
    for container in &mut record.containers {
        match end {
            _ if container.init => container.end(exit(DONE)),
            Some(end) => container.end(exit(end)),
            None => {
                container.state = State::Running { started_at: since };
                container.started = true;
                container.ready = true;
            }
        }
    }
    record
}

/// How init containers end.
const DONE: End<'static> = End {
    code: 0,
    reason: "Completed",
    message: "",
};

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod() -> Pod {
        let pod = json!({"metadata": {"name": "a", "namespace": "lab", "uid": "u"}, "spec": {"restartPolicy": "Never",
            "initContainers": [{"name": "i", "image": "x"}], "containers": [{"name": "c", "image": "y"}]}});
        serde_json::from_value(pod).unwrap()
    }

    fn observed(pod: &Pod, end: Option<End<'_>>, seconds: i64) -> PodStatus {
        let now = Timestamp::from_second(seconds).unwrap();
        status(pod, Ipv4Addr::new(127, 1, 1, 2), Ipv4Addr::new(127, 1, 1, 1), end, now)
    }

    fn condition<'a>(status: &'a PodStatus, kind: &str) -> &'a str {
        let mut conditions = status.conditions.iter().flatten();
        &conditions.find(|condition| condition.type_ == kind).unwrap().status
    }

    #[test]
    fn a_running_pod_is_ready_and_has_an_address() {
        let status = observed(&pod(), None, 10);
        assert_eq!(status.phase.as_deref(), Some("Running"));
        assert_eq!(status.pod_ip.as_deref(), Some("127.1.1.2"));
        for kind in ["PodScheduled", "Initialized", "ContainersReady", "Ready"] {
            assert_eq!(condition(&status, kind), "True", "{kind}");
        }
    }

    #[test]
    fn a_finished_pod_keeps_the_time_it_began_and_leaves_a_message() {
        let mut pod = pod();
        pod.status = Some(observed(&pod, None, 10));
        let end = End {
            code: 0,
            reason: "Completed",
            message: "done",
        };
        let status = observed(&pod, Some(end), 25);
        assert_eq!(status.phase.as_deref(), Some("Succeeded"));
        assert_eq!(condition(&status, "Ready"), "False");
        let containers = status.container_statuses.unwrap();
        let terminated = containers[0].state.as_ref().unwrap().terminated.as_ref().unwrap();
        assert_eq!((terminated.exit_code, terminated.message.as_deref()), (0, Some("done")));
        let second = |time: &Option<k8s_openapi::apimachinery::pkg::apis::meta::v1::Time>| {
            time.as_ref().map(|time| time.0.as_second())
        };
        assert_eq!(
            (second(&terminated.started_at), second(&terminated.finished_at)),
            (Some(10), Some(25))
        );
    }
}
