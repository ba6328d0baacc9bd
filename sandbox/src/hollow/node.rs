//! The Node and the Lease of a hollow node.

use std::{collections::BTreeMap, net::Ipv4Addr};

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        coordination::v1::{Lease, LeaseSpec},
        core::v1::{Node, NodeAddress, NodeCondition, NodeStatus, NodeSystemInfo},
    },
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference, Time},
    },
};

use super::FleetConfig;
use crate::node::accelerator;

/// Namespace of node leases.
pub const LEASE_NAMESPACE: &str = "kube-node-lease";
/// The kubelet's lease duration, in seconds.
const LEASE_SECONDS: i32 = 40;
/// Label with the prefix of the fleet.
const FLEET_LABEL: &str = "hollow.sandbox.flotilla.dev/fleet";

/// Names of all nodes of a fleet.
pub fn names(config: &FleetConfig) -> impl Iterator<Item = String> + '_ {
    (0..config.nodes).map(|index| format!("{}-{index}", config.prefix))
}

/// The Node without its status.
pub fn node(config: &FleetConfig, name: &str) -> Node {
    let label = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let mut labels = BTreeMap::from([
        label("kubernetes.io/hostname", name),
        label("kubernetes.io/os", "linux"),
        label("kubernetes.io/arch", "amd64"),
        label("node.kubernetes.io/instance-type", "hollow"),
        label(FLEET_LABEL, &config.prefix),
    ]);
    labels.extend(config.labels.clone());
    Node {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            labels: Some(labels),
            ..ObjectMeta::default()
        },
        ..Node::default()
    }
}

/// The status of a Node that is ready.
pub fn status(config: &FleetConfig, name: &str, host: Ipv4Addr, now: Timestamp) -> NodeStatus {
    let capacity = BTreeMap::from([
        ("cpu".to_owned(), Quantity(config.cpus.to_string())),
        (
            "memory".to_owned(),
            Quantity(format!("{}Ki", config.memory_bytes / 1024)),
        ),
        ("pods".to_owned(), Quantity(config.max_pods.to_string())),
        (accelerator::RESOURCE.to_owned(), Quantity(config.gpus.to_string())),
    ]);
    let address = |type_: &str, address: String| NodeAddress {
        type_: type_.to_owned(),
        address,
    };
    let text = "pods of this node become Running without a process";
    let conditions = [
        ("MemoryPressure", "False", "Hollow"),
        ("DiskPressure", "False", "Hollow"),
        ("PIDPressure", "False", "Hollow"),
        ("Ready", "True", "KubeletReady"),
    ];
    let conditions = conditions.map(|(type_, status, reason)| NodeCondition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(text.to_owned()),
        last_heartbeat_time: Some(Time(now)),
        last_transition_time: Some(Time(now)),
    });
    NodeStatus {
        capacity: Some(capacity.clone()),
        allocatable: Some(capacity),
        addresses: Some(vec![
            address("InternalIP", host.to_string()),
            address("Hostname", name.to_owned()),
        ]),
        conditions: Some(conditions.to_vec()),
        node_info: Some(NodeSystemInfo {
            architecture: "amd64".to_owned(),
            operating_system: "linux".to_owned(),
            os_image: "none".to_owned(),
            container_runtime_version: format!("hollow://{}", env!("CARGO_PKG_VERSION")),
            kubelet_version: format!("v1.33.0-hollow.{}", env!("CARGO_PKG_VERSION")),
            ..NodeSystemInfo::default()
        }),
        ..NodeStatus::default()
    }
}

/// The Lease of a Node; it goes with the Node.
pub fn lease(name: &str, uid: Option<String>, now: Timestamp) -> Lease {
    let owner = uid.map(|uid| OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: name.to_owned(),
        uid,
        ..OwnerReference::default()
    });
    Lease {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(LEASE_NAMESPACE.to_owned()),
            owner_references: owner.map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(name.to_owned()),
            lease_duration_seconds: Some(LEASE_SECONDS),
            renew_time: Some(MicroTime(now)),
            ..LeaseSpec::default()
        }),
    }
}
