//! An API server, the controllers and a node in one directory, and waiting for what they do.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use flotilla_sandbox::{
    Sandbox, Settings,
    controller::{self, ControllerConfig},
    node::{Agent, Images, LogFiles, NodeConfig, NodeError, accelerator::Accelerators, address::AddressBlock},
};
use k8s_openapi::api::core::v1::{ContainerStatus, Event, Pod};
use kube::{
    Api, Client, ResourceExt,
    api::{ListParams, PostParams},
};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Long enough for a busy machine; nothing waits for it when all is well.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Everything in one process.
pub struct Cluster {
    pub dir: tempfile::TempDir,
    pub client: Client,
    pub addresses: Arc<AddressBlock>,
    sandbox: Sandbox,
    shutdown: CancellationToken,
    controllers: JoinHandle<()>,
    agent: Option<(JoinHandle<Result<(), NodeError>>, CancellationToken)>,
}

impl Cluster {
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let sandbox = Sandbox::start(Settings::new(dir.path())).await.unwrap();
        sandbox.set_pod_logs(Arc::new(LogFiles::new(dir.path().to_owned())));
        let client = sandbox.client().await.unwrap();
        let addresses = AddressBlock::claim(dir.path()).unwrap();
        let shutdown = CancellationToken::new();
        let config = ControllerConfig {
            dir: dir.path().to_owned(),
            addresses: Arc::clone(&addresses),
        };
        let controllers = tokio::spawn(controller::run(client.clone(), config, shutdown.clone()));
        let mut cluster = Self {
            dir,
            client,
            addresses,
            sandbox,
            shutdown,
            controllers,
            agent: None,
        };
        cluster.start_agent();
        cluster
    }

    pub fn node_config(&self) -> NodeConfig {
        let mut config = NodeConfig::new("node-1", self.dir.path(), Arc::clone(&self.addresses));
        config.images = Images::new(BTreeMap::from([("sh".to_owned(), PathBuf::from("/bin/sh"))]));
        config.accelerators = Accelerators { advertised: 2, real: 0 };
        config.backoff.base = Duration::from_millis(300);
        config.sync_period = Duration::from_millis(500);
        config.cpus = 64;
        config
    }

    pub fn start_agent(&mut self) {
        let token = CancellationToken::new();
        let agent = tokio::spawn(Agent::run(self.client.clone(), self.node_config(), token.clone()));
        self.agent = Some((agent, token));
    }

    /// Ends the agent without a word, as a crash would.
    pub async fn crash_agent(&mut self) {
        let (agent, _) = self.agent.take().unwrap();
        agent.abort();
        assert!(agent.await.unwrap_err().is_cancelled());
    }

    /// Asks the agent to stop and waits for it.
    pub async fn stop_agent(&mut self) {
        let (agent, token) = self.agent.take().unwrap();
        token.cancel();
        agent.await.unwrap().unwrap();
    }

    pub async fn stop(mut self) {
        if self.agent.is_some() {
            self.stop_agent().await;
        }
        self.shutdown.cancel();
        self.controllers.await.unwrap();
        self.sandbox.shutdown().await.unwrap();
    }

    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), "default")
    }

    pub async fn create<K>(&self, object: Value) -> K
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + serde::Serialize
            + serde::de::DeserializeOwned,
    {
        let object: K = serde_json::from_value(object).unwrap();
        self.api::<K>().create(&PostParams::default(), &object).await.unwrap()
    }

    /// Creates a pod with one container that runs `script`; `extra` is merged into the pod's spec.
    pub async fn run(&self, name: &str, script: &str, extra: Value) -> Pod {
        let mut spec = json!({"restartPolicy": "Never", "terminationGracePeriodSeconds": 5});
        let mut container = json!({"name": "main", "image": "sh", "args": ["-c", script]});
        merge(&mut container, &extra["container"]);
        spec["containers"] = json!([container]);
        let mut rest = extra;
        if let Some(map) = rest.as_object_mut() {
            map.remove("container");
        }
        merge(&mut spec, &rest);
        self.create(json!({"metadata": {"name": name, "labels": {"app": name}}, "spec": spec}))
            .await
    }

    /// Waits until `condition` holds for the pod.
    pub async fn wait_for(&self, name: &str, what: &str, condition: impl Fn(&Pod) -> bool) -> Pod {
        let api = self.api::<Pod>();
        let since = Instant::now();
        loop {
            let pod = api.get_opt(name).await.unwrap();
            if let Some(pod) = pod.as_ref().filter(|pod| condition(pod)) {
                return pod.clone();
            }
            assert!(
                since.elapsed() < PATIENCE,
                "{name}: {what}: {}",
                serde_json::to_string_pretty(&pod).unwrap()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub async fn wait_for_phase(&self, name: &str, phase: &str) -> Pod {
        self.wait_for(name, phase, |pod| {
            pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some(phase)
        })
        .await
    }

    pub async fn wait_until_gone<K>(&self, name: &str)
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
    {
        let api = self.api::<K>();
        eventually(&format!("{name} is gone"), async || {
            api.get_opt(name).await.unwrap().is_none()
        })
        .await;
    }

    /// Waits for an event with `reason` about the object and returns its message.
    pub async fn event(&self, object: &str, reason: &str) -> String {
        let api = self.api::<Event>();
        let since = Instant::now();
        loop {
            let events = api.list(&ListParams::default()).await.unwrap();
            let mut found = events.items.into_iter().filter(|event| {
                event.involved_object.name.as_deref() == Some(object) && event.reason.as_deref() == Some(reason)
            });
            if let Some(event) = found.next() {
                return event.message.unwrap_or_default();
            }
            assert!(since.elapsed() < PATIENCE, "no event {reason} about {object}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub fn volume(&self, claim: &str) -> PathBuf {
        self.dir.path().join("volumes/default").join(claim)
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

fn merge(into: &mut Value, from: &Value) {
    if let (Some(into), Some(from)) = (into.as_object_mut(), from.as_object()) {
        for (key, value) in from {
            into.insert(key.clone(), value.clone());
        }
    }
}

/// Asks until the answer is yes.
pub async fn eventually(what: &str, condition: impl AsyncFn() -> bool) {
    let since = Instant::now();
    while !condition().await {
        assert!(since.elapsed() < PATIENCE, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Status of the container `main`.
pub fn container(pod: &Pod) -> &ContainerStatus {
    let statuses = pod
        .status
        .as_ref()
        .and_then(|status| status.container_statuses.as_deref())
        .unwrap_or_default();
    statuses.iter().find(|status| status.name == "main").unwrap()
}

pub fn restarts(pod: &Pod) -> i32 {
    let statuses = pod
        .status
        .as_ref()
        .and_then(|status| status.container_statuses.as_deref())
        .unwrap_or_default();
    statuses.iter().map(|status| status.restart_count).max().unwrap_or(0)
}

pub fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready") == Some("True")
}

pub fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<&'a str> {
    let conditions = pod.status.as_ref()?.conditions.as_deref()?;
    conditions
        .iter()
        .find(|condition| condition.type_ == kind)
        .map(|condition| condition.status.as_str())
}

pub fn pod_ip(pod: &Pod) -> String {
    pod.status.as_ref().and_then(|status| status.pod_ip.clone()).unwrap()
}

/// Processes of the pod that still run.
pub fn processes(pod: &Pod) -> usize {
    flotilla_sandbox::node::process::marked(&pod.uid().unwrap()).len()
}
