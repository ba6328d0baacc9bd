//! Deleting pods: SIGTERM, the grace period, SIGKILL, and nothing left.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::api::DeleteParams;
use serde_json::{Value, json};

use crate::cluster::{Cluster, PATIENCE, eventually, processes};

/// A claim mounted at /data, which outlives the pod.
async fn with_claim(cluster: &Cluster) -> Value {
    cluster
        .create::<PersistentVolumeClaim>(json!({
            "metadata": {"name": "data"},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
        }))
        .await;
    json!({
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
        "container": {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_pod_may_finish_within_its_grace_period() {
    let cluster = Cluster::start().await;
    let mut extra = with_claim(&cluster).await;
    extra["terminationGracePeriodSeconds"] = json!(60);
    let script = "trap 'sleep 1; echo saved > /data/state; exit 143' TERM; touch /data/up; \
                  while true; do sleep 0.1; done";
    let pod = cluster.run("polite", script, extra).await;
    eventually("the script runs", async || cluster.volume("data").join("up").exists()).await;
    cluster
        .api::<Pod>()
        .delete("polite", &DeleteParams::default())
        .await
        .unwrap();
    cluster.wait_until_gone::<Pod>("polite").await;
    assert_eq!(
        std::fs::read_to_string(cluster.volume("data").join("state")).unwrap(),
        "saved\n"
    );
    assert_eq!(processes(&pod), 0);
    assert_eq!(cluster.event("polite", "Killing").await, "Stopping container main");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stubborn_pod_is_killed_with_everything_it_started() {
    let cluster = Cluster::start().await;
    let extra = with_claim(&cluster).await;
    let script = "trap '' TERM; sleep 600 & setsid sleep 600 & touch /data/up; while true; do sleep 0.1; done";
    let pod = cluster.run("stubborn", script, extra).await;
    eventually("the script runs", async || cluster.volume("data").join("up").exists()).await;
    assert!(processes(&pod) >= 3);
    let since = Instant::now();
    cluster
        .api::<Pod>()
        .delete("stubborn", &DeleteParams::default().grace_period(2))
        .await
        .unwrap();
    cluster.wait_until_gone::<Pod>("stubborn").await;
    assert!(since.elapsed() >= Duration::from_secs(2) && since.elapsed() < PATIENCE);
    assert_eq!(processes(&pod), 0);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forced_deletion_removes_the_object_at_once_and_the_processes_soon() {
    let cluster = Cluster::start().await;
    let pod = cluster
        .run("forced", "trap '' TERM; while true; do sleep 0.1; done", json!({}))
        .await;
    cluster.wait_for_phase("forced", "Running").await;
    cluster
        .api::<Pod>()
        .delete("forced", &DeleteParams::default().grace_period(0))
        .await
        .unwrap();
    assert!(cluster.api::<Pod>().get_opt("forced").await.unwrap().is_none());
    eventually("no process is left", async || processes(&pod) == 0).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_with_a_finalizer_ends_and_stays_until_the_finalizer_goes() {
    let cluster = Cluster::start().await;
    let pod = cluster
        .run("held", "sleep 600", json!({"terminationGracePeriodSeconds": 1}))
        .await;
    let api = cluster.api::<Pod>();
    let finalizers = |list: Value| kube::api::Patch::Merge(json!({"metadata": {"finalizers": list}}));
    api.patch(
        "held",
        &kube::api::PatchParams::default(),
        &finalizers(json!(["example.org/wait"])),
    )
    .await
    .unwrap();
    cluster.wait_for_phase("held", "Running").await;
    api.delete("held", &DeleteParams::default()).await.unwrap();
    cluster.wait_for_phase("held", "Failed").await;
    assert_eq!(processes(&pod), 0);
    api.patch("held", &kube::api::PatchParams::default(), &finalizers(json!([])))
        .await
        .unwrap();
    cluster.wait_until_gone::<Pod>("held").await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_the_node_leaves_no_process() {
    let mut cluster = Cluster::start().await;
    let pods = [
        cluster.run("a", "sleep 600", json!({})).await,
        cluster
            .run("b", "setsid sleep 600 & sleep 600", json!({"restartPolicy": "Always"}))
            .await,
    ];
    cluster.wait_for_phase("a", "Running").await;
    cluster.wait_for_phase("b", "Running").await;
    cluster.stop_agent().await;
    assert_eq!(pods.iter().map(processes).sum::<usize>(), 0);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_the_node_during_a_deletion_does_not_wait_for_the_api() {
    let mut cluster = Cluster::start().await;
    let pod = cluster.run("held", "exec sleep 600", json!({})).await;
    let api = cluster.api::<Pod>();
    let hold = kube::api::Patch::Merge(json!({"metadata": {"finalizers": ["example.org/wait"]}}));
    api.patch("held", &kube::api::PatchParams::default(), &hold)
        .await
        .unwrap();
    cluster.wait_for_phase("held", "Running").await;
    api.delete("held", &DeleteParams::default()).await.unwrap();
    cluster.wait_for_phase("held", "Failed").await;
    assert!(tokio::time::timeout(PATIENCE, cluster.stop_agent()).await.is_ok());
    assert_eq!(processes(&pod), 0);
    cluster.stop().await;
}
