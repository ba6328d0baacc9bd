//! The node agent under a real API server: what a kubelet would write and what it may read (`make test-cluster`).

use std::time::Duration;

use anyhow::{Context, bail};
use flotilla_tests::{
    cluster::Cluster,
    control_plane::{client_of, impatient_client_in},
    eventually,
    fleet::Fleet,
};
use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{Node, Pod, PodStatus, Secret},
    policy::v1::PodDisruptionBudget,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, EvictParams, ListParams, LogParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

/// A pod of the story's node that runs `script`; `spec` adds to it.
fn pod(fleet: &Fleet, name: &str, script: &str, spec: &Value) -> anyhow::Result<Pod> {
    let node = fleet.namespace();
    let mut pod = json!({
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": 20,
            "nodeSelector": {"kubernetes.io/hostname": node},
            "tolerations": [{"key": "sandbox.flotilla.dev/story", "operator": "Exists"}],
            "securityContext": {
                "runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "main",
                "image": "flotilla-worker",
                "command": ["sh", "-c", script],
                "terminationMessagePath": "/tmp/unused",
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
            }],
        },
    });
    let own = pod["spec"].as_object_mut().context("a spec")?;
    own.extend(spec.as_object().context("more of a spec")?.clone());
    Ok(serde_json::from_value(pod)?)
}

async fn until(pods: &Api<Pod>, name: &str, what: &str, holds: impl Fn(&PodStatus) -> bool) -> anyhow::Result<Pod> {
    eventually(&format!("pod {name}: {what}"), LIMIT, || async {
        let pod = pods.get(name).await?;
        Ok(pod.status.as_ref().is_some_and(&holds).then_some(pod))
    })
    .await
}

fn condition(status: &PodStatus, kind: &str) -> Option<String> {
    let mut all = status.conditions.iter().flatten();
    all.find(|condition| condition.type_ == kind)
        .map(|condition| condition.status.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_is_to_a_real_api_server_what_a_kubelet_is() -> anyhow::Result<()> {
    let cluster = Cluster::connect().await?;
    let fleet = Fleet::on(&cluster).await?;
    let client = fleet.client().await?;
    let pods: Api<Pod> = Api::default_namespaced(client.clone());

    a_node_offers_gpus_and_beats(&fleet, &client).await?;
    exit_codes_and_restarts_reach_the_status(&fleet, &pods).await?;
    a_readiness_gate_holds_a_pod_back(&fleet, &pods).await?;
    deletion_and_eviction_give_a_container_its_grace_period(&cluster, &fleet, &pods).await?;
    a_pod_that_asks_for_more_gpus_than_there_are_stays_pending(&fleet, &pods).await?;
    the_agent_reads_no_secret_that_its_pods_do_not_mount(&fleet, &client).await?;

    fleet.stop().await?;
    cluster.stop()
}

async fn a_node_offers_gpus_and_beats(fleet: &Fleet, client: &Client) -> anyhow::Result<()> {
    let (name, nodes) = (fleet.namespace(), Api::<Node>::all(client.clone()));
    let node = eventually("the node is ready", LIMIT, || async {
        let node = nodes.get(name).await?;
        let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
        let mut ready = conditions.filter(|condition| condition.type_ == "Ready" && condition.status == "True");
        Ok(ready.next().is_some().then(|| node.clone()))
    })
    .await?;
    let capacity = node.status.and_then(|status| status.capacity).context("capacity")?;
    assert_eq!(capacity["nvidia.com/gpu"].0, "8");
    let leases: Api<Lease> = Api::namespaced(client.clone(), "kube-node-lease");
    // The first beat follows the first status.
    let lease = eventually("the node has a lease", LIMIT, || async {
        let lease = leases.get(name).await?;
        Ok(Some(lease))
    })
    .await?;
    let owner = lease.owner_references().first().context("an owner")?;
    assert_eq!((owner.kind.as_str(), owner.name.as_str()), ("Node", name));
    let beat = lease.spec.and_then(|spec| spec.renew_time).context("a beat")?;
    eventually("the lease is renewed", LIMIT, || async {
        let renewed = leases.get(name).await?.spec.and_then(|spec| spec.renew_time);
        Ok(renewed.filter(|renewed| *renewed > beat))
    })
    .await?;
    Ok(())
}

async fn exit_codes_and_restarts_reach_the_status(fleet: &Fleet, pods: &Api<Pod>) -> anyhow::Result<()> {
    let params = PostParams::default();
    pods.create(&params, &pod(fleet, "fine", "exit 0", &json!({}))?).await?;
    pods.create(&params, &pod(fleet, "fails", "echo no luck; exit 3", &json!({}))?)
        .await?;
    let again = json!({"restartPolicy": "OnFailure"});
    pods.create(&params, &pod(fleet, "again", "exit 1", &again)?).await?;

    let fine = until(pods, "fine", "succeeds", |status| {
        status.phase.as_deref() == Some("Succeeded")
    })
    .await?;
    let status = fine.status.context("status")?;
    assert_eq!(condition(&status, "PodScheduled").as_deref(), Some("True"));
    assert_eq!(condition(&status, "Ready").as_deref(), Some("False"));

    let fails = until(pods, "fails", "fails", |status| {
        status.phase.as_deref() == Some("Failed")
    })
    .await?;
    let containers = fails
        .status
        .and_then(|status| status.container_statuses)
        .context("containers")?;
    let ended = containers[0]
        .state
        .clone()
        .and_then(|state| state.terminated)
        .context("an end")?;
    assert_eq!((ended.exit_code, ended.reason.as_deref()), (3, Some("Error")));
    assert_eq!(ended.message.as_deref().map(str::trim), Some("no luck"));
    assert_eq!(pods.logs("fails", &LogParams::default()).await?, "no luck\n");

    let restarted = |status: &PodStatus| {
        status
            .container_statuses
            .iter()
            .flatten()
            .any(|container| container.restart_count >= 1)
    };
    until(pods, "again", "is restarted", restarted).await?;
    Ok(())
}

async fn a_readiness_gate_holds_a_pod_back(fleet: &Fleet, pods: &Api<Pod>) -> anyhow::Result<()> {
    let gate = json!({"readinessGates": [{"conditionType": "example.dev/open"}]});
    pods.create(&PostParams::default(), &pod(fleet, "gated", "sleep 600", &gate)?)
        .await?;
    let waiting = |status: &PodStatus| {
        condition(status, "ContainersReady").as_deref() == Some("True")
            && condition(status, "Ready").as_deref() == Some("False")
    };
    until(pods, "gated", "waits for its gate", waiting).await?;
    let open = json!({"status": {"conditions": [{"type": "example.dev/open", "status": "True"}]}});
    pods.patch_status("gated", &PatchParams::default(), &Patch::Strategic(open))
        .await?;
    let ready = |status: &PodStatus| condition(status, "Ready").as_deref() == Some("True");
    until(pods, "gated", "is ready", ready).await?;
    Ok(())
}

/// The script writes its last words on SIGTERM, a second later: only a container that had its grace period writes them.
async fn deletion_and_eviction_give_a_container_its_grace_period(
    cluster: &Cluster,
    fleet: &Fleet,
    pods: &Api<Pod>,
) -> anyhow::Result<()> {
    let words = fleet.dir().join("words");
    let script = |name: &str| {
        let file = words.with_extension(name);
        format!(
            "trap 'sleep 1; echo bye > {}; exit 0' TERM; while true; do sleep 0.1; done",
            file.display()
        )
    };
    let budgets: Api<PodDisruptionBudget> = Api::default_namespaced(fleet.client().await?);
    let budget = json!({"metadata": {"name": "guarded"},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "guarded"}}}});
    budgets
        .create(&PostParams::default(), &serde_json::from_value(budget)?)
        .await?;
    for name in ["deleted", "evicted", "guarded"] {
        pods.create(&PostParams::default(), &pod(fleet, name, &script(name), &json!({}))?)
            .await?;
    }
    for name in ["deleted", "evicted", "guarded"] {
        let ready = |status: &PodStatus| condition(status, "Ready").as_deref() == Some("True");
        until(pods, name, "is ready", ready).await?;
    }
    pods.delete("deleted", &DeleteParams::default()).await?;
    pods.evict("evicted", &EvictParams::default()).await?;
    let impatient = impatient_client_in(cluster.kubeconfig(), fleet.namespace()).await?;
    let held: Api<Pod> = Api::default_namespaced(impatient);
    let Err(kube::Error::Api(refusal)) = held.evict("guarded", &EvictParams::default()).await else {
        bail!("a disruption budget did not hold");
    };
    assert_eq!(refusal.code, 429, "{}", refusal.message);
    for name in ["deleted", "evicted"] {
        eventually(&format!("pod {name} is gone"), LIMIT, || async {
            Ok(pods.get_opt(name).await?.is_none().then_some(()))
        })
        .await?;
        assert_eq!(std::fs::read_to_string(words.with_extension(name))?.trim(), "bye");
    }
    assert!(pods.get("guarded").await?.metadata.deletion_timestamp.is_none());
    Ok(())
}

async fn a_pod_that_asks_for_more_gpus_than_there_are_stays_pending(
    fleet: &Fleet,
    pods: &Api<Pod>,
) -> anyhow::Result<()> {
    let mut greedy = pod(fleet, "greedy", "sleep 600", &json!({}))?;
    let container = greedy.spec.as_mut().and_then(|spec| spec.containers.first_mut());
    container.context("a container")?.resources = serde_json::from_value(json!({"limits": {"nvidia.com/gpu": "9"}}))?;
    pods.create(&PostParams::default(), &greedy).await?;
    let refused = |status: &PodStatus| {
        let mut conditions = status.conditions.iter().flatten();
        conditions.any(|condition| {
            let words = condition.message.as_deref().unwrap_or_default();
            condition.reason.as_deref() == Some("Unschedulable") && words.contains("Insufficient nvidia.com/gpu")
        })
    };
    until(pods, "greedy", "is unschedulable", refused).await?;
    Ok(())
}

async fn the_agent_reads_no_secret_that_its_pods_do_not_mount(fleet: &Fleet, client: &Client) -> anyhow::Result<()> {
    let secrets: Api<Secret> = Api::default_namespaced(client.clone());
    let secret = json!({"metadata": {"name": "foreign"}, "stringData": {"key": "value"}});
    secrets
        .create(&PostParams::default(), &serde_json::from_value(secret)?)
        .await?;
    let agent = client_of(&fleet.dir().join("node.kubeconfig")).await?;
    let as_agent: Api<Secret> = Api::namespaced(agent, fleet.namespace());
    for refusal in [
        as_agent.get("foreign").await.err(),
        as_agent.list(&ListParams::default()).await.err(),
    ] {
        let Some(kube::Error::Api(status)) = refusal else {
            bail!("the node's agent may read secrets: {refusal:?}");
        };
        assert_eq!(status.code, 403, "{}", status.message);
    }
    Ok(())
}
