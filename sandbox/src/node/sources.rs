//! The ConfigMaps, Secrets and Services that a pod's environment and volumes are made from.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret, Service, Volume};
use kube::{Api, Client, api::ListParams};

/// Facts about a pod that only the node knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFacts {
    /// The pod's address.
    pub pod_ip: Ipv4Addr,
    /// The node's address.
    pub host_ip: Ipv4Addr,
    /// The node's name.
    pub node_name: String,
}

/// Objects of the pod's namespace by name. What does not exist is absent.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// Keys and bytes of ConfigMaps.
    pub config_maps: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    /// Keys and bytes of Secrets.
    pub secrets: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    /// Services that have a cluster address.
    pub services: Vec<Service>,
}

/// Names of the objects that a pod refers to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct References {
    /// ConfigMaps.
    pub config_maps: BTreeSet<String>,
    /// Secrets.
    pub secrets: BTreeSet<String>,
}

impl References {
    /// Collects them from volumes and environments.
    pub fn of(pod: &Pod) -> Self {
        let mut found = Self::default();
        let Some(spec) = &pod.spec else { return found };
        for volume in spec.volumes.iter().flatten() {
            found.add_volume(volume);
        }
        for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
            for source in container.env_from.iter().flatten() {
                found
                    .config_maps
                    .extend(source.config_map_ref.iter().map(|r| r.name.clone()));
                found.secrets.extend(source.secret_ref.iter().map(|r| r.name.clone()));
            }
            for source in container.env.iter().flatten().filter_map(|env| env.value_from.as_ref()) {
                found
                    .config_maps
                    .extend(source.config_map_key_ref.iter().map(|r| r.name.clone()));
                found
                    .secrets
                    .extend(source.secret_key_ref.iter().map(|r| r.name.clone()));
            }
        }
        found
    }

    fn add_volume(&mut self, volume: &Volume) {
        self.config_maps
            .extend(volume.config_map.iter().map(|source| source.name.clone()));
        self.secrets
            .extend(volume.secret.iter().filter_map(|source| source.secret_name.clone()));
        for source in volume
            .projected
            .iter()
            .flat_map(|projected| projected.sources.iter().flatten())
        {
            self.config_maps
                .extend(source.config_map.iter().map(|s| s.name.clone()));
            self.secrets.extend(source.secret.iter().map(|s| s.name.clone()));
        }
    }
}

impl Sources {
    /// Reads what `pod` refers to.
    pub async fn gather(client: &Client, pod: &Pod) -> Result<Self, kube::Error> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let references = References::of(pod);
        let mut sources = Self::default();
        let config_maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
        for name in references.config_maps {
            if let Some(object) = config_maps.get_opt(&name).await? {
                sources.config_maps.insert(name, config_map_bytes(object));
            }
        }
        let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
        for name in references.secrets {
            if let Some(object) = secrets.get_opt(&name).await? {
                let data = object
                    .data
                    .unwrap_or_default()
                    .into_iter()
                    .map(|(key, value)| (key, value.0))
                    .collect();
                sources.secrets.insert(name, data);
            }
        }
        let links = pod
            .spec
            .as_ref()
            .is_none_or(|spec| spec.enable_service_links.unwrap_or(true));
        if links {
            let services: Api<Service> = Api::namespaced(client.clone(), namespace);
            sources.services = services.list(&ListParams::default()).await?.items;
        }
        Ok(sources)
    }
}

fn config_map_bytes(object: ConfigMap) -> BTreeMap<String, Vec<u8>> {
    let text = object
        .data
        .unwrap_or_default()
        .into_iter()
        .map(|(key, value)| (key, value.into_bytes()));
    let binary = object
        .binary_data
        .unwrap_or_default()
        .into_iter()
        .map(|(key, value)| (key, value.0));
    text.chain(binary).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_come_from_volumes_projections_and_environments() {
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "spec": {
                "volumes": [
                    {"name": "a", "configMap": {"name": "c1"}},
                    {"name": "b", "secret": {"secretName": "s1"}},
                    {"name": "c", "projected": {"sources": [{"configMap": {"name": "c2"}}, {"secret": {"name": "s2"}}]}}
                ],
                "containers": [{
                    "name": "x",
                    "envFrom": [{"configMapRef": {"name": "c3"}}],
                    "env": [{"name": "E", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "k"}}}]
                }]
            }
        }))
        .unwrap();
        let found = References::of(&pod);
        assert_eq!(found.config_maps, ["c1", "c2", "c3"].map(str::to_owned).into());
        assert_eq!(found.secrets, ["s1", "s2", "s3"].map(str::to_owned).into());
    }
}
