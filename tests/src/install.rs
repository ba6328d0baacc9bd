//! The operator as a cluster knows it: its definitions, its service account, its role.

use std::path::Path;

use crate::{chart::Chart, cluster::Cluster};

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

    /// Applies the chart: definitions, service account and the roles for this namespace alone. No operator pods: a story
    /// runs its operator itself.
    pub async fn apply(&self, cluster: &Cluster) -> anyhow::Result<()> {
        let chart = Chart::new(&self.namespace);
        let watch = format!("watchNamespace={}", self.namespace);
        // Names without a namespace would be those of another story on the same cluster.
        let values = [watch.as_str(), "replicas=0", "rbac.aggregateToUserRoles=false"];
        let rendered = chart.helm(cluster, "template", &values).await?;
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), rendered)?;
        let file = file.path().display().to_string();
        let arguments = ["apply", "--server-side", "--force-conflicts", "-f", &file];
        cluster.run("kubectl", &arguments).await.map(drop)
    }

    /// Writes the kubeconfig of the operator's service account.
    pub async fn operator_kubeconfig(&self, cluster: &Cluster, to: &Path) -> anyhow::Result<()> {
        Chart::new(&self.namespace).operator_kubeconfig(cluster, to).await
    }
}
