//! The server that is asked, and the definitions that the checks need on it.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Client, Config,
    api::{DeleteParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use rand::Rng;
use tempfile::TempDir;

use super::definition;
use crate::eventually;

/// How long a definition may take until it is served.
const PATIENCE: Duration = Duration::from_secs(30);

/// Whose server it is: known differences are the sandbox's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The embedded control plane.
    Sandbox,
    /// A real kube-apiserver.
    Kubernetes,
}

/// A server under question.
pub struct Server {
    /// Whose it is.
    pub kind: Kind,
    /// An administrator's client.
    pub client: Client,
    /// The administrator's kubeconfig.
    pub kubeconfig: PathBuf,
    /// The program kubectl, where there is one.
    pub kubectl: Option<PathBuf>,
    /// API group of the suite's definitions; no other suite has it.
    pub group: String,
    /// Home of kubectl: its caches.
    pub home: TempDir,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("kind", &self.kind)
            .field("group", &self.group)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// The server of a kubeconfig, with the definitions of the suite.
    pub async fn prepare(kind: Kind, kubeconfig: &Path, kubectl: Option<PathBuf>) -> anyhow::Result<Self> {
        let read = Kubeconfig::read_from(kubeconfig).context("kubeconfig")?;
        let mut config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await?;
        // A watch may be silent for longer than other requests, and a refusal is an answer.
        config.read_timeout = None;
        config.default_retry = false;
        let group = format!("c{:08x}.conformance.flotilla.dev", rand::rng().random::<u32>());
        let server = Self {
            kind,
            client: Client::try_from(config)?,
            kubeconfig: kubeconfig.to_owned(),
            kubectl,
            group,
            home: tempfile::tempdir()?,
        };
        server.define().await?;
        Ok(server)
    }

    async fn define(&self) -> anyhow::Result<()> {
        let definitions: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        let all = definition::all(&self.group)?;
        for definition in &all {
            let definition = serde_json::from_value(definition.clone())?;
            definitions.create(&PostParams::default(), &definition).await?;
        }
        for definition in &all {
            let (plural, version) = (
                &definition["spec"]["names"]["plural"],
                &definition["spec"]["versions"][0]["name"],
            );
            let path = format!(
                "/apis/{}/{}/{}",
                self.group,
                version.as_str().context("a version")?,
                plural.as_str().context("a plural")?
            );
            eventually(&path, PATIENCE, || async {
                let request = http::Request::get(&path).body(Vec::new())?;
                Ok(Some(self.client.request::<serde_json::Value>(request).await?))
            })
            .await?;
        }
        Ok(())
    }

    /// Takes the definitions away, and with them every object of theirs.
    pub async fn clean(&self) -> anyhow::Result<()> {
        let definitions: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        for definition in definition::all(&self.group)? {
            let name = definition["metadata"]["name"].as_str().unwrap_or_default();
            definitions.delete(name, &DeleteParams::default()).await?;
        }
        Ok(())
    }
}

/// kubectl on the search path, if it is there.
#[must_use]
pub fn kubectl_on_path() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join("kubectl"))
        .find(|program| program.is_file())
}
