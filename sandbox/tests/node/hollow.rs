use std::time::Duration;

use flotilla_sandbox::hollow::{self, FleetConfig, HollowError, Life, RUN_FOR_ANNOTATION};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{
    Api,
    api::{DeleteParams, ListParams},
};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::cluster::{Cluster, condition, container, eventually, is_ready, pod_ip};

/// A fleet beside the node of the cluster.
struct Fleet {
    task: JoinHandle<Result<(), HollowError>>,
    stop: CancellationToken,
}

impl Fleet {
    /// Two nodes of 4 GPUs, whose pods finish after `run_for`.
    async fn start(cluster: &Cluster, run_for: Option<Duration>) -> Self {
        let config = FleetConfig {
            gpus: 4,
            life: Life {
                run_for,
                last_word: "done".to_owned(),
                stopped_word: "stopped".to_owned(),
            },
            progress: Some(r#"{"stage":"Running"}"#.to_owned()),
            ..FleetConfig::new(2)
        };
        let stop = CancellationToken::new();
        let task = tokio::spawn(hollow::run(cluster.client.clone(), config, stop.clone()));
        let nodes: Api<Node> = Api::all(cluster.client.clone());
        let selector = ListParams::default().labels("hollow.sandbox.flotilla.dev/fleet=hollow");
        eventually("the nodes are there", async || {
            let nodes = nodes.list(&selector).await.unwrap().items;
            let with_gpus = nodes.iter().filter(|node| gpus(node).as_deref() == Some("4"));
            with_gpus.count() == 2
        })
        .await;
        Self { task, stop }
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }
}

fn gpus(node: &Node) -> Option<String> {
    let capacity = node.status.as_ref()?.capacity.as_ref()?;
    capacity.get("nvidia.com/gpu").map(|quantity| quantity.0.clone())
}

/// A pod that only hollow nodes take and whose image exists nowhere.
async fn create(cluster: &Cluster, name: &str, annotations: Value, gpus: &str) -> Pod {
    cluster
        .create(json!({
            "metadata": {"name": name, "annotations": annotations},
            "spec": {
                "restartPolicy": "Never",
                "nodeSelector": {"node.kubernetes.io/instance-type": "hollow"},
                "containers": [{
                    "name": "main", "image": "nowhere/nothing",
                    "resources": {"limits": {"nvidia.com/gpu": gpus}}
                }]
            }
        }))
        .await
}

#[tokio::test]
async fn a_pod_runs_and_finishes_without_a_process() {
    let cluster = Cluster::start().await;
    let fleet = Fleet::start(&cluster, Some(Duration::from_millis(500))).await;
    create(&cluster, "short", json!({}), "1").await;
    create(&cluster, "long", json!({RUN_FOR_ANNOTATION: "3600"}), "1").await;
    let short = cluster.wait_for_phase("short", "Succeeded").await;
    let terminated = container(&short).state.as_ref().unwrap().terminated.as_ref().unwrap();
    assert_eq!((terminated.exit_code, terminated.message.as_deref()), (0, Some("done")));
    let node = short.spec.as_ref().unwrap().node_name.as_deref().unwrap();
    assert!(node.starts_with("hollow-"), "{node}");

    let long = cluster.wait_for("long", "is ready", is_ready).await;
    assert_eq!(long.status.as_ref().unwrap().phase.as_deref(), Some("Running"));
    assert_eq!(condition(&long, "PodScheduled"), Some("True"));
    let answer = reqwest::get(format!("http://{}:8080/progress", pod_ip(&long)))
        .await
        .unwrap();
    assert_eq!(answer.text().await.unwrap(), r#"{"stage":"Running"}"#);
    fleet.stop().await;
    cluster.stop().await;
}

#[tokio::test]
async fn a_deleted_pod_goes_before_its_grace_period_is_over() {
    let cluster = Cluster::start().await;
    let fleet = Fleet::start(&cluster, None).await;
    create(&cluster, "a", json!({}), "1").await;
    cluster.wait_for("a", "is ready", is_ready).await;
    let grace = DeleteParams::default().grace_period(3600);
    cluster.api::<Pod>().delete("a", &grace).await.unwrap();
    cluster.wait_until_gone::<Pod>("a").await;
    fleet.stop().await;
    cluster.stop().await;
}

#[tokio::test]
async fn a_pod_that_asks_for_more_gpus_than_a_node_has_waits() {
    let cluster = Cluster::start().await;
    let fleet = Fleet::start(&cluster, None).await;
    create(&cluster, "large", json!({}), "5").await;
    create(&cluster, "small", json!({}), "4").await;
    cluster.wait_for("small", "is ready", is_ready).await;
    let large = cluster
        .wait_for("large", "cannot be scheduled", |pod| {
            condition(pod, "PodScheduled") == Some("False")
        })
        .await;
    assert_eq!(large.spec.as_ref().unwrap().node_name, None);
    fleet.stop().await;
    cluster.stop().await;
}
