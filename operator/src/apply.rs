//! Writes to the API server: server-side apply of children that are absent or differ, deletion of exact objects.

use std::fmt::Debug;

use flotilla_api::names::FIELD_MANAGER;
use k8s_openapi::{
    NamespaceResourceScope,
    api::core::v1::{ConfigMap, Pod, Secret},
};
use kube::{
    Api, Client, Resource, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    error::{Error, Result},
    owner::Owner,
};

/// The pod of a run and what it mounts, not yet written.
#[derive(Debug)]
pub struct RunObjects {
    /// The role.
    pub config_map: ConfigMap,
    /// A fresh token, for the case that there is none yet.
    pub token: Secret,
    /// The pod.
    pub pod: Pod,
}

impl RunObjects {
    /// Writes what is missing: the pod last, so that it finds what it mounts.
    pub async fn apply(self, client: &Client, owner: &Owner) -> Result<()> {
        // No `..`: an object that is added here and not written does not compile.
        let Self { config_map, token, pod } = self;
        create_once(client, owner, &token).await?;
        converge(client, owner, &config_map, |known| known.data == config_map.data).await?;
        create_once(client, owner, &pod).await?;
        Ok(())
    }
}

/// Creates `desired` unless an object of its name is there. An object of another owner is an error: it must go first.
pub async fn create_once<K>(client: &Client, owner: &Owner, desired: &K) -> Result<()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + Serialize,
{
    converge(client, owner, desired, |_| true).await.map(drop)
}

/// Applies `desired` where it is absent or `same` says that the known one differs; returns the object as it then is.
pub async fn converge<K>(client: &Client, owner: &Owner, desired: &K, same: impl Fn(&K) -> bool) -> Result<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + Serialize,
{
    let (kind, name) = (K::kind(&()), desired.name_any());
    let api: Api<K> = Api::namespaced(client.clone(), &owner.namespace);
    let known = api
        .get_opt(&name)
        .await
        .map_err(Error::api(format!("get {kind} {}/{name}", owner.namespace)))?;
    if let Some(known) = known {
        if !owner.controls(known.meta()) {
            return Err(Error::Foreign {
                kind: kind.into_owned(),
                namespace: owner.namespace.clone(),
                name,
            });
        }
        if same(&known) {
            return Ok(known);
        }
    }
    api.patch(
        &name,
        &PatchParams::apply(FIELD_MANAGER).force(),
        &Patch::Apply(desired),
    )
    .await
    .map_err(Error::api(format!("apply {kind} {}/{name}", owner.namespace)))
}

/// Deletes exactly the object with this UID; one that is gone already is what was wanted.
pub async fn delete<K>(
    client: &Client,
    namespace: &str,
    name: &str,
    uid: &str,
    grace_seconds: Option<u32>,
) -> Result<()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(client.clone(), namespace);
    let params = DeleteParams {
        grace_period_seconds: grace_seconds,
        preconditions: Some(Preconditions {
            uid: Some(uid.to_owned()),
            resource_version: None,
        }),
        ..DeleteParams::background()
    };
    match api.delete(name, &params).await {
        Ok(_) => Ok(()),
        // 409: the name belongs to another UID by now.
        Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(()),
        Err(error) => Err(Error::api(format!("delete {} {namespace}/{name}", K::kind(&())))(error)),
    }
}
