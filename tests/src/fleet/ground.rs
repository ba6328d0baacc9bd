//! Whose API server a story plays on, and what follows from that.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use flotilla_cli::{control_plane::install_definitions, manifest::Manifest};

use super::lodging::Lodging;
use crate::{control_plane::client_of, eventually, program::Running};

/// Namespace of stories in a sandbox.
const SANDBOX_NAMESPACE: &str = "default";

/// The API server.
#[derive(Debug)]
pub enum Ground {
    /// Our own; one token may do everything.
    Sandbox(Option<Running>),
    /// Kubernetes'.
    Cluster(Lodging),
}

impl Ground {
    /// Starts a sandbox's API server in `dir` and waits until it answers.
    pub async fn sandbox(dir: &Path) -> anyhow::Result<Self> {
        let text = dir.display().to_string();
        let arguments = ["sandbox", "up", "--without-operator", "--without-node", "--dir", &text].map(str::to_owned);
        let running = Running::start("flotilla", &arguments, &[], &dir.join("api-server.log"))?;
        let ground = Self::Sandbox(Some(running));
        let client = eventually("the API server answers", Duration::from_secs(30), || async {
            let client = client_of(&ground.admin_kubeconfig(dir)).await?;
            client.apiserver_version().await?;
            Ok(Some(client))
        })
        .await?;
        install_definitions(&client).await?;
        Ok(ground)
    }

    /// The namespace in which the story plays.
    pub fn namespace(&self) -> &str {
        match self {
            Self::Sandbox(_) => SANDBOX_NAMESPACE,
            Self::Cluster(lodging) => lodging.namespace(),
        }
    }

    /// Kubeconfig of who may do everything.
    pub fn admin_kubeconfig(&self, dir: &Path) -> PathBuf {
        match self {
            Self::Sandbox(_) => dir.join("kubeconfig"),
            Self::Cluster(lodging) => lodging.admin_kubeconfig().to_owned(),
        }
    }

    /// Kubeconfig of the node.
    pub fn node_kubeconfig(&self, dir: &Path) -> PathBuf {
        match self {
            Self::Sandbox(_) => self.admin_kubeconfig(dir),
            Self::Cluster(_) => Lodging::node_kubeconfig(dir),
        }
    }

    /// Kubeconfig of the operator.
    pub fn operator_kubeconfig(&self, dir: &Path) -> PathBuf {
        match self {
            Self::Sandbox(_) => self.admin_kubeconfig(dir),
            Self::Cluster(_) => Lodging::operator_kubeconfig(dir),
        }
    }

    /// More arguments of the node.
    pub fn node_arguments(&self) -> Vec<String> {
        match self {
            Self::Sandbox(_) => Vec::new(),
            Self::Cluster(lodging) => lodging.node_arguments(),
        }
    }

    /// More arguments of the operator.
    pub fn operator_arguments(&self) -> Vec<String> {
        match self {
            Self::Sandbox(_) => Vec::new(),
            Self::Cluster(lodging) => lodging.operator_arguments(),
        }
    }

    /// Makes a manifest one of this ground.
    pub fn adapt(&self, manifest: &mut Manifest) {
        if let Self::Cluster(lodging) = self {
            lodging.adapt(manifest);
        }
    }

    /// Deletes the objects of the story, where they would outlive it.
    pub async fn empty(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Sandbox(_) => Ok(()),
            Self::Cluster(lodging) => lodging.empty().await,
        }
    }

    /// Stops what the story started.
    pub async fn leave(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Sandbox(running) => running
                .take()
                .map_or(Ok(()), |running| running.terminate(Duration::from_secs(30))),
            Self::Cluster(lodging) => lodging.leave().await,
        }
    }
}
