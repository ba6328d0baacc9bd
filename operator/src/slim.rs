//! What the copies in memory leave out. At thousands of pods their size is the operator's size.

use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodSpec, PodStatus};
use kube::ResourceExt as _;

/// Leaves out what nobody reads of any kind.
pub fn object<K: kube::Resource>(object: &mut K) {
    object.managed_fields_mut().clear();
}

/// Keeps of a pod what [`crate::pod_view`] and [`crate::owner`] read: names, labels, owners, and where its container
/// stands. The rest of the spec is what the operator wrote itself.
pub fn pod(pod: &mut Pod) {
    object(pod);
    pod.metadata.annotations = None;
    if let Some(spec) = pod.spec.take() {
        pod.spec = Some(PodSpec {
            node_name: spec.node_name,
            restart_policy: spec.restart_policy,
            ..PodSpec::default()
        });
    }
    if let Some(status) = pod.status.take() {
        pod.status = Some(PodStatus {
            conditions: status.conditions,
            container_statuses: status.container_statuses.map(|list| list.into_iter().map(container).collect()),
            message: status.message,
            phase: status.phase,
            pod_ip: status.pod_ip,
            reason: status.reason,
            ..PodStatus::default()
        });
    }
}

fn container(status: ContainerStatus) -> ContainerStatus {
    ContainerStatus {
        last_state: status.last_state,
        name: status.name,
        ready: status.ready,
        restart_count: status.restart_count,
        state: status.state,
        ..ContainerStatus::default()
    }
}

#[cfg(test)]
mod tests {
    use flotilla_api::names::label;
    use k8s_openapi::jiff::Timestamp;
    use serde_json::{Value, json};

    use super::*;
    use crate::pod_view::PodView;

    fn whole(phase: &str, state: &Value) -> Pod {
        let terminated = json!({"terminated": {"exitCode": 137, "reason": "OOMKilled",
            "finishedAt": "2026-01-01T00:00:00Z"}});
        serde_json::from_value(json!({
            "metadata": {"name": "a-train-2", "namespace": "lab", "uid": "u", "resourceVersion": "7",
                "creationTimestamp": "2026-01-01T00:00:00Z", "annotations": {"a": "b"},
                "labels": {label::ATTEMPT: "2", label::REVISION: "r"},
                "managedFields": [{"manager": "m"}],
                "ownerReferences": [{"apiVersion": "v", "kind": "TrainingJob", "name": "a", "uid": "o",
                    "controller": true}]},
            "spec": {"restartPolicy": "Never", "nodeName": "n", "containers": [{"name": "worker", "image": "i"}],
                "volumes": [{"name": "v", "emptyDir": {}}]},
            "status": {"phase": phase, "reason": "Evicted", "message": "low on memory", "podIP": "10.0.0.1",
                "hostIP": "10.0.0.2",
                "conditions": [
                    {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"},
                    {"type": "PodScheduled", "status": "False", "message": "no node"}],
                "containerStatuses": [{"name": "worker", "image": "i", "imageID": "i", "ready": true,
                    "restartCount": 3, "state": state, "lastState": terminated}]},
        }))
        .expect("a pod")
    }

    #[test]
    fn decisions_see_the_same_pod_in_a_slim_copy() {
        let ended = json!({"terminated": {"exitCode": 0, "message": r#"{"stage":"Completed"}"#}});
        for (phase, state) in [
            ("Pending", json!({"waiting": {"reason": "ErrImagePull", "message": "no such image"}})),
            ("Running", json!({"running": {}})),
            ("Running", ended.clone()),
            ("Failed", ended),
        ] {
            let whole = whole(phase, &state);
            let mut slim = whole.clone();
            pod(&mut slim);
            let now = Timestamp::UNIX_EPOCH;
            assert_eq!(PodView::of(&slim, now), PodView::of(&whole, now));
            assert_eq!(slim.metadata.owner_references, whole.metadata.owner_references);
            assert!(slim.metadata.managed_fields.is_none_or(|fields| fields.is_empty()));
            assert!(slim.spec.is_some_and(|spec| spec.containers.is_empty()));
        }
    }
}
