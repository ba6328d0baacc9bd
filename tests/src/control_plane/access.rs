//! Kubeconfigs: how callers find the API server and who they are.

use std::path::{Path, PathBuf};

use anyhow::Context;
use flotilla_sandbox::kubeconfig::write_private;
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::json;

use super::certificates::Subject;

/// The kubeconfig of `subject`.
pub fn path(dir: &Path, subject: Subject) -> PathBuf {
    dir.join(format!("{}.kubeconfig", subject.file()))
}

/// Writes the kubeconfig of `subject`; it names the files of its credentials.
pub fn write(dir: &Path, subject: Subject, port: u16) -> anyhow::Result<()> {
    let file = |name: String| dir.join(name).display().to_string();
    let stem = subject.file();
    let text = serde_yaml::to_string(&json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "flotilla-test", "cluster": {
            "server": format!("https://127.0.0.1:{port}"), "certificate-authority": file("ca.crt".to_owned())}}],
        "users": [{"name": stem, "user": {
            "client-certificate": file(format!("{stem}.crt")), "client-key": file(format!("{stem}.key"))}}],
        "contexts": [{"name": stem, "context": {"cluster": "flotilla-test", "user": stem}}],
        "current-context": stem,
    }))?;
    let path = path(dir, subject);
    write_private(&path, &text).with_context(|| format!("write {}", path.display()))
}

/// Makes the administrator's kubeconfig known under the name that people look for.
pub fn publish(dir: &Path) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(path(dir, Subject::Administrator))?;
    let path = dir.join("kubeconfig");
    write_private(&path, &text).with_context(|| format!("write {}", path.display()))
}

/// A client with the kubeconfig at `path`.
pub async fn client_of(path: &Path) -> anyhow::Result<Client> {
    Ok(Client::try_from(config_of(path).await?)?)
}

/// As [`client_of`], with `namespace` as the default one.
pub async fn client_in(path: &Path, namespace: &str) -> anyhow::Result<Client> {
    let mut config = config_of(path).await?;
    namespace.clone_into(&mut config.default_namespace);
    Ok(Client::try_from(config)?)
}

/// As [`client_in`], but a request that is refused for the moment (429, 503) is refused: it is not sent again.
pub async fn impatient_client_in(path: &Path, namespace: &str) -> anyhow::Result<Client> {
    let mut config = config_of(path).await?;
    namespace.clone_into(&mut config.default_namespace);
    config.default_retry = false;
    Ok(Client::try_from(config)?)
}

async fn config_of(path: &Path) -> anyhow::Result<Config> {
    let kubeconfig = Kubeconfig::read_from(path).with_context(|| format!("read {}", path.display()))?;
    Ok(Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?)
}
