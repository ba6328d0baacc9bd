//! Another caller's kubeconfig for the cluster of an administrator's.

use std::path::Path;

use anyhow::Context;
use flotilla_sandbox::kubeconfig::write_private;
use kube::config::Kubeconfig;
use serde_json::{Value, json};

/// Writes `to`: the current cluster of `admin`, for `user` with `credentials` and the default namespace `namespace`.
pub fn for_user(admin: &Path, user: &str, credentials: &Value, namespace: &str, to: &Path) -> anyhow::Result<()> {
    let mut kubeconfig = serde_json::to_value(Kubeconfig::read_from(admin)?)?;
    let current = kubeconfig["current-context"].clone();
    let mut contexts = kubeconfig["contexts"].as_array().into_iter().flatten();
    let cluster = contexts
        .find(|context| context["name"] == current)
        .map(|context| context["context"]["cluster"].clone())
        .with_context(|| format!("{} has no current context", admin.display()))?;
    kubeconfig["users"] = json!([{"name": user, "user": credentials}]);
    kubeconfig["contexts"] =
        json!([{"name": user, "context": {"cluster": cluster, "user": user, "namespace": namespace}}]);
    kubeconfig["current-context"] = json!(user);
    write_private(to, &serde_yaml::to_string(&kubeconfig)?).with_context(|| format!("write {}", to.display()))
}
