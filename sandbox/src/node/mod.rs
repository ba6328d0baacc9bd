//! The node: a kubelet whose containers are local processes.
//!
//! It talks to the API server through [`kube::Client`] alone, so it serves the sandbox's server and a real one alike.
//! A pod is a set of process groups with a loopback address of its own; an image is a local binary; a volume is a
//! directory, whose mount path is rewritten in command, arguments and environment ([`rewrite`]). A container has no
//! namespaces and no limits: it sees the machine, runs as the same user and is trusted as such.
//!
//! # Layout
//!
//! | file | what it holds |
//! |---|---|
//! | `agent.rs` | which pods this node has; one worker each |
//! | `pod_worker.rs` | one pod: prepare, start, stop, delete |
//! | `stop.rs` | when a pod must stop, and how its containers are stopped |
//! | `publish.rs` | writing status and record |
//! | `container.rs` | from a container's spec to a running process with logs and probes |
//! | `record.rs`, `status.rs`, `restart.rs` | pure: what was observed, the pod status that follows, what starts next |
//! | `environment.rs`, `expansion.rs`, `downward.rs`, `sources.rs`, `quantity.rs` | environment variables |
//! | `rewrite.rs`, `image.rs`, `accelerator.rs` | paths, binaries and GPUs as they are on this machine |
//! | `volume/` | volumes as directories |
//! | `process.rs`, `guard.rs`, `leftover.rs` | process groups that never outlive the node |
//! | `probe.rs` | startup, readiness and liveness |
//! | `log/` | container logs on disk and their readers |
//! | `log_server.rs` | logs over mutual TLS, for the API server of a real cluster |
//! | `address.rs` | loopback addresses |
//! | `registration.rs`, `event.rs` | Node, Lease, Events |
//!
//! # On disk
//!
//! `DIR/pods/UID/record.json` (what was observed), `DIR/pods/UID/volumes`, `DIR/pods/UID/containers`,
//! `DIR/logs/NAMESPACE/POD_UID/CONTAINER/RESTART.log`, `DIR/volumes/NAMESPACE/CLAIM`.
//!
//! # When the agent is killed
//!
//! Its watchdog ([`guard`]) kills every container at once. The next agent on the same directory kills what is left of
//! the recorded processes, notes their ends (exit code 137) and applies the restart policy: no process runs on
//! unseen and none runs twice.

pub mod accelerator;
pub mod address;
mod agent;
mod container;
mod downward;
mod environment;
pub mod event;
mod expansion;
pub mod guard;
mod image;
mod leftover;
pub mod log;
mod log_server;
mod pod_worker;
pub mod probe;
pub mod process;
mod publish;
pub mod quantity;
pub mod record;
mod registration;
pub mod restart;
pub mod rewrite;
mod sources;
pub(crate) mod status;
mod stop;
mod volume;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

pub use agent::{Agent, NodeError};
pub use image::Images;
pub use log::{LogFiles, LogLimits};
pub use log_server::LogServerError;
pub use registration::ACCELERATOR_LABEL;
pub use volume::claim_dir;

use accelerator::Accelerators;
use address::AddressBlock;
use k8s_openapi::api::core::v1::Taint;
use restart::Backoff;

/// How a node runs.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Name of the Node.
    pub name: String,
    /// Absolute directory of pods, logs and claims. One agent at a time.
    pub dir: PathBuf,
    /// Image names and their binaries.
    pub images: Images,
    /// Advertised and real GPUs.
    pub accelerators: Accelerators,
    /// Where addresses of pods come from.
    pub addresses: Arc<AddressBlock>,
    /// Advertised processors.
    pub cpus: usize,
    /// Advertised memory.
    pub memory_bytes: u64,
    /// Pods at a time.
    pub max_pods: u32,
    /// More labels of the Node.
    pub labels: BTreeMap<String, String>,
    /// Taints that the Node is made with.
    pub taints: Vec<Taint>,
    /// Authorities (DER) of the client certificates with which a real API server asks for logs; None serves none.
    pub client_authority: Option<Vec<Vec<u8>>>,
    /// Delays between restarts.
    pub backoff: Backoff,
    /// Size of logs.
    pub log_limits: LogLimits,
    /// How often volumes follow their ConfigMaps and Secrets.
    pub sync_period: Duration,
    /// Longest wait for containers when the agent is told to stop.
    pub shutdown_grace: Duration,
    /// Variables of the agent's own environment that containers get too.
    pub pass_env: Vec<String>,
}

impl NodeConfig {
    /// The machine as it is, without GPUs, with restarts that begin after one second.
    pub fn new(name: &str, dir: &Path, addresses: Arc<AddressBlock>) -> Self {
        let pass_env = [
            "RUST_LOG",
            "RUST_BACKTRACE",
            "RAYON_NUM_THREADS",
            "FLOTILLA_DEVICE",
            "LD_LIBRARY_PATH",
            "TZ",
            "LANG",
        ];
        Self {
            name: name.to_owned(),
            dir: dir.to_owned(),
            images: Images::default(),
            accelerators: Accelerators::detect(0),
            addresses,
            cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory_bytes: total_memory().unwrap_or(1 << 30),
            max_pods: 110,
            labels: BTreeMap::new(),
            taints: Vec::new(),
            client_authority: None,
            backoff: Backoff {
                base: Duration::from_secs(1),
                ..Backoff::default()
            },
            log_limits: LogLimits::default(),
            sync_period: Duration::from_secs(10),
            shutdown_grace: Duration::from_secs(10),
            pass_env: pass_env.map(str::to_owned).to_vec(),
        }
    }
}

fn total_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace()
        .next()?
        .parse::<u64>()
        .ok()
        .map(|kibibytes| kibibytes * 1024)
}
