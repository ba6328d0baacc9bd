//! The cluster that the cluster tier runs on: the real control plane of this machine, or one that the user has.
//!
//! # Layout
//!
//! | file | what |
//! |---|---|
//! | `kubeconfig.rs` | another caller's kubeconfig for the same cluster |
//! | `namespace.rs` | a namespace of a test's own, gone with all that was made for it |
//! | `node_identity.rs` | the kubeconfig of a node, from a signed CertificateSigningRequest |
//! | `service_account.rs` | the kubeconfig of a service account, from a TokenRequest |

mod kubeconfig;
mod namespace;
mod node_identity;
mod service_account;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};
use kube::Client;
use tempfile::TempDir;

pub use self::{namespace::TestNamespace, node_identity::node_kubeconfig, service_account::service_account_kubeconfig};
use crate::control_plane::{self, ControlPlane, Programs, client_of};

/// Variable with the directory of a control plane that `flotilla-cluster run` started.
pub const DIR_ENV: &str = "FLOTILLA_CLUSTER_DIR";

/// A cluster on which tests may act as administrators.
#[derive(Debug)]
pub struct Cluster {
    kubeconfig: PathBuf,
    programs: Programs,
    dir: Option<PathBuf>,
    // Started by and for this process; the folder goes last.
    own: Option<(ControlPlane, TempDir)>,
}

impl Cluster {
    /// The control plane of `flotilla-cluster run` if this runs under it, else the cluster of KUBECONFIG, else a control
    /// plane for this process alone.
    pub async fn connect() -> anyhow::Result<Self> {
        if let Some(kubeconfig) = std::env::var_os("KUBECONFIG").filter(|path| !path.is_empty()) {
            let cluster = Self {
                kubeconfig: PathBuf::from(kubeconfig),
                programs: Programs::build()?,
                dir: std::env::var_os(DIR_ENV).map(PathBuf::from),
                own: None,
            };
            let client = cluster.client().await?;
            let version = client.apiserver_version().await;
            version.with_context(|| format!("reach the cluster of KUBECONFIG={}", cluster.kubeconfig.display()))?;
            return Ok(cluster);
        }
        Self::alone().await
    }

    /// A control plane for this process alone: for tests that install definitions or work in all namespaces.
    pub async fn alone() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let plane = ControlPlane::start(folder.path()).await?;
        Ok(Self {
            kubeconfig: plane.kubeconfig(),
            programs: plane.programs().clone(),
            dir: Some(plane.dir().to_owned()),
            own: Some((plane, folder)),
        })
    }

    /// An administrator's kubeconfig.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// An administrator's client.
    pub async fn client(&self) -> anyhow::Result<Client> {
        client_of(&self.kubeconfig).await
    }

    /// kubectl and helm.
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// The audit log; None on a cluster that is not ours.
    pub fn audit_log(&self) -> Option<PathBuf> {
        self.dir.as_deref().map(control_plane::audit_log)
    }

    /// kubectl or helm with `arguments`, as an administrator; what it printed, or an error with what it complained about.
    pub async fn run(&self, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(self.programs.path(program));
        command.args(arguments).env("KUBECONFIG", &self.kubeconfig);
        let what = format!("{program} {}", arguments.join(" "));
        let output = tokio::task::spawn_blocking(move || command.output()).await?;
        let output = output.with_context(|| what.clone())?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{what}: {complaint}");
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Stops what was started for this process.
    pub fn stop(self) -> anyhow::Result<()> {
        self.own.map_or(Ok(()), |(plane, _folder)| plane.stop())
    }
}
