//! API server, node and operator as processes of their own, each of which can be killed.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use tempfile::TempDir;

use crate::{
    eventually,
    program::{self, Running},
};

/// The processes of one story.
#[derive(Debug)]
pub struct Fleet {
    folder: TempDir,
    api_server: Option<Running>,
    node: Option<Running>,
    operator: Option<Running>,
}

impl Fleet {
    /// Starts all three and waits until the API server answers.
    pub async fn start() -> anyhow::Result<Self> {
        let mut fleet = Self {
            folder: tempfile::tempdir()?,
            api_server: None,
            node: None,
            operator: None,
        };
        fleet.start_api_server().await?;
        fleet.start_node()?;
        fleet.start_operator()?;
        Ok(fleet)
    }

    /// Directory of state, volumes and logs.
    pub fn dir(&self) -> &Path {
        self.folder.path()
    }

    /// The kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir().join("kubeconfig")
    }

    /// Directory of a claim of namespace `default`.
    pub fn claim(&self, name: &str) -> PathBuf {
        self.dir().join("volumes/default").join(name)
    }

    /// A client of the API server.
    pub async fn client(&self) -> anyhow::Result<Client> {
        let kubeconfig = Kubeconfig::read_from(self.kubeconfig()).context("kubeconfig")?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        Ok(Client::try_from(config)?)
    }

    async fn start_api_server(&mut self) -> anyhow::Result<()> {
        let dir = self.dir().display().to_string();
        let arguments = ["sandbox", "up", "--without-operator", "--without-node", "--dir", &dir].map(str::to_owned);
        self.api_server = Some(Running::start(
            "flotilla",
            &arguments,
            &[],
            &self.dir().join("api-server.log"),
        )?);
        eventually("the API server answers", Duration::from_secs(30), || async {
            let client = self.client().await?;
            Ok(Some(client.apiserver_version().await?))
        })
        .await?;
        Ok(())
    }

    /// Starts the node.
    pub fn start_node(&mut self) -> anyhow::Result<()> {
        let (dir, kubeconfig) = (
            self.dir().display().to_string(),
            self.kubeconfig().display().to_string(),
        );
        let worker = program::path("flotilla-worker")?.display().to_string();
        let arguments = [
            "sandbox",
            "node",
            "--dir",
            &dir,
            "--kubeconfig",
            &kubeconfig,
            "--worker",
            &worker,
        ]
        .map(str::to_owned);
        self.node = Some(Running::start(
            "flotilla",
            &arguments,
            &[],
            &self.dir().join("node.log"),
        )?);
        Ok(())
    }

    /// Starts the operator.
    pub fn start_operator(&mut self) -> anyhow::Result<()> {
        let kubeconfig = self.kubeconfig().display().to_string();
        let arguments = ["run", "--listen", "127.0.0.1:0", "--progress-interval", "1"].map(str::to_owned);
        let environment = [("KUBECONFIG", kubeconfig.as_str())];
        let log = self.dir().join("operator.log");
        self.operator = Some(Running::start("flotilla-operator", &arguments, &environment, &log)?);
        Ok(())
    }

    /// `kill -9` of the node's agent; its pods' processes go on until a new agent finds them.
    pub fn kill_node(&mut self) -> anyhow::Result<()> {
        self.node.take().context("the node runs")?.kill()
    }

    /// `kill -9` of the operator.
    pub fn kill_operator(&mut self) -> anyhow::Result<()> {
        self.operator.take().context("the operator runs")?.kill()
    }

    /// SIGTERM to all; none may be left.
    pub fn stop(mut self) -> anyhow::Result<()> {
        for process in [self.operator.take(), self.node.take(), self.api_server.take()]
            .into_iter()
            .flatten()
        {
            process.terminate(Duration::from_secs(30))?;
        }
        let left = program::workers_below(self.dir())?;
        anyhow::ensure!(left.is_empty(), "workers outlived the sandbox: {left:?}");
        Ok(())
    }
}
