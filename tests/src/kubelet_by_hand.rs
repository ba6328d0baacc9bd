//! Pod statuses as a kubelet writes them, without a node and without processes: for tests of what the operator asks of the API
//! server, not of what workers do.

use std::time::Duration;

use anyhow::Context;
use flotilla_api::{
    names::{CONTAINER, exit, label},
    progress::{CheckpointRecord, ConversionReport, Progress, Stage},
};
use k8s_openapi::{api::core::v1::Pod, jiff::Timestamp};
use kube::{
    Api, Client, ResourceExt as _,
    api::{ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

/// A digest that nothing has.
pub const DIGEST: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

/// Plays the kubelet for the operator's pods of one namespace until it is dropped.
#[derive(Debug)]
pub struct Kubelet {
    task: JoinHandle<()>,
}

impl Kubelet {
    /// Conversions and verifications succeed, servers become ready, and a learner does what its job's name says: that of
    /// `steady` runs until it is stopped, every other one is stopped once and completes at its second attempt.
    pub fn play(client: Client, namespace: &str) -> Self {
        let pods: Api<Pod> = Api::namespaced(client, namespace);
        let task = tokio::spawn(async move {
            loop {
                // An error is looked at again in the next round, like a kubelet would.
                let _ = round(&pods).await;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        Self { task }
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn round(pods: &Api<Pod>) -> anyhow::Result<()> {
    for pod in pods.list(&ListParams::default().labels(label::ROLE)).await? {
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        if pod.metadata.deletion_timestamp.is_some() || phase != Some("Pending") {
            continue;
        }
        let status = next(&pod).with_context(|| format!("status of pod {}", pod.name_any()))?;
        let patch = Patch::Merge(json!({"status": status}));
        pods.patch_status(&pod.name_any(), &PatchParams::default(), &patch)
            .await?;
    }
    Ok(())
}

fn next(pod: &Pod) -> anyhow::Result<Value> {
    let label = |name: &str| pod.labels().get(name).map(String::as_str);
    let role = label(label::ROLE).context("a role")?;
    let owner = label(label::OWNER_NAME).context("an owner")?;
    Ok(match (role, label(label::ATTEMPT)) {
        ("serve" | "rollout", _) => running(),
        ("train", _) if owner == "steady" => running(),
        ("train", Some("1")) => ended(exit::SUSPENDED, &trained(Stage::Suspended, 1))?,
        ("train", _) => ended(exit::OK, &trained(Stage::Completed, 2))?,
        _ => ended(exit::OK, &converted())?,
    })
}

fn running() -> Value {
    json!({
        "phase": "Running",
        "podIP": "127.0.0.1",
        "podIPs": [{"ip": "127.0.0.1"}],
        "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": Timestamp::now()}],
        "containerStatuses": [container(&json!({"running": {"startedAt": Timestamp::now()}}), true)],
    })
}

fn ended(code: i32, progress: &Progress) -> anyhow::Result<Value> {
    let terminated = json!({"terminated": {
        "exitCode": code,
        "finishedAt": Timestamp::now(),
        "message": serde_json::to_string(progress)?,
    }});
    Ok(json!({
        "phase": if code == exit::OK { "Succeeded" } else { "Failed" },
        "containerStatuses": [container(&terminated, false)],
    }))
}

fn container(state: &Value, ready: bool) -> Value {
    json!({"name": CONTAINER, "image": "flotilla-worker", "imageID": "", "ready": ready, "restartCount": 0, "state": state})
}

fn converted() -> Progress {
    Progress {
        stage: Stage::Completed,
        conversion: Some(ConversionReport {
            rows_in: 1,
            rows_out: 1,
            digest: DIGEST.to_owned(),
            uri: "pvc://data/rows".to_owned(),
            ..ConversionReport::default()
        }),
        ..Progress::default()
    }
}

fn trained(stage: Stage, step: u32) -> Progress {
    Progress {
        stage,
        step,
        total_steps: 2,
        metrics: [("loss".to_owned(), 0.5)].into(),
        checkpoints: vec![CheckpointRecord {
            step,
            uri: format!("pvc://data/step-{step}"),
            digest: DIGEST.to_owned(),
            bytes: 1,
            metrics: [].into(),
        }],
        ..Progress::default()
    }
}
