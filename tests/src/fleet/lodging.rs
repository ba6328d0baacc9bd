//! A corner of a real cluster: a namespace that enforces PodSecurity `restricted`, a node whose taint keeps all other pods
//! away, a storage class of the node's directory, and the operator's service account and role.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use flotilla_cli::manifest::Manifest;
use k8s_openapi::api::{
    core::v1::{Node, PersistentVolume},
    storage::v1::StorageClass,
};
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams},
};
use serde_json::{Value, json};

use crate::{
    cluster::{Cluster, TestNamespace, node_kubeconfig},
    control_plane::client_of,
    eventually,
    install::Installation,
    program::Running,
};

/// Key of the taint, and of the label by which pods of the story find the node.
const NODE_KEY: &str = "sandbox.flotilla.dev/story";

/// What a story has on a cluster. Its namespace, node and storage class have one name.
#[derive(Debug)]
pub struct Lodging {
    admin_kubeconfig: PathBuf,
    namespace: TestNamespace,
    volumes: Option<Running>,
}

impl Lodging {
    /// Makes all of it; the identities go to `dir`.
    pub async fn take(cluster: &Cluster, dir: &Path) -> anyhow::Result<Self> {
        let client = cluster.client().await?;
        let namespace = TestNamespace::create(&client).await?;
        let name = namespace.name().to_owned();
        let installation = Installation::for_namespace(&name);
        installation
            .apply(cluster)
            .await
            .context("install the operator's role")?;
        installation
            .operator_kubeconfig(cluster, &Self::operator_kubeconfig(dir))
            .await?;
        node_kubeconfig(&client, cluster.kubeconfig(), &name, &Self::node_kubeconfig(dir)).await?;
        let (text, admin) = (dir.display().to_string(), cluster.kubeconfig().display().to_string());
        let arguments = [
            "sandbox",
            "volumes",
            "--dir",
            &text,
            "--kubeconfig",
            &admin,
            "--class",
            &name,
        ];
        let log = dir.join("volumes.log");
        let volumes = Running::start("flotilla", &arguments.map(str::to_owned), &[], &log)?;
        Ok(Self {
            admin_kubeconfig: cluster.kubeconfig().to_owned(),
            namespace,
            volumes: Some(volumes),
        })
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        self.namespace.name()
    }

    /// Kubeconfig of the administrator.
    pub fn admin_kubeconfig(&self) -> &Path {
        &self.admin_kubeconfig
    }

    /// Kubeconfig of the node.
    pub fn node_kubeconfig(dir: &Path) -> PathBuf {
        dir.join("node.kubeconfig")
    }

    /// Kubeconfig of the operator's service account.
    pub fn operator_kubeconfig(dir: &Path) -> PathBuf {
        dir.join("operator.kubeconfig")
    }

    /// Name and taint.
    pub fn node_arguments(&self) -> Vec<String> {
        let name = self.namespace();
        ["--name", name, "--taint", &format!("{NODE_KEY}={name}:NoSchedule")]
            .map(str::to_owned)
            .to_vec()
    }

    /// The namespace to work in.
    pub fn operator_arguments(&self) -> Vec<String> {
        ["--namespace", self.namespace()].map(str::to_owned).to_vec()
    }

    /// Namespace, storage class, and pods that go to the node.
    pub fn adapt(&self, manifest: &mut Manifest) {
        let name = self.namespace();
        manifest.object.metadata.namespace = Some(name.to_owned());
        let spec = &mut manifest.object.data["spec"];
        let settings = match manifest.kind.kind.as_str() {
            "PersistentVolumeClaim" => {
                spec["storageClassName"] = json!(name);
                return;
            }
            "Dataset" => &mut spec["prepare"],
            "ModelCheckpoint" => &mut spec["verify"],
            "ModelDeployment" => &mut spec["serve"],
            "TrainingJob" => {
                if !spec["roles"]["rollout"].is_null() {
                    overrides(&mut spec["roles"]["rollout"]["pod"], name);
                }
                &mut spec["roles"]["learner"]["pod"]
            }
            _ => return,
        };
        overrides(settings, name);
    }

    /// Deletes the namespace with all that is in it.
    pub async fn empty(&self) -> anyhow::Result<()> {
        self.namespace.clone().delete(&self.client().await?).await
    }

    /// Deletes what lies outside of the namespace, once its volumes are gone.
    pub async fn leave(&mut self) -> anyhow::Result<()> {
        let (client, name) = (self.client().await?, self.namespace().to_owned());
        let volumes: Api<PersistentVolume> = Api::all(client.clone());
        eventually("the volumes are reclaimed", Duration::from_secs(60), || async {
            let all = volumes.list(&ListParams::default()).await?.items;
            let of_class = |volume: &PersistentVolume| {
                let spec = volume.spec.as_ref();
                spec.and_then(|spec| spec.storage_class_name.as_deref()) == Some(&name)
            };
            Ok((!all.iter().any(of_class)).then_some(()))
        })
        .await?;
        if let Some(volumes) = self.volumes.take() {
            volumes.terminate(Duration::from_secs(10))?;
        }
        let classes: Api<StorageClass> = Api::all(client.clone());
        classes.delete(&name, &DeleteParams::default()).await?;
        let nodes: Api<Node> = Api::all(client);
        nodes.delete(&name, &DeleteParams::default()).await?;
        Ok(())
    }

    async fn client(&self) -> anyhow::Result<Client> {
        client_of(&self.admin_kubeconfig).await
    }
}

/// A story that failed leaves its objects for a look.
impl Drop for Lodging {
    fn drop(&mut self) {
        if self.volumes.is_some() {
            let name = self.namespace();
            eprintln!(
                "the story left namespace, node and storage class {name}; its pods have no agent any more:\n  \
                 kubectl delete node {name}; kubectl delete storageclass {name}; kubectl delete namespace {name}"
            );
        }
    }
}

/// Pods of these settings tolerate the taint of node `name` and go there.
fn overrides(settings: &mut Value, name: &str) {
    settings["podOverrides"]["nodeSelector"] = json!({"kubernetes.io/hostname": name});
    settings["podOverrides"]["tolerations"] =
        json!([{"key": NODE_KEY, "operator": "Equal", "value": name, "effect": "NoSchedule"}]);
}
