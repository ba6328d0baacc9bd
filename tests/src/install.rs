//! The operator as a cluster knows it: its definitions, its service account, its role.

use std::path::Path;

use flotilla_cli::control_plane::install_definitions;

use crate::cluster::{Cluster, service_account_kubeconfig};

/// Name of the service account.
const ACCOUNT: &str = "flotilla-operator";

/// An installation that works in one namespace only.
#[derive(Clone, Debug)]
pub struct Installation {
    namespace: String,
}

impl Installation {
    /// One that lives and works in `namespace`.
    pub fn for_namespace(namespace: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
        }
    }

    /// Applies definitions, service account, role and binding.
    pub async fn apply(&self, cluster: &Cluster) -> anyhow::Result<()> {
        install_definitions(&cluster.client().await?).await?;
        let ns = &self.namespace;
        cluster
            .run("kubectl", &["create", "serviceaccount", ACCOUNT, "-n", ns])
            .await?;
        let account = format!("--serviceaccount={ns}:{ACCOUNT}");
        cluster
            .run(
                "kubectl",
                &[
                    "create",
                    "rolebinding",
                    ACCOUNT,
                    "-n",
                    ns,
                    "--clusterrole=cluster-admin",
                    &account,
                ],
            )
            .await?;
        Ok(())
    }

    /// Writes the kubeconfig of the operator's service account.
    pub async fn operator_kubeconfig(&self, cluster: &Cluster, to: &Path) -> anyhow::Result<()> {
        let account = (self.namespace.as_str(), ACCOUNT);
        service_account_kubeconfig(&cluster.client().await?, cluster.kubeconfig(), account, to).await
    }
}
