//! The Node object and the Lease that says it lives.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        coordination::v1::{Lease, LeaseSpec},
        core::v1::{
            DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeSpec, NodeStatus, NodeSystemInfo,
        },
    },
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference, Time},
    },
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};

use super::{NodeConfig, accelerator};

/// Namespace of node leases.
const LEASE_NAMESPACE: &str = "kube-node-lease";
/// The kubelet's lease duration, in seconds.
const LEASE_SECONDS: i32 = 40;
/// How often the lease is renewed.
const RENEW: Duration = Duration::from_secs(10);
/// Condition that tells whether GPUs are what they seem.
const EMULATED: &str = "AcceleratorEmulated";
/// Label with the machine's kind of accelerator.
pub const ACCELERATOR_LABEL: &str = "sandbox.flotilla.dev/accelerator";

/// Creates the Node or brings it up to date, then its Lease. `log_port`: where the API server asks for logs.
pub async fn register(client: &Client, config: &NodeConfig, log_port: Option<u16>) -> Result<(), kube::Error> {
    let nodes: Api<Node> = Api::all(client.clone());
    let wanted = node(config);
    let params = PatchParams::default();
    let existing = match nodes.get_opt(&config.name).await? {
        Some(_) => {
            let labels = serde_json::json!({"metadata": {
                "labels": wanted.metadata.labels, "annotations": wanted.metadata.annotations
            }});
            nodes.patch(&config.name, &params, &Patch::Merge(&labels)).await?
        }
        None => nodes.create(&PostParams::default(), &wanted).await?,
    };
    let mut status = status(config, existing.status.as_ref(), Timestamp::now());
    status.daemon_endpoints = Some(NodeDaemonEndpoints {
        kubelet_endpoint: log_port.map(|port| DaemonEndpoint { port: port.into() }),
    });
    let status = serde_json::json!({"status": status});
    nodes
        .patch_status(&config.name, &params, &Patch::Strategic(&status))
        .await?;
    renew(client, config, existing.metadata.uid.as_deref()).await
}

/// Renews the Lease for ever, and registers again when the Node was deleted.
pub async fn heartbeat(client: Client, config: NodeConfig, log_port: Option<u16>) {
    loop {
        tokio::time::sleep(RENEW).await;
        let nodes: Api<Node> = Api::all(client.clone());
        let outcome = match nodes.get_metadata_opt(&config.name).await {
            Ok(Some(node)) => renew(&client, &config, node.metadata.uid.as_deref()).await,
            Ok(None) => register(&client, &config, log_port).await,
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            tracing::warn!(node = config.name, %error, "the node's heartbeat failed");
        }
    }
}

async fn renew(client: &Client, config: &NodeConfig, uid: Option<&str>) -> Result<(), kube::Error> {
    let leases: Api<Lease> = Api::namespaced(client.clone(), LEASE_NAMESPACE);
    let now = MicroTime(Timestamp::now());
    if leases.get_metadata_opt(&config.name).await?.is_some() {
        let patch = serde_json::json!({"spec": {
            "holderIdentity": config.name, "leaseDurationSeconds": LEASE_SECONDS, "renewTime": now
        }});
        leases
            .patch(&config.name, &PatchParams::default(), &Patch::Merge(&patch))
            .await?;
        return Ok(());
    }
    let owner = uid.map(|uid| OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: config.name.clone(),
        uid: uid.to_owned(),
        ..OwnerReference::default()
    });
    let lease = Lease {
        metadata: ObjectMeta {
            name: Some(config.name.clone()),
            namespace: Some(LEASE_NAMESPACE.to_owned()),
            owner_references: owner.map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(config.name.clone()),
            lease_duration_seconds: Some(LEASE_SECONDS),
            renew_time: Some(now),
            ..LeaseSpec::default()
        }),
    };
    leases.create(&PostParams::default(), &lease).await?;
    Ok(())
}

fn node(config: &NodeConfig) -> Node {
    let accelerator = if config.accelerators.real > 0 { "nvidia" } else { "none" };
    let mut labels = BTreeMap::from([
        ("kubernetes.io/hostname".to_owned(), config.name.clone()),
        ("kubernetes.io/os".to_owned(), "linux".to_owned()),
        ("kubernetes.io/arch".to_owned(), architecture().to_owned()),
        (ACCELERATOR_LABEL.to_owned(), accelerator.to_owned()),
    ]);
    labels.extend(config.labels.clone());
    let note = (
        "sandbox.flotilla.dev/accelerator-note".to_owned(),
        config.accelerators.describe(),
    );
    Node {
        metadata: ObjectMeta {
            name: Some(config.name.clone()),
            labels: Some(labels),
            annotations: Some(BTreeMap::from([note])),
            ..ObjectMeta::default()
        },
        spec: (!config.taints.is_empty()).then(|| NodeSpec {
            taints: Some(config.taints.clone()),
            ..NodeSpec::default()
        }),
        ..Node::default()
    }
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn status(config: &NodeConfig, before: Option<&NodeStatus>, now: Timestamp) -> NodeStatus {
    let capacity = BTreeMap::from([
        ("cpu".to_owned(), Quantity(config.cpus.to_string())),
        (
            "memory".to_owned(),
            Quantity(format!("{}Ki", config.memory_bytes / 1024)),
        ),
        ("pods".to_owned(), Quantity(config.max_pods.to_string())),
        (
            accelerator::RESOURCE.to_owned(),
            Quantity(config.accelerators.advertised.to_string()),
        ),
    ]);
    let emulated = if config.accelerators.is_emulated() {
        "True"
    } else {
        "False"
    };
    let conditions = [
        (
            "MemoryPressure",
            "False",
            "KubeletHasSufficientMemory",
            "kubelet has sufficient memory available".to_owned(),
        ),
        (
            "DiskPressure",
            "False",
            "KubeletHasNoDiskPressure",
            "kubelet has no disk pressure".to_owned(),
        ),
        (
            "PIDPressure",
            "False",
            "KubeletHasSufficientPID",
            "kubelet has sufficient PID available".to_owned(),
        ),
        (EMULATED, emulated, "DevicesCounted", config.accelerators.describe()),
        (
            "Ready",
            "True",
            "KubeletReady",
            "the node agent runs pods as local processes".to_owned(),
        ),
    ];
    let known = before
        .and_then(|status| status.conditions.as_deref())
        .unwrap_or_default();
    NodeStatus {
        capacity: Some(capacity.clone()),
        allocatable: Some(capacity),
        addresses: Some(vec![
            NodeAddress {
                type_: "InternalIP".to_owned(),
                address: config.addresses.host().to_string(),
            },
            NodeAddress {
                type_: "Hostname".to_owned(),
                address: config.name.clone(),
            },
        ]),
        conditions: Some(
            conditions
                .into_iter()
                .map(|(kind, status, reason, message)| condition([kind, status, reason], message, known, now))
                .collect(),
        ),
        node_info: Some(system_info()),
        ..NodeStatus::default()
    }
}

fn condition(
    [kind, status, reason]: [&str; 3],
    message: String,
    known: &[NodeCondition],
    now: Timestamp,
) -> NodeCondition {
    let since = known
        .iter()
        .find(|c| c.type_ == kind && c.status == status)
        .and_then(|c| c.last_transition_time.clone())
        .unwrap_or(Time(now));
    NodeCondition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_heartbeat_time: Some(Time(now)),
        last_transition_time: Some(since),
    }
}

fn system_info() -> NodeSystemInfo {
    let line = |path: &str| {
        std::fs::read_to_string(path)
            .map(|text| text.trim().to_owned())
            .unwrap_or_default()
    };
    NodeSystemInfo {
        architecture: architecture().to_owned(),
        boot_id: line("/proc/sys/kernel/random/boot_id"),
        container_runtime_version: format!("process://{}", env!("CARGO_PKG_VERSION")),
        kernel_version: line("/proc/sys/kernel/osrelease"),
        kube_proxy_version: String::new(),
        kubelet_version: format!("v1.33.0-flotilla.{}", env!("CARGO_PKG_VERSION")),
        machine_id: line("/etc/machine-id"),
        operating_system: "linux".to_owned(),
        os_image: "the machine itself".to_owned(),
        ..NodeSystemInfo::default()
    }
}
