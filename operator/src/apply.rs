//! Writes to the API server: creation of children that are absent, server-side apply of those that differ, deletion of exact
//! objects.
//!
//! A child that is most likely absent is created at once, without a look before: a gang of 64 pods is 64 requests.

use std::fmt::Debug;

use flotilla_api::names::FIELD_MANAGER;
use futures::future::{try_join, try_join_all};
use k8s_openapi::{
    NamespaceResourceScope,
    api::core::v1::{ConfigMap, Pod, Secret},
};
use kube::{
    Api, Resource, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    context::Context,
    error::{Error, Result},
    owner::Owner,
    worker_pod::read_token,
};

/// Pods and what they mount, not yet written.
#[derive(Debug, Default)]
pub struct RunObjects {
    /// The roles.
    pub config_maps: Vec<ConfigMap>,
    /// A fresh token, for the case that there is none yet.
    pub token: Option<Secret>,
    /// The pods.
    pub pods: Vec<Pod>,
}

impl RunObjects {
    /// Writes what is missing: the pods last, so that they find what they mount, and all of them at once.
    pub async fn apply(self, context: &Context, owner: &Owner) -> Result<()> {
        // No `..`: an object that is added here and not written does not compile.
        let Self {
            config_maps,
            token,
            pods,
        } = self;
        let token = async {
            match token {
                Some(token) => create_token(context, owner, token).await,
                None => Ok(()),
            }
        };
        let roles = config_maps.iter().map(|desired| {
            let same = |known: &ConfigMap| known.data == desired.data;
            create_or_apply(context, owner, desired, same)
        });
        try_join(token, try_join_all(roles)).await?;
        let pods = pods.iter().map(|pod| create_pod(context, owner, pod));
        try_join_all(pods).await.map(drop)
    }
}

/// Creates a Secret with a token unless it is there, and remembers the token where it is new.
pub async fn create_token(context: &Context, owner: &Owner, desired: Secret) -> Result<()> {
    if create(context, owner, &desired).await?.is_some()
        && let Some(token) = read_token(&desired)
    {
        context.tokens.remember(owner, token);
    }
    Ok(())
}

/// Creates a pod unless it is there.
pub async fn create_pod(context: &Context, owner: &Owner, desired: &Pod) -> Result<()> {
    if let Some(made) = create(context, owner, desired).await? {
        context.stores.owned_pods.made(made);
    }
    Ok(())
}

/// Creates `desired`; where `owner` has an object of its name already, applies it only if `same` says that the two differ.
pub async fn create_or_apply<K>(context: &Context, owner: &Owner, desired: &K, same: impl Fn(&K) -> bool) -> Result<()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + Serialize,
{
    match create(context, owner, desired).await? {
        Some(_) => Ok(()),
        None => converge(context, owner, desired, same).await.map(drop),
    }
}

/// Creates `desired`; None where an object of its name is there. That of another owner is an error: it must go first.
async fn create<K>(context: &Context, owner: &Owner, desired: &K) -> Result<Option<K>>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + Serialize,
{
    let (kind, name) = (K::kind(&()), desired.name_any());
    let api: Api<K> = Api::namespaced(context.client.clone(), &owner.namespace);
    let params = PostParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PostParams::default()
    };
    let _place = context.writes.acquire().await;
    match api.create(&params, desired).await {
        Ok(made) => return Ok(Some(made)),
        Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {}
        Err(error) => {
            return Err(Error::api(format!("create {kind} {}/{name}", owner.namespace))(error));
        }
    }
    let known = api.get_opt(&name).await;
    let known = known.map_err(Error::api(format!("get {kind} {}/{name}", owner.namespace)))?;
    match known {
        // It went meanwhile: the next pass makes it.
        None => Err(Error::Gone {
            kind: kind.into_owned(),
            namespace: owner.namespace.clone(),
            name,
        }),
        Some(known) => check_owner(owner, &known).map(|()| None),
    }
}

fn check_owner<K: Resource<DynamicType = ()>>(owner: &Owner, known: &K) -> Result<()> {
    if owner.controls(known.meta()) {
        return Ok(());
    }
    Err(Error::Foreign {
        kind: K::kind(&()).into_owned(),
        namespace: owner.namespace.clone(),
        name: known.name_any(),
    })
}

/// Applies `desired` where it is absent or `same` says that the known one differs; returns the object as it then is. For
/// children that most likely are there.
pub async fn converge<K>(context: &Context, owner: &Owner, desired: &K, same: impl Fn(&K) -> bool) -> Result<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + Serialize,
{
    let (kind, name) = (K::kind(&()), desired.name_any());
    let api: Api<K> = Api::namespaced(context.client.clone(), &owner.namespace);
    let known = api
        .get_opt(&name)
        .await
        .map_err(Error::api(format!("get {kind} {}/{name}", owner.namespace)))?;
    if let Some(known) = known {
        check_owner(owner, &known)?;
        if same(&known) {
            return Ok(known);
        }
    }
    let _place = context.writes.acquire().await;
    api.patch(
        &name,
        &PatchParams::apply(FIELD_MANAGER).force(),
        &Patch::Apply(desired),
    )
    .await
    .map_err(Error::api(format!("apply {kind} {}/{name}", owner.namespace)))
}

/// Asks exactly these pods, by name and UID, to go.
pub async fn delete_pods(
    context: &Context,
    owner: &Owner,
    pods: &[(String, String)],
    grace_seconds: Option<u32>,
) -> Result<()> {
    let deletions = pods.iter().map(|(name, uid)| async move {
        delete::<Pod>(context, &owner.namespace, name, uid, grace_seconds).await?;
        context.stores.owned_pods.going(owner, uid);
        Ok(())
    });
    try_join_all(deletions).await.map(drop)
}

/// Deletes exactly the object with this UID; one that is gone already is what was wanted.
pub async fn delete<K>(
    context: &Context,
    namespace: &str,
    name: &str,
    uid: &str,
    grace_seconds: Option<u32>,
) -> Result<()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(context.client.clone(), namespace);
    let params = DeleteParams {
        grace_period_seconds: grace_seconds,
        preconditions: Some(Preconditions {
            uid: Some(uid.to_owned()),
            resource_version: None,
        }),
        ..DeleteParams::background()
    };
    let _place = context.writes.acquire().await;
    match api.delete(name, &params).await {
        Ok(_) => Ok(()),
        // 409: the name belongs to another UID by now.
        Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(()),
        Err(error) => Err(Error::api(format!("delete {} {namespace}/{name}", K::kind(&())))(error)),
    }
}
