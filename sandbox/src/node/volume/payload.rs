//! Which files a configMap, secret, downwardAPI or projected volume has.

use std::{collections::BTreeMap, path::PathBuf};

use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenRequestSpec},
    core::v1::{DownwardAPIVolumeFile, KeyToPath, Pod, ServiceAccount, ServiceAccountTokenProjection, Volume},
};
use kube::{Api, Client, api::PostParams};

use super::VolumeError;
use crate::node::{
    downward,
    sources::{PodFacts, Sources},
};

/// Relative path to (bytes, mode).
pub type Payload = BTreeMap<PathBuf, (Vec<u8>, u32)>;

const DEFAULT_MODE: i32 = 0o644;

/// One object whose keys become files.
struct Projection<'a> {
    volume: &'a str,
    kind: &'static str,
    name: &'a str,
    optional: bool,
    items: Option<&'a [KeyToPath]>,
    mode: i32,
}

/// The files of `volume`, tokens of service accounts left out.
pub fn of(volume: &Volume, pod: &Pod, facts: &PodFacts, sources: &Sources) -> Result<Payload, VolumeError> {
    let name = volume.name.as_str();
    if let Some(source) = &volume.config_map {
        let projection = Projection {
            volume: name,
            kind: "configmap",
            name: &source.name,
            optional: source.optional == Some(true),
            items: source.items.as_deref(),
            mode: source.default_mode.unwrap_or(DEFAULT_MODE),
        };
        return projection.files(sources.config_maps.get(&source.name));
    }
    if let Some(source) = &volume.secret {
        let secret = source.secret_name.as_deref().unwrap_or_default();
        let projection = Projection {
            volume: name,
            kind: "secret",
            name: secret,
            optional: source.optional == Some(true),
            items: source.items.as_deref(),
            mode: source.default_mode.unwrap_or(DEFAULT_MODE),
        };
        return projection.files(sources.secrets.get(secret));
    }
    if let Some(source) = &volume.downward_api {
        let mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        return downward_files(name, source.items.as_deref().unwrap_or_default(), mode, pod, facts);
    }
    if volume.projected.is_some() {
        return projected(volume, pod, facts, sources);
    }
    let kind = serde_json::to_value(volume).ok().and_then(|value| {
        value
            .as_object()
            .and_then(|map| map.keys().find(|key| *key != "name").cloned())
    });
    Err(VolumeError::Unsupported {
        volume: name.to_owned(),
        what: kind.unwrap_or_else(|| "a volume without a source".to_owned()),
    })
}

fn projected(volume: &Volume, pod: &Pod, facts: &PodFacts, sources: &Sources) -> Result<Payload, VolumeError> {
    let Some(projected) = &volume.projected else {
        return Ok(Payload::new());
    };
    let mode = projected.default_mode.unwrap_or(DEFAULT_MODE);
    let mut files = Payload::new();
    for source in projected.sources.iter().flatten() {
        if let Some(source) = &source.config_map {
            let projection = Projection {
                volume: &volume.name,
                kind: "configmap",
                name: &source.name,
                optional: source.optional == Some(true),
                items: source.items.as_deref(),
                mode,
            };
            files.extend(projection.files(sources.config_maps.get(&source.name))?);
        }
        if let Some(source) = &source.secret {
            let projection = Projection {
                volume: &volume.name,
                kind: "secret",
                name: &source.name,
                optional: source.optional == Some(true),
                items: source.items.as_deref(),
                mode,
            };
            files.extend(projection.files(sources.secrets.get(&source.name))?);
        }
        if let Some(source) = &source.downward_api {
            let items = source.items.as_deref().unwrap_or_default();
            files.extend(downward_files(&volume.name, items, mode, pod, facts)?);
        }
        if source.cluster_trust_bundle.is_some() || source.pod_certificate.is_some() {
            let what = "a projected trust bundle or certificate".to_owned();
            return Err(VolumeError::Unsupported {
                volume: volume.name.clone(),
                what,
            });
        }
    }
    Ok(files)
}

impl Projection<'_> {
    fn files(&self, data: Option<&BTreeMap<String, Vec<u8>>>) -> Result<Payload, VolumeError> {
        let Some(data) = data else {
            if self.optional {
                return Ok(Payload::new());
            }
            return Err(VolumeError::Missing {
                volume: self.volume.to_owned(),
                kind: self.kind,
                name: self.name.to_owned(),
            });
        };
        let Some(items) = self.items.filter(|items| !items.is_empty()) else {
            return Ok(data
                .iter()
                .map(|(key, value)| (PathBuf::from(key), (value.clone(), mode(self.mode))))
                .collect());
        };
        let mut files = Payload::new();
        for item in items {
            match data.get(&item.key) {
                Some(value) => {
                    let path = relative(self.volume, &item.path)?;
                    files.insert(path, (value.clone(), mode(item.mode.unwrap_or(self.mode))));
                }
                None if self.optional => {}
                None => {
                    return Err(VolumeError::MissingKey {
                        volume: self.volume.to_owned(),
                        key: item.key.clone(),
                    });
                }
            }
        }
        Ok(files)
    }
}

fn downward_files(
    volume: &str,
    items: &[DownwardAPIVolumeFile],
    default_mode: i32,
    pod: &Pod,
    facts: &PodFacts,
) -> Result<Payload, VolumeError> {
    let mut files = Payload::new();
    for item in items {
        let value = match (&item.field_ref, &item.resource_field_ref) {
            (Some(reference), _) => downward::field(&reference.field_path, pod, facts),
            (None, Some(reference)) => pod
                .spec
                .iter()
                .flat_map(|spec| &spec.containers)
                .find(|container| Some(&container.name) == reference.container_name.as_ref())
                .and_then(|container| downward::resource(reference, container)),
            (None, None) => None,
        };
        let value = value.ok_or_else(|| VolumeError::Unsupported {
            volume: volume.to_owned(),
            what: format!("the downward API field of {}", item.path),
        })?;
        let path = relative(volume, &item.path)?;
        files.insert(path, (value.into_bytes(), mode(item.mode.unwrap_or(default_mode))));
    }
    Ok(files)
}

fn relative(volume: &str, path: &str) -> Result<PathBuf, VolumeError> {
    let path = PathBuf::from(path);
    if path
        .components()
        .all(|part| matches!(part, std::path::Component::Normal(_)))
    {
        return Ok(path);
    }
    let what = format!("the path {}: it leaves the volume", path.display());
    Err(VolumeError::Unsupported {
        volume: volume.to_owned(),
        what,
    })
}

fn mode(mode: i32) -> u32 {
    u32::try_from(mode).unwrap_or(0o644) & 0o777
}

/// Asks the API server for a token that is bound to the pod.
pub async fn service_account_token(
    client: &Client,
    pod: &Pod,
    projection: &ServiceAccountTokenProjection,
) -> Result<String, kube::Error> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let account = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.service_account_name.as_deref())
        .unwrap_or("default");
    let api: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences: projection.audience.clone().map(|audience| vec![audience]),
            expiration_seconds: Some(projection.expiration_seconds.unwrap_or(3600)),
            ..TokenRequestSpec::default()
        }),
        ..TokenRequest::default()
    };
    let answer = api
        .create_token_request(account, &PostParams::default(), &request)
        .await?;
    Ok(answer.status.and_then(|status| status.token).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use serde_json::json;

    use super::*;

    fn files(volume: serde_json::Value) -> Result<Payload, VolumeError> {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p"}})).unwrap();
        let facts = PodFacts {
            pod_ip: Ipv4Addr::LOCALHOST,
            host_ip: Ipv4Addr::LOCALHOST,
            node_name: "node".to_owned(),
        };
        let data = BTreeMap::from([("a".to_owned(), b"1".to_vec()), ("b".to_owned(), b"2".to_vec())]);
        let sources = Sources {
            config_maps: BTreeMap::from([("c".to_owned(), data.clone())]),
            secrets: BTreeMap::from([("s".to_owned(), data)]),
            services: Vec::new(),
        };
        of(&serde_json::from_value(volume).unwrap(), &pod, &facts, &sources)
    }

    #[test]
    fn every_key_is_a_file_unless_items_choose() {
        let all = files(json!({"name": "v", "configMap": {"name": "c"}})).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!(all[&PathBuf::from("a")], (b"1".to_vec(), 0o644));
        let chosen = files(json!({"name": "v", "secret": {"secretName": "s", "defaultMode": 0o400,
            "items": [{"key": "b", "path": "x/y"}]}}))
        .unwrap();
        assert_eq!(chosen, Payload::from([(PathBuf::from("x/y"), (b"2".to_vec(), 0o400))]));
    }

    #[test]
    fn a_missing_object_or_key_fails_unless_optional() {
        let missing = files(json!({"name": "v", "configMap": {"name": "x"}})).unwrap_err();
        assert_eq!(
            missing.to_string(),
            "MountVolume.SetUp failed for volume \"v\" : configmap \"x\" not found"
        );
        assert!(
            files(json!({"name": "v", "configMap": {"name": "x", "optional": true}}))
                .unwrap()
                .is_empty()
        );
        let key = json!({"name": "v", "configMap": {"name": "c", "items": [{"key": "z", "path": "z"}]}});
        assert!(matches!(files(key), Err(VolumeError::MissingKey { .. })));
    }

    #[test]
    fn a_projection_joins_its_sources() {
        let volume = json!({"name": "v", "projected": {"sources": [
            {"configMap": {"name": "c", "items": [{"key": "a", "path": "a"}]}},
            {"downwardAPI": {"items": [{"path": "name", "fieldRef": {"fieldPath": "metadata.name"}}]}}
        ]}});
        let files = files(volume).unwrap();
        assert_eq!(files[&PathBuf::from("name")].0, b"p");
        assert_eq!(files[&PathBuf::from("a")].0, b"1");
    }

    #[test]
    fn a_path_may_not_leave_the_volume() {
        let volume = json!({"name": "v", "configMap": {"name": "c", "items": [{"key": "a", "path": "../a"}]}});
        assert!(matches!(files(volume), Err(VolumeError::Unsupported { .. })));
    }

    #[test]
    fn a_source_that_is_no_directory_is_named() {
        let error = files(json!({"name": "v", "nfs": {"server": "s", "path": "/"}})).unwrap_err();
        assert!(error.to_string().ends_with("this node cannot mount nfs"), "{error}");
    }
}
