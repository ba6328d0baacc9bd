//! API server, node and operator as processes of their own, each of which can be killed: what a story plays on.
//!
//! # Layout
//!
//! | file | what |
//! |---|---|
//! | `ground.rs` | whose API server it is, and what follows from that |
//! | `lodging.rs` | a corner of a real cluster: namespace, identities, claims |

mod ground;
mod lodging;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use flotilla_api::names;
use flotilla_cli::{apply, follow, manifest::Manifest};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client, api::ListParams};
use tempfile::TempDir;

use self::{ground::Ground, lodging::Lodging};
use crate::{
    cluster::Cluster,
    control_plane::client_in,
    program::{self, Running},
};

/// The processes of one story.
#[derive(Debug)]
pub struct Fleet {
    folder: TempDir,
    ground: Ground,
    node: Option<Running>,
    operator: Option<Running>,
}

impl Fleet {
    /// All three in a sandbox of their own.
    pub async fn in_sandbox() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let ground = Ground::sandbox(folder.path()).await?;
        Self::start(folder, ground)
    }

    /// Node and operator on a real cluster, in a namespace of their own, under the identities that they have there: the
    /// node's certificate, the operator's service account.
    pub async fn on(cluster: &Cluster) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let lodging = Lodging::take(cluster, folder.path()).await?;
        Self::start(folder, Ground::Cluster(lodging))
    }

    fn start(folder: TempDir, ground: Ground) -> anyhow::Result<Self> {
        let mut fleet = Self {
            folder,
            ground,
            node: None,
            operator: None,
        };
        fleet.start_node()?;
        fleet.start_operator()?;
        Ok(fleet)
    }

    /// Directory of state, volumes and logs.
    pub fn dir(&self) -> &Path {
        self.folder.path()
    }

    /// The namespace in which the story plays.
    pub fn namespace(&self) -> &str {
        self.ground.namespace()
    }

    /// Directory of a claim.
    pub fn claim(&self, name: &str) -> PathBuf {
        self.dir().join("volumes").join(self.namespace()).join(name)
    }

    /// An administrator's client, whose default namespace is the story's.
    pub async fn client(&self) -> anyhow::Result<Client> {
        client_in(&self.ground.admin_kubeconfig(self.dir()), self.namespace()).await
    }

    /// Makes manifests those of this ground: its namespace, its storage class, its node.
    pub fn adapt(&self, mut manifests: Vec<Manifest>) -> Vec<Manifest> {
        manifests.iter_mut().for_each(|manifest| self.ground.adapt(manifest));
        manifests
    }

    /// Applies adapted manifests.
    pub async fn apply(&self, manifests: &[Manifest]) -> anyhow::Result<()> {
        apply::apply(&self.client().await?, manifests).await
    }

    /// Applies adapted manifests and waits until each reached its goal.
    pub async fn reach(&self, manifests: &[Manifest], limit: Duration) -> anyhow::Result<()> {
        let client = self.client().await?;
        apply::apply(&client, manifests).await?;
        follow::follow(&client, manifests, limit).await
    }

    /// URL of a pod of `deployment` that is ready. Kubernetes refuses loopback addresses as endpoints of a Service, and
    /// those of the sandbox's node are loopback addresses: on a real cluster a story asks the pod itself.
    pub async fn url(&self, deployment: &str) -> anyhow::Result<String> {
        let pods: Api<Pod> = Api::default_namespaced(self.client().await?);
        let owned = format!("{}={deployment}", names::label::OWNER_NAME);
        let pods = pods.list(&ListParams::default().labels(&owned)).await?;
        let ready = pods.items.into_iter().filter_map(|pod| pod.status).find(|status| {
            let mut conditions = status.conditions.iter().flatten();
            conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True")
        });
        let ip = ready.and_then(|status| status.pod_ip);
        let ip = ip.with_context(|| format!("{deployment} has no ready pod"))?;
        Ok(format!("http://{ip}:{}", names::HTTP_PORT))
    }

    /// Starts the node.
    pub fn start_node(&mut self) -> anyhow::Result<()> {
        let worker = program::path("flotilla-worker")?.display().to_string();
        let dir = self.dir().display().to_string();
        let kubeconfig = self.ground.node_kubeconfig(self.dir()).display().to_string();
        let mut arguments = [
            "sandbox",
            "node",
            "--dir",
            &dir,
            "--kubeconfig",
            &kubeconfig,
            "--worker",
            &worker,
        ]
        .map(str::to_owned)
        .to_vec();
        arguments.extend(self.ground.node_arguments());
        let log = self.dir().join("node.log");
        self.node = Some(Running::start("flotilla", &arguments, &[], &log)?);
        Ok(())
    }

    /// Starts the operator.
    pub fn start_operator(&mut self) -> anyhow::Result<()> {
        let kubeconfig = self.ground.operator_kubeconfig(self.dir()).display().to_string();
        let mut arguments = ["run", "--listen", "127.0.0.1:0", "--progress-interval", "1"]
            .map(str::to_owned)
            .to_vec();
        arguments.extend(self.ground.operator_arguments());
        let environment = [("KUBECONFIG", kubeconfig.as_str())];
        let log = self.dir().join("operator.log");
        self.operator = Some(Running::start("flotilla-operator", &arguments, &environment, &log)?);
        Ok(())
    }

    /// `kill -9` of the node's agent, whose watchdog then kills the processes of its pods.
    pub fn kill_node(&mut self) -> anyhow::Result<()> {
        self.node.take().context("the node runs")?.kill()
    }

    /// `kill -9` of the operator.
    pub fn kill_operator(&mut self) -> anyhow::Result<()> {
        self.operator.take().context("the operator runs")?.kill()
    }

    /// SIGTERM to all, and on a cluster the end of everything that was made for the story; no process may be left.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        let limit = Duration::from_secs(30);
        if let Some(operator) = self.operator.take() {
            operator.terminate(limit)?;
        }
        // A namespace goes only while its node still lives: its pods are stopped.
        self.ground.empty().await?;
        if let Some(node) = self.node.take() {
            node.terminate(limit)?;
        }
        self.ground.leave().await?;
        let left = program::workers_below(self.folder.path())?;
        anyhow::ensure!(left.is_empty(), "workers outlived the node: {left:?}");
        Ok(())
    }
}
