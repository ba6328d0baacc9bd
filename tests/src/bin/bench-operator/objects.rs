//! The objects that are applied: a claim, a Dataset and a checkpoint whose status is set by hand, and jobs on top of them.

use flotilla_api::names::label;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

/// Namespace of the operator's jobs.
pub const NAMESPACE: &str = "bench";
/// Namespace of the bare client's pods.
pub const BARE_NAMESPACE: &str = "bench-bare";
/// Name of the claim, the Dataset and the checkpoint.
pub const NAME: &str = "prepared";
const DIGEST: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";
/// Value of the bare pods' label `app.kubernetes.io/managed-by`: the operator does not watch them.
pub const BARE: &str = "bench-operator";

/// A volume that nothing reads, and the claim of `namespace` that is bound to it.
pub fn volume(namespace: &str) -> (Value, Value) {
    let capacity = json!({"storage": "1Gi"});
    let name = format!("{namespace}-{NAME}");
    let volume = json!({
        "apiVersion": "v1", "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {"accessModes": ["ReadWriteMany"], "capacity": capacity, "storageClassName": "",
            "persistentVolumeReclaimPolicy": "Retain", "hostPath": {"path": "/nonexistent"},
            "claimRef": {"namespace": namespace, "name": NAME}},
    });
    let claim = json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim",
        "metadata": {"name": NAME, "namespace": namespace},
        "spec": {"accessModes": ["ReadWriteMany"], "storageClassName": "", "volumeName": name,
            "resources": {"requests": capacity}},
    });
    (volume, claim)
}

/// A Dataset and the status that a conversion would have given it.
pub fn dataset() -> (Value, Value) {
    let dataset = json!({
        "apiVersion": "flotilla.dev/v1alpha1", "kind": "Dataset",
        "metadata": {"name": NAME, "namespace": NAMESPACE},
        "spec": {"source": {"uri": format!("pvc://{NAME}/rows.jsonl")},
            "conversion": {"format": {"preference": {}}}, "storage": {"claimName": NAME}},
    });
    let report = json!({"rowsIn": 1, "rowsOut": 1, "badRecords": 0, "badByReason": {}, "firstBad": [], "images": 1,
        "labels": {}, "digest": DIGEST, "uri": format!("pvc://{NAME}/prepared")});
    (
        dataset,
        json!({"phase": "Ready", "observedGeneration": 1, "report": report}),
    )
}

/// A checkpoint and the status that a verification would have given it.
pub fn checkpoint() -> (Value, Value) {
    let checkpoint = json!({
        "apiVersion": "flotilla.dev/v1alpha1", "kind": "ModelCheckpoint",
        "metadata": {"name": NAME, "namespace": NAMESPACE},
        "spec": {"uri": format!("pvc://{NAME}/base"), "digest": DIGEST},
    });
    (checkpoint, json!({"phase": "Available", "observedGeneration": 1}))
}

/// A job of `pods` pods: a learner and rollout pods, of one GPU each.
pub fn job(name: &str, pods: u32) -> Value {
    let gpu = json!({"resources": {"limits": {"nvidia.com/gpu": "1"}}});
    let mut roles = json!({"learner": {"pod": gpu}});
    if pods > 1 {
        roles["rollout"] = json!({"replicas": pods - 1, "pod": gpu});
    }
    json!({
        "apiVersion": "flotilla.dev/v1alpha1", "kind": "TrainingJob",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "model": {"checkpointRef": {"name": NAME}},
            "datasets": [{"datasetRef": {"name": NAME}}],
            "rewards": [{"rule": "preference", "weight": 1.0}],
            "algorithm": {"grpo": {"steps": 100}},
            "checkpoint": {"storage": {"claimName": NAME}},
            "roles": roles,
        },
    })
}

/// The pod `name` of the bare client, like `model`, which the operator made and the API server completed.
pub fn bare_pod(model: &Pod, name: &str) -> Pod {
    let mut pod = Pod {
        spec: model.spec.clone(),
        ..Pod::default()
    };
    pod.metadata.name = Some(name.to_owned());
    let mut labels = model.metadata.labels.clone().unwrap_or_default();
    labels.insert(label::MANAGED_BY.to_owned(), BARE.to_owned());
    pod.metadata.labels = Some(labels);
    if let Some(spec) = &mut pod.spec {
        spec.node_name = None;
        // Admission fills in what it filled in for the operator's pod.
        spec.service_account = None;
        spec.service_account_name = None;
        spec.tolerations = None;
        spec.priority = None;
        spec.preemption_policy = None;
    }
    pod
}
