//! An agent that ends without a word, and the next one on the same directory.

use serde_json::json;

use crate::cluster::{Cluster, container, eventually, processes, restarts};

#[tokio::test(flavor = "multi_thread")]
async fn the_next_agent_notes_the_ends_and_applies_the_restart_policy() {
    let mut cluster = Cluster::start().await;
    let once = cluster.run("once", "sleep 600", json!({})).await;
    let always = cluster
        .run("always", "exec sleep 600", json!({"restartPolicy": "Always"}))
        .await;
    cluster.wait_for_phase("once", "Running").await;
    cluster.wait_for_phase("always", "Running").await;

    cluster.crash_agent().await;
    eventually("no process is left", async || {
        processes(&once) + processes(&always) == 0
    })
    .await;
    cluster.start_agent();

    let failed = cluster.wait_for_phase("once", "Failed").await;
    let ended = container(&failed).state.as_ref().unwrap().terminated.clone().unwrap();
    assert_eq!((ended.exit_code, ended.reason.as_deref()), (137, Some("Error")));
    assert!(
        ended
            .message
            .unwrap()
            .starts_with("the node agent ended while this container ran")
    );

    let restarted = cluster.wait_for("always", "a restart", |pod| restarts(pod) == 1).await;
    assert_eq!(
        container(&restarted)
            .last_state
            .as_ref()
            .unwrap()
            .terminated
            .as_ref()
            .unwrap()
            .exit_code,
        137
    );
    eventually("it runs once, not twice", async || processes(&always) == 1).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_was_deleted_meanwhile_is_cleaned_up() {
    let mut cluster = Cluster::start().await;
    let pod = cluster.run("gone", "sleep 600", json!({})).await;
    cluster.wait_for_phase("gone", "Running").await;
    let dir = cluster.path().join("pods").join(pod.metadata.uid.clone().unwrap());
    assert!(dir.exists());
    cluster.crash_agent().await;
    let api = cluster.api::<k8s_openapi::api::core::v1::Pod>();
    api.delete("gone", &kube::api::DeleteParams::default().grace_period(0))
        .await
        .unwrap();
    cluster.start_agent();
    eventually("its directory is removed", async || !dir.exists()).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_agents_cannot_share_a_directory() {
    let cluster = Cluster::start().await;
    cluster.run("first", "true", json!({})).await;
    cluster.wait_for_phase("first", "Succeeded").await;
    let token = tokio_util::sync::CancellationToken::new();
    let second = flotilla_sandbox::node::Agent::run(cluster.client.clone(), cluster.node_config(), token).await;
    assert!(second.unwrap_err().to_string().starts_with("another node agent uses "));
    cluster.stop().await;
}
