//! Writes what a pass built.

use std::collections::BTreeSet;

use flotilla_api::names::{HTTP_PORT, label};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use kube::{Api, ResourceExt as _, api::ListParams};

use super::{build::Objects, gather::Observed};
use crate::{
    apply::{converge, create_or_apply, create_pod, create_token, delete, delete_pods},
    context::Context,
    error::{Error, Result},
    owner::Owner,
    pod_view::PodView,
};

/// What was written; the only way to a status that mentions it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Applied {
    /// Address of the Service.
    pub url: Option<String>,
    /// Pods that were made in this pass.
    pub created: Vec<String>,
}

/// Writes `objects`. Pods that go are asked after new ones are made, or could not be: a quota may have no room before they are
/// gone.
pub async fn apply(context: &Context, observed: &Observed, objects: Objects) -> Result<Applied> {
    // No `..`: what is built and not written does not compile.
    let Objects {
        service,
        mounts,
        create,
        remove,
        revision,
    } = objects;
    let owner = &observed.owner;
    let service = converge(context, owner, &service, |known| routes_alike(known, &service)).await?;
    if let Some((config, token)) = mounts {
        create_token(context, owner, token).await?;
        create_or_apply(context, owner, &config, |known: &ConfigMap| known.data == config.data).await?;
    }
    let made = create_pods(context, owner, create).await;
    delete_pods(context, owner, &remove, None).await?;
    let created = made?;
    if let (false, Some(revision)) = (remove.is_empty(), revision) {
        let stays = |pod: &&PodView| pod.is_live() && remove.iter().all(|(name, _)| *name != pod.name);
        let mut used: BTreeSet<&str> = observed
            .pods
            .iter()
            .filter(stays)
            .map(|pod| pod.revision.as_str())
            .collect();
        used.insert(&revision);
        drop_unused_roles(context, owner, &used).await?;
    }
    Ok(Applied {
        url: url(&service),
        created,
    })
}

async fn create_pods(context: &Context, owner: &Owner, pods: Vec<Pod>) -> Result<Vec<String>> {
    let mut created = Vec::with_capacity(pods.len());
    for pod in pods {
        create_pod(context, owner, &pod).await?;
        created.push(pod.name_any());
    }
    Ok(created)
}

/// The API server adds fields of its own, so only what the operator decides is compared.
fn routes_alike(known: &Service, desired: &Service) -> bool {
    let routes = |service: &Service| {
        let spec = service.spec.clone().unwrap_or_default();
        let ports = spec.ports.unwrap_or_default().into_iter();
        let ports: Vec<_> = ports.map(|port| (port.name, port.port, port.target_port)).collect();
        (spec.selector, ports)
    };
    routes(known) == routes(desired)
}

fn url(service: &Service) -> Option<String> {
    let ip = service.spec.as_ref()?.cluster_ip.clone()?;
    let address = ip.parse::<std::net::IpAddr>().ok()?;
    Some(format!("http://{}", std::net::SocketAddr::new(address, HTTP_PORT)))
}

/// Roles of revisions that nothing runs any more. A pod that is stopping has read its role long ago.
async fn drop_unused_roles(context: &Context, owner: &Owner, used: &BTreeSet<&str>) -> Result<()> {
    let api: Api<ConfigMap> = Api::namespaced(context.client.clone(), &owner.namespace);
    let selector: Vec<_> = owner
        .selector()
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    let listed = api.list(&ListParams::default().labels(&selector.join(","))).await;
    let what = format!("list ConfigMaps of ModelDeployment {}/{}", owner.namespace, owner.name);
    let listed = listed.map_err(Error::api(what))?;
    for config in listed.items.iter().filter(|config| owner.controls(&config.metadata)) {
        let unused = config
            .labels()
            .get(label::REVISION)
            .is_some_and(|revision| !used.contains(revision.as_str()));
        if let (true, Some(uid)) = (unused, config.uid()) {
            delete::<ConfigMap>(context, &owner.namespace, &config.name_any(), &uid, None).await?;
        }
    }
    Ok(())
}
