//! Owner references and namespaces: who goes when somebody goes.

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Secret, ServiceAccount};
use kube::{
    Api, Resource, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams, PropagationPolicy},
};
use serde_json::json;

use crate::cluster::{Cluster, eventually, processes};

/// A ConfigMap `owner` and a Secret `dependent` that it owns; `finalizer` holds the dependent back.
async fn family(cluster: &Cluster, finalizer: bool) -> (ConfigMap, Secret) {
    let owner: ConfigMap = cluster.create(json!({"metadata": {"name": "owner"}})).await;
    let mut reference = owner.controller_owner_ref(&()).unwrap();
    reference.block_owner_deletion = Some(true);
    let finalizers = if finalizer {
        json!(["example.org/wait"])
    } else {
        json!([])
    };
    let metadata = json!({"name": "dependent", "ownerReferences": [reference], "finalizers": finalizers});
    let dependent = cluster.create(json!({"metadata": metadata})).await;
    (owner, dependent)
}

async fn delete_owner(cluster: &Cluster, policy: PropagationPolicy) {
    let params = DeleteParams {
        propagation_policy: Some(policy),
        ..DeleteParams::default()
    };
    cluster.api::<ConfigMap>().delete("owner", &params).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn background_deletion_takes_the_dependents_afterwards() {
    let cluster = Cluster::start().await;
    family(&cluster, false).await;
    delete_owner(&cluster, PropagationPolicy::Background).await;
    assert!(cluster.api::<ConfigMap>().get_opt("owner").await.unwrap().is_none());
    cluster.wait_until_gone::<Secret>("dependent").await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn foreground_deletion_keeps_the_owner_until_the_dependents_are_gone() {
    let cluster = Cluster::start().await;
    family(&cluster, true).await;
    delete_owner(&cluster, PropagationPolicy::Foreground).await;
    let secrets = cluster.api::<Secret>();
    eventually("the dependent is being deleted", async || {
        secrets
            .get("dependent")
            .await
            .unwrap()
            .metadata
            .deletion_timestamp
            .is_some()
    })
    .await;
    let owner = cluster.api::<ConfigMap>().get("owner").await.unwrap();
    assert_eq!(owner.finalizers(), ["foregroundDeletion"]);
    let release = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    secrets
        .patch("dependent", &PatchParams::default(), &release)
        .await
        .unwrap();
    cluster.wait_until_gone::<ConfigMap>("owner").await;
    cluster.wait_until_gone::<Secret>("dependent").await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn orphaning_leaves_the_dependents_without_an_owner() {
    let cluster = Cluster::start().await;
    family(&cluster, false).await;
    delete_owner(&cluster, PropagationPolicy::Orphan).await;
    cluster.wait_until_gone::<ConfigMap>("owner").await;
    let dependent = cluster.api::<Secret>().get("dependent").await.unwrap();
    assert!(dependent.owner_references().is_empty());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dependent_whose_owner_never_was_is_collected() {
    let cluster = Cluster::start().await;
    let metadata = json!({"name": "stray", "ownerReferences": [
        {"apiVersion": "v1", "kind": "ConfigMap", "name": "never", "uid": "00000000-0000-4000-8000-000000000000"}
    ]});
    cluster.create::<Secret>(json!({"metadata": metadata})).await;
    cluster.wait_until_gone::<Secret>("stray").await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_namespace_takes_its_pods_and_objects_along() {
    let cluster = Cluster::start().await;
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    let namespace = serde_json::from_value(json!({"metadata": {"name": "team"}})).unwrap();
    namespaces.create(&PostParams::default(), &namespace).await.unwrap();
    let accounts: Api<ServiceAccount> = Api::namespaced(cluster.client.clone(), "team");
    eventually("it has a service account", async || {
        accounts.get_opt("default").await.unwrap().is_some()
    })
    .await;
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), "team");
    let pod = serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": {
        "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "main", "image": "sh", "args": ["-c", "exec sleep 600"]}]
    }}))
    .unwrap();
    let pod = pods.create(&PostParams::default(), &pod).await.unwrap();
    eventually("the pod runs", async || processes(&pod) == 1).await;
    namespaces.delete("team", &DeleteParams::default()).await.unwrap();
    eventually("the namespace is gone", async || {
        namespaces.get_opt("team").await.unwrap().is_none()
    })
    .await;
    assert_eq!(processes(&pod), 0);
    cluster.stop().await;
}
