//! The Helm chart: rendered, installed, and its operator as a process of this machine under exactly the chart's identity.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use serde::Deserialize as _;
use serde_json::Value;

use crate::{
    cluster::{Cluster, service_account_kubeconfig},
    program::Running,
    root,
};

/// Name of the release, of its operator, and of its service account.
pub const RELEASE: &str = "flotilla";
/// Name of Deployment, ServiceAccount, roles and Lease.
pub const OPERATOR: &str = "flotilla-operator";

/// Folder of the chart.
pub fn folder() -> PathBuf {
    root().join("charts/flotilla")
}

/// The chart at one place of a cluster.
#[derive(Clone, Debug)]
pub struct Chart {
    folder: PathBuf,
    namespace: String,
}

impl Chart {
    /// This checkout's chart, released to `namespace`.
    pub fn new(namespace: &str) -> Self {
        Self::of(&folder(), namespace)
    }

    /// The chart in `folder`, released to `namespace`.
    pub fn of(folder: &Path, namespace: &str) -> Self {
        Self {
            folder: folder.to_owned(),
            namespace: namespace.to_owned(),
        }
    }

    /// Namespace of the release.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// `helm VERB RELEASE CHART`, with `--set` for each of `values`.
    pub async fn helm(&self, cluster: &Cluster, verb: &str, values: &[&str]) -> anyhow::Result<String> {
        let folder = self.folder.display().to_string();
        let mut arguments = vec![verb, RELEASE, &folder, "--namespace", &self.namespace];
        if verb == "install" {
            arguments.push("--create-namespace");
        }
        arguments.extend(values.iter().flat_map(|value| ["--set", *value]));
        cluster.run("helm", &arguments).await
    }

    /// `helm uninstall`.
    pub async fn uninstall(&self, cluster: &Cluster) -> anyhow::Result<String> {
        cluster
            .run(
                "helm",
                &["uninstall", RELEASE, "--namespace", &self.namespace, "--wait"],
            )
            .await
    }

    /// The objects of the chart with `values`.
    pub async fn render(&self, cluster: &Cluster, values: &[&str]) -> anyhow::Result<Vec<Value>> {
        documents(&self.helm(cluster, "template", values).await?)
    }

    /// Writes the kubeconfig of the operator's service account.
    pub async fn operator_kubeconfig(&self, cluster: &Cluster, to: &Path) -> anyhow::Result<()> {
        let account = (self.namespace.as_str(), OPERATOR);
        service_account_kubeconfig(&cluster.client().await?, cluster.kubeconfig(), account, to).await
    }

    /// Name of the operator's service account as a user.
    pub fn user(&self) -> String {
        format!("system:serviceaccount:{}:{OPERATOR}", self.namespace)
    }
}

/// Every document of a YAML stream.
pub fn documents(text: &str) -> anyhow::Result<Vec<Value>> {
    let mut found = Vec::new();
    for document in serde_yaml::Deserializer::from_str(text) {
        let value = Value::deserialize(document).context("rendered YAML")?;
        if !value.is_null() {
            found.push(value);
        }
    }
    Ok(found)
}

/// The only object of this kind and name.
pub fn object<'a>(objects: &'a [Value], kind: &str, name: &str) -> anyhow::Result<&'a Value> {
    let mut found = objects
        .iter()
        .filter(|object| object["kind"] == kind && object["metadata"]["name"] == name);
    let first = found.next().with_context(|| format!("{kind} {name} is rendered"))?;
    ensure!(found.next().is_none(), "{kind} {name} is rendered twice");
    Ok(first)
}

/// Arguments of the operator's container, except that it listens on a free port of this machine.
pub fn operator_arguments(objects: &[Value]) -> anyhow::Result<Vec<String>> {
    let deployment = object(objects, "Deployment", OPERATOR)?;
    let arguments = deployment.pointer("/spec/template/spec/containers/0/args");
    let arguments = arguments
        .and_then(Value::as_array)
        .context("arguments of the operator")?;
    let local = |argument: &Value| match argument.as_str().unwrap_or_default() {
        listen if listen.starts_with("--listen=") => "--listen=127.0.0.1:0".to_owned(),
        other => other.to_owned(),
    };
    Ok(arguments.iter().map(local).collect())
}

/// Starts the operator of rendered `objects` as the pod `name` of `namespace` would run it.
pub fn start_operator(
    objects: &[Value],
    kubeconfig: &Path,
    (namespace, name): (&str, &str),
    log: &Path,
) -> anyhow::Result<Running> {
    let kubeconfig = kubeconfig.display().to_string();
    let environment = [
        ("KUBECONFIG", kubeconfig.as_str()),
        ("POD_NAME", name),
        ("POD_NAMESPACE", namespace),
        ("RUST_LOG", "info"),
        ("RUST_BACKTRACE", "0"),
    ];
    Running::start("flotilla-operator", &operator_arguments(objects)?, &environment, log)
}
