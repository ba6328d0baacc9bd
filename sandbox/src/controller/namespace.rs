//! Empties namespaces that are being deleted, then lets them go; gives each living one its default service account.

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, ServiceAccount};
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams, PostParams, PropagationPolicy},
    core::{ApiResource, DynamicObject, ObjectMeta},
    discovery::{Discovery, Scope, verbs},
    runtime::watcher,
};
use tokio::task::JoinSet;

use super::{
    RESYNC, RETRY,
    mirror::{Bell, mirror},
    remainder::Remainder,
};

/// Finalizer in `spec.finalizers` that this controller removes.
const FINALIZER: &str = "kubernetes";

/// Name of the ConfigMap with the certificates of the API server.
const ROOTS: &str = "kube-root-ca.crt";

/// Watches and empties for ever. `roots`: the certificates of the API server, as PEM.
pub async fn run(client: Client, roots: String) {
    let (bell, mut tasks) = (Bell::default(), JoinSet::new());
    let namespaces = mirror(
        Api::<Namespace>::all(client.clone()),
        watcher::Config::default(),
        &bell,
        &mut tasks,
    );
    loop {
        let mut well = true;
        for namespace in namespaces.state() {
            let outcome = if namespace.metadata.deletion_timestamp.is_some() {
                empty(&client, &namespace).await
            } else {
                furnish(&client, &namespace, &roots).await.map(|()| true)
            };
            well &= match outcome {
                Ok(done) => done,
                Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => false,
                Err(error) => {
                    tracing::warn!(namespace = ?namespace.metadata.name, %error, "looking after a namespace");
                    false
                }
            };
        }
        bell.wait(if well { RESYNC } else { RETRY }).await;
    }
}

/// Gives the namespace the certificates of the API server and the service account that its pods run as by default.
async fn furnish(client: &Client, namespace: &Namespace, roots: &str) -> Result<(), kube::Error> {
    let Some(name) = namespace.metadata.name.as_deref() else {
        return Ok(());
    };
    publish_roots(client, name, roots).await?;
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), name);
    if accounts.get_metadata_opt("default").await?.is_some() {
        return Ok(());
    }
    let account = ServiceAccount {
        metadata: ObjectMeta {
            name: Some("default".to_owned()),
            ..ObjectMeta::default()
        },
        ..ServiceAccount::default()
    };
    match accounts.create(&PostParams::default(), &account).await {
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        other => other.map(drop),
    }
}

/// Makes the ConfigMap by which pods trust the API server.
async fn publish_roots(client: &Client, namespace: &str, roots: &str) -> Result<(), kube::Error> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    if maps.get_metadata_opt(ROOTS).await?.is_some() {
        return Ok(());
    }
    let map = ConfigMap {
        metadata: ObjectMeta {
            name: Some(ROOTS.to_owned()),
            ..ObjectMeta::default()
        },
        data: Some([("ca.crt".to_owned(), roots.to_owned())].into()),
        ..ConfigMap::default()
    };
    match maps.create(&PostParams::default(), &map).await {
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        other => other.map(drop),
    }
}

/// Deletes everything in the namespace; once there is nothing left, removes the finalizer. True when it is done.
async fn empty(client: &Client, namespace: &Namespace) -> Result<bool, kube::Error> {
    let Some(name) = namespace.metadata.name.as_deref() else {
        return Ok(true);
    };
    let mut left = Remainder::default();
    for resource in namespaced_resources(client).await? {
        let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), name, &resource);
        let objects = api.list_metadata(&ListParams::default()).await?.items;
        if objects
            .iter()
            .any(|object| object.metadata.deletion_timestamp.is_none())
        {
            let params = DeleteParams {
                propagation_policy: Some(PropagationPolicy::Background),
                ..DeleteParams::default()
            };
            api.delete_collection(&params, &ListParams::default()).await?;
        }
        if resource.kind != "Event" {
            left.add(&resource, &objects);
        }
    }
    if !left.is_empty() {
        left.report(client, namespace, name).await?;
        return Ok(false);
    }
    release(client, namespace, name).await?;
    Ok(true)
}

async fn release(client: &Client, namespace: &Namespace, name: &str) -> Result<(), kube::Error> {
    let mut released = namespace.clone();
    if let Some(finalizers) = released.spec.as_mut().and_then(|spec| spec.finalizers.as_mut()) {
        finalizers.retain(|finalizer| finalizer != FINALIZER);
    }
    let api: Api<Namespace> = Api::all(client.clone());
    api.replace_subresource("finalize", name, &PostParams::default(), &released)
        .await?;
    Ok(())
}

async fn namespaced_resources(client: &Client) -> Result<Vec<ApiResource>, kube::Error> {
    let discovery = Discovery::new(client.clone()).run().await?;
    let found = discovery
        .groups()
        .flat_map(kube::discovery::ApiGroup::recommended_resources);
    let usable = found.filter(|(_, capabilities)| {
        capabilities.scope == Scope::Namespaced
            && [verbs::LIST, verbs::DELETE_COLLECTION]
                .iter()
                .all(|verb| capabilities.supports_operation(verb))
    });
    Ok(usable.map(|(resource, _)| resource).collect())
}
