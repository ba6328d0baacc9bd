//! Probes decide about readiness and restarts.

use serde_json::json;

use crate::cluster::{Cluster, condition, container, is_ready, restarts};

#[tokio::test(flavor = "multi_thread")]
async fn readiness_follows_its_probe() {
    let cluster = Cluster::start().await;
    let probe =
        json!({"exec": {"command": ["/bin/sh", "-c", "test -e $FLAG"]}, "periodSeconds": 1, "failureThreshold": 1});
    let extra = json!({
        "volumes": [{"name": "work", "emptyDir": {}}],
        "container": {
            "readinessProbe": probe,
            "env": [{"name": "FLAG", "value": "/scratch/ready"}],
            "volumeMounts": [{"name": "work", "mountPath": "/scratch"}]
        }
    });
    let script = "sleep 1; touch /scratch/ready; sleep 4; rm /scratch/ready; sleep 600";
    cluster.run("probed", script, extra).await;
    let running = cluster.wait_for_phase("probed", "Running").await;
    assert!(!is_ready(&running));
    let ready = cluster.wait_for("probed", "ready", is_ready).await;
    assert!(container(&ready).ready);
    let unready = cluster.wait_for("probed", "unready again", |pod| !is_ready(pod)).await;
    assert_eq!(condition(&unready, "ContainersReady"), Some("False"));
    assert_eq!(restarts(&unready), 0);
    assert!(
        cluster
            .event("probed", "Unhealthy")
            .await
            .starts_with("Readiness probe failed: command")
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_fails_its_liveness_probe_is_restarted() {
    let cluster = Cluster::start().await;
    let probe = json!({"tcpSocket": {"port": 9}, "periodSeconds": 1, "failureThreshold": 2});
    cluster
        .run(
            "ill",
            "sleep 600",
            json!({
                "restartPolicy": "Always", "terminationGracePeriodSeconds": 1, "container": {"livenessProbe": probe}
            }),
        )
        .await;
    let restarted = cluster.wait_for("ill", "a restart", |pod| restarts(pod) > 0).await;
    let last = container(&restarted)
        .last_state
        .as_ref()
        .unwrap()
        .terminated
        .clone()
        .unwrap();
    assert_eq!(last.exit_code, 143);
    assert_eq!(
        cluster.event("ill", "Killing").await,
        "Container main failed liveness probe, will be restarted"
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_probes_wait_for_the_startup_probe() {
    let cluster = Cluster::start().await;
    let startup = json!({"exec": {"command": ["test", "-e", "up"]}, "periodSeconds": 1, "failureThreshold": 60});
    let liveness = json!({"exec": {"command": ["test", "-e", "up"]}, "periodSeconds": 1, "failureThreshold": 1});
    cluster
        .run(
            "starting",
            "sleep 2; touch up; sleep 600",
            json!({
                "restartPolicy": "Always", "container": {"startupProbe": startup, "livenessProbe": liveness}
            }),
        )
        .await;
    let running = cluster.wait_for_phase("starting", "Running").await;
    assert_eq!(container(&running).started, Some(false));
    let ready = cluster.wait_for("starting", "ready", is_ready).await;
    assert_eq!((container(&ready).started, restarts(&ready)), (Some(true), 0));
    cluster.stop().await;
}
