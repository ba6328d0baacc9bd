//! Where the programs of the control plane are.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};

use crate::root;

/// Variable that names their folder; without it `tests/cluster/build.sh` builds them once and says where they are.
pub const FOLDER_ENV: &str = "FLOTILLA_CONTROL_PLANE_BIN";

/// The folder of etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubectl and helm.
#[derive(Clone, Debug)]
pub struct Programs {
    folder: PathBuf,
}

impl Programs {
    /// Finds them, or builds them first (about 15 minutes on 2 cores, once per set of versions).
    pub fn build() -> anyhow::Result<Self> {
        if let Some(folder) = std::env::var_os(FOLDER_ENV) {
            return Ok(Self { folder: folder.into() });
        }
        let script = root().join("tests/cluster/build.sh");
        let output = Command::new(&script)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("run {}", script.display()))?;
        ensure!(
            output.status.success(),
            "{} ended with {}",
            script.display(),
            output.status
        );
        let folder = String::from_utf8(output.stdout).context("the folder that build.sh prints")?;
        Ok(Self {
            folder: folder.trim().into(),
        })
    }

    /// Their folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// One of them.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}
