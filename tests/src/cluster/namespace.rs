//! A namespace of a test's own, gone with all that was made for it.

use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::core::v1::Namespace;
use kube::{
    Api, Client,
    api::{DeleteParams, PostParams},
};
use serde_json::json;

use crate::eventually;

/// A namespace that enforces PodSecurity `restricted`.
#[derive(Clone, Debug)]
pub struct TestNamespace {
    name: String,
}

impl TestNamespace {
    /// Makes one whose name begins with `flotilla-test-`.
    pub async fn create(client: &Client) -> anyhow::Result<Self> {
        let namespaces: Api<Namespace> = Api::all(client.clone());
        let namespace = serde_json::from_value(json!({"metadata": {
            "generateName": "flotilla-test-",
            "labels": {
                "pod-security.kubernetes.io/enforce": "restricted",
                "pod-security.kubernetes.io/enforce-version": "latest",
            },
        }}))?;
        let created = namespaces.create(&PostParams::default(), &namespace).await?;
        Ok(Self {
            name: created.metadata.name.context("a generated name")?,
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Deletes it and waits until nothing of it is left.
    pub async fn delete(self, client: &Client) -> anyhow::Result<()> {
        let namespaces: Api<Namespace> = Api::all(client.clone());
        namespaces.delete(&self.name, &DeleteParams::default()).await?;
        let what = format!("namespace {} is gone", self.name);
        eventually(&what, Duration::from_secs(90), || async {
            Ok(namespaces.get_opt(&self.name).await?.is_none().then_some(()))
        })
        .await
    }
}
