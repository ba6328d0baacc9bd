//! A fleet of hollow nodes: GPU nodes that exist only in the API, for tests of scale.
//!
//! The fleet registers its Nodes, keeps their Leases, and takes each pod that a scheduler binds to one of them through
//! the states that a kubelet writes: running, finished, deleted. No process runs. It talks to the API server through
//! [`kube::Client`] alone, so it serves the sandbox's server and a real one alike; one watch and one bounded queue of
//! writes serve all nodes.
//!
//! # Layout
//!
//! | file | what it holds |
//! |---|---|
//! | `fleet.rs` | the watch and the writes |
//! | `life.rs` | pure: what a pod does next |
//! | `record.rs` | pure: what a kubelet would have observed of it |
//! | `node.rs` | pure: Node and Lease |
//! | `registration.rs` | writing Nodes and Leases |
//! | `responder.rs` | the HTTP server that answers for every pod |
//!
//! # What differs from a kubelet
//!
//! All pods of a fleet share one loopback address. Images, volumes, probes and resources of the machine play no role.
//! Containers that restart always never end; a pod that is deleted ends at once, whatever its grace period.

mod fleet;
mod life;
mod node;
mod record;
mod registration;
mod responder;

use std::{collections::BTreeMap, io, net::SocketAddr, num::NonZero, time::Duration};

pub use fleet::run;
pub use life::{RUN_FOR_ANNOTATION, RUN_FOR_ENV};

use crate::node::address::AddressError;

/// What a fleet offers and how its pods live.
#[derive(Clone, Debug)]
pub struct FleetConfig {
    /// Nodes are named `PREFIX-0`, `PREFIX-1` and so on. One fleet per prefix.
    pub prefix: String,
    /// Number of nodes.
    pub nodes: u32,
    /// `nvidia.com/gpu` of each node.
    pub gpus: u32,
    /// Processors of each node.
    pub cpus: u32,
    /// Memory of each node, in bytes.
    pub memory_bytes: u64,
    /// Pods that each node takes.
    pub max_pods: u32,
    /// More labels of the nodes.
    pub labels: BTreeMap<String, String>,
    /// How pods live.
    pub life: Life,
    /// Answer of `GET /progress` on port 8080 of every pod's address; None: nothing listens there.
    pub progress: Option<String>,
    /// Writes that may be in flight.
    pub concurrency: NonZero<u16>,
    /// Time between two renewals of a node's Lease.
    pub renew: Duration,
}

/// How pods live whose annotations and environment say nothing else.
#[derive(Clone, Debug, Default)]
pub struct Life {
    /// Time after which a pod's containers end with code 0; None: never.
    pub run_for: Option<Duration>,
    /// Termination message of a pod that finished.
    pub last_word: String,
    /// Termination message of a pod that was deleted before it finished.
    pub stopped_word: String,
}

impl FleetConfig {
    /// `nodes` nodes of 8 GPUs, 128 processors and 1 TiB each, whose pods never finish.
    pub fn new(nodes: u32) -> Self {
        Self {
            prefix: "hollow".to_owned(),
            nodes,
            gpus: 8,
            cpus: 128,
            memory_bytes: 1 << 40,
            max_pods: 110,
            labels: BTreeMap::new(),
            life: Life::default(),
            progress: None,
            concurrency: NonZero::<u16>::MIN.saturating_add(15),
            renew: Duration::from_secs(20),
        }
    }
}

/// Why a fleet cannot run.
#[derive(Debug, thiserror::Error)]
pub enum HollowError {
    /// No address for its pods.
    #[error("take a loopback address for the pods of fleet {prefix:?}: {source}")]
    Address {
        /// The fleet.
        prefix: String,
        /// Why.
        source: AddressError,
    },
    /// The responder's address is taken.
    #[error("listen on {address} to answer for the pods: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The API server refused a node.
    #[error("register Node {node}: {source}")]
    Register {
        /// Its name.
        node: String,
        /// The answer.
        source: kube::Error,
    },
    /// A pod could not be written.
    #[error("{action} Pod {namespace}/{name}: {source}")]
    Pod {
        /// What was attempted.
        action: &'static str,
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// The answer.
        source: Box<kube::Error>,
    },
}
