//! Services: an address, endpoints and connections to ready pods.

use std::net::SocketAddr;

use k8s_openapi::api::core::v1::{Endpoints, Service};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::cluster::{Cluster, eventually, is_ready, pod_ip};

/// Answers on the pod's address in its place: a shell cannot listen.
async fn answer(address: SocketAddr, word: &'static str) {
    let listener = TcpListener::bind(address).await.unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(word.as_bytes()).await.unwrap();
        }
    });
}

async fn ask(address: SocketAddr) -> Option<String> {
    let mut text = String::new();
    TcpStream::connect(address)
        .await
        .ok()?
        .read_to_string(&mut text)
        .await
        .ok()?;
    Some(text)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_reaches_ready_pods_in_turn_and_refuses_without_any() {
    let cluster = Cluster::start().await;
    cluster
        .create::<Service>(json!({
            "metadata": {"name": "web"},
            "spec": {"selector": {"tier": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}
        }))
        .await;
    let api = cluster.api::<Service>();
    let address = async || {
        api.get("web")
            .await
            .unwrap()
            .spec
            .unwrap()
            .cluster_ip
            .filter(|ip| !ip.is_empty())
    };
    eventually("the service has an address", async || address().await.is_some()).await;
    let front: SocketAddr = format!("{}:80", address().await.unwrap()).parse().unwrap();
    assert_eq!(ask(front).await, None);

    for (name, word) in [("one", "1"), ("two", "2")] {
        cluster
            .run(
                name,
                "sleep 600",
                json!({"container": {"ports": [{"name": "http", "containerPort": 8080}]}}),
            )
            .await;
        let ready = cluster.wait_for(name, "ready", is_ready).await;
        answer(format!("{}:8080", pod_ip(&ready)).parse().unwrap(), word).await;
        let label = kube::api::Patch::Merge(json!({"metadata": {"labels": {"tier": "web"}}}));
        let pods = cluster.api::<k8s_openapi::api::core::v1::Pod>();
        pods.patch(name, &kube::api::PatchParams::default(), &label)
            .await
            .unwrap();
    }
    eventually("both are endpoints", async || {
        let found = cluster.api::<Endpoints>().get_opt("web").await.unwrap();
        let subsets = found.and_then(|endpoints| endpoints.subsets).unwrap_or_default();
        subsets
            .iter()
            .flat_map(|subset| subset.addresses.iter().flatten())
            .count()
            == 2
    })
    .await;
    eventually("both are asked in turn", async || {
        let answers = [ask(front).await, ask(front).await];
        answers.contains(&Some("1".to_owned())) && answers.contains(&Some("2".to_owned()))
    })
    .await;

    let pods = cluster.api::<k8s_openapi::api::core::v1::Pod>();
    for name in ["one", "two"] {
        pods.delete(name, &kube::api::DeleteParams::default()).await.unwrap();
    }
    eventually("connections are refused", async || ask(front).await.is_none()).await;
    cluster.stop().await;
}
