//! What the node knows about a pod it runs: the input of status and restart decisions, kept on disk.

use std::net::Ipv4Addr;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod};
use serde::{Deserialize, Serialize};

/// One pod on this node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodRecord {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
    /// Loopback address, once it is allocated.
    pub ip: Option<Ipv4Addr>,
    /// When the node took the pod on.
    pub started_at: Timestamp,
    /// Volumes are in place and the address is allocated.
    pub prepared: bool,
    /// Init containers in order, then the containers.
    pub containers: Vec<ContainerRecord>,
    /// Why the node ended the pod, if it did: reason and message of the pod's status.
    pub ended: Option<(String, String)>,
}

/// One container of a pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerRecord {
    /// Name.
    pub name: String,
    /// An init container.
    pub init: bool,
    /// Runs begun, less one.
    pub restart_count: u32,
    /// What it does now.
    pub state: State,
    /// The run before the present one.
    pub last: Option<Exit>,
    /// Readiness as the probe (or its absence) says.
    pub ready: bool,
    /// The startup probe succeeded, or there is none.
    pub started: bool,
    /// Length of the present row of restarts; decides the next delay.
    pub backoff: u32,
    /// The process of the present run.
    pub process: Option<ProcessId>,
}

/// State of a container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum State {
    /// Not running; tried (again) at `until`, or as soon as its turn comes.
    Waiting {
        /// CamelCase, as the kubelet writes it.
        reason: String,
        /// For people.
        message: Option<String>,
        /// Not before this time.
        until: Option<Timestamp>,
    },
    /// A process runs.
    Running {
        /// Since when.
        started_at: Timestamp,
    },
    /// The run ended.
    Terminated(Exit),
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Exit {
    /// Exit code; 128 + n after signal n.
    pub code: i32,
    /// Signal that ended it.
    pub signal: Option<i32>,
    /// `Completed`, `Error`, `StartError`.
    pub reason: String,
    /// Termination message.
    pub message: Option<String>,
    /// Begin of the run.
    pub started_at: Timestamp,
    /// End of the run.
    pub finished_at: Timestamp,
    /// `process://…`.
    pub container_id: Option<String>,
}

/// A process that no other can be mistaken for: numbers are reused, start times in clock ticks since boot are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessId {
    /// Process number, which is also the number of its group.
    pub pid: i32,
    /// Field 22 of `/proc/PID/stat`.
    pub start_ticks: u64,
}

impl ProcessId {
    /// The `containerID` of a status.
    pub fn container_id(self) -> String {
        format!("process://{}-{}", self.pid, self.start_ticks)
    }
}

impl PodRecord {
    /// Record of a pod that the node has just been given.
    pub fn new(pod: &Pod, now: Timestamp) -> Self {
        let spec = pod.spec.as_ref();
        let init = spec
            .and_then(|spec| spec.init_containers.as_deref())
            .unwrap_or_default();
        let main = spec.map(|spec| spec.containers.as_slice()).unwrap_or_default();
        let waiting = if init.is_empty() {
            "ContainerCreating"
        } else {
            "PodInitializing"
        };
        Self {
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            name: pod.metadata.name.clone().unwrap_or_default(),
            uid: pod.metadata.uid.clone().unwrap_or_default(),
            ip: None,
            started_at: now,
            prepared: false,
            containers: init
                .iter()
                .map(|container| ContainerRecord::new(container, true, waiting))
                .chain(
                    main.iter()
                        .map(|container| ContainerRecord::new(container, false, waiting)),
                )
                .collect(),
            ended: None,
        }
    }

    /// Whether any process of the pod runs.
    pub fn is_running(&self) -> bool {
        self.containers
            .iter()
            .any(|container| matches!(container.state, State::Running { .. }))
    }

    /// The init containers.
    pub fn init(&self) -> impl Iterator<Item = &ContainerRecord> {
        self.containers.iter().filter(|container| container.init)
    }

    /// The containers that are not init containers.
    pub fn main(&self) -> impl Iterator<Item = &ContainerRecord> {
        self.containers.iter().filter(|container| !container.init)
    }
}

impl ContainerRecord {
    fn new(container: &Container, init: bool, waiting: &str) -> Self {
        Self {
            name: container.name.clone(),
            init,
            restart_count: 0,
            state: State::waiting(waiting, None, None),
            last: None,
            ready: false,
            started: false,
            backoff: 0,
            process: None,
        }
    }

    /// The newest end of a run: of the present one or of the one before.
    pub fn newest_exit(&self) -> Option<&Exit> {
        match &self.state {
            State::Terminated(exit) => Some(exit),
            State::Waiting { .. } | State::Running { .. } => self.last.as_ref(),
        }
    }

    /// The container ran and ended with code 0.
    pub fn succeeded(&self) -> bool {
        matches!(&self.state, State::Terminated(exit) if exit.code == 0)
    }

    /// Notes the end of the present run.
    pub fn end(&mut self, exit: Exit) {
        self.ready = false;
        self.started = false;
        self.process = None;
        self.state = State::Terminated(exit);
    }
}

impl State {
    /// A waiting state.
    pub fn waiting(reason: &str, message: Option<String>, until: Option<Timestamp>) -> Self {
        Self::Waiting {
            reason: reason.to_owned(),
            message,
            until,
        }
    }
}
