//! Volumes as directories.
//!
//! # Layout
//!
//! | file | what it holds |
//! |---|---|
//! | `payload.rs` | which files a configMap, secret, downwardAPI or projected volume has |
//! | `atomic.rs` | writing such files so that a reader sees all old or all new ones |
//!
//! | volume | directory |
//! |---|---|
//! | configMap, secret, downwardAPI, projected | `pods/UID/volumes/NAME`, written again when the source changes |
//! | emptyDir | `pods/UID/volumes/NAME`, empty at first, gone with the pod |
//! | persistentVolumeClaim | `volumes/NAMESPACE/CLAIM`, as soon as the claim is bound |
//! | hostPath | the path itself |

mod atomic;
mod payload;

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use k8s_openapi::api::core::v1::{Container, PersistentVolumeClaim, Pod, Volume};
use kube::{Api, Client};

pub use payload::Payload;

use super::sources::{PodFacts, Sources};

/// Why a volume cannot be mounted; reported as a `FailedMount` event and tried again.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// A ConfigMap, Secret or claim does not exist.
    #[error("MountVolume.SetUp failed for volume \"{volume}\" : {kind} \"{name}\" not found")]
    Missing {
        /// The volume.
        volume: String,
        /// `configmap`, `secret`, `persistentvolumeclaim`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// `items` names a key that the object lacks.
    #[error("MountVolume.SetUp failed for volume \"{volume}\" : references non-existent config key: {key}")]
    MissingKey {
        /// The volume.
        volume: String,
        /// The key.
        key: String,
    },
    /// The claim exists and is not bound.
    #[error("MountVolume.SetUp failed for volume \"{volume}\" : persistentvolumeclaim \"{claim}\" is not bound")]
    Unbound {
        /// The volume.
        volume: String,
        /// The claim.
        claim: String,
    },
    /// A source that a directory cannot stand for.
    #[error("MountVolume.SetUp failed for volume \"{volume}\" : this node cannot mount {what}")]
    Unsupported {
        /// The volume.
        volume: String,
        /// What was asked for.
        what: String,
    },
    /// A container mounts a volume that the pod does not have.
    #[error("container \"{container}\" mounts volume \"{volume}\", which the pod does not have")]
    Undeclared {
        /// The container.
        container: String,
        /// The volume.
        volume: String,
    },
    /// The file system refused.
    #[error("MountVolume.SetUp failed for volume \"{volume}\" : writing {}: {source}", path.display())]
    Write {
        /// The volume.
        volume: String,
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The API server refused or could not be reached.
    #[error("MountVolume.SetUp failed for volume \"{volume}\" : {source}")]
    Api {
        /// The volume.
        volume: String,
        /// What it said.
        source: kube::Error,
    },
}

/// Where a pod's volumes lie.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mounts {
    volumes: BTreeMap<String, PathBuf>,
}

/// Directory of a claim below the sandbox's directory.
pub fn claim_dir(root: &Path, namespace: &str, claim: &str) -> PathBuf {
    root.join("volumes").join(namespace).join(claim)
}

/// Makes every volume of `pod`; calling it again brings files up to date.
pub async fn mount(
    client: &Client,
    root: &Path,
    pod_dir: &Path,
    pod: &Pod,
    facts: &PodFacts,
    sources: &Sources,
) -> Result<Mounts, VolumeError> {
    let mut mounts = Mounts::default();
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    for volume in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
        let local = pod_dir.join("volumes").join(&volume.name);
        let path = if let Some(source) = &volume.persistent_volume_claim {
            bound_claim(client, root, namespace, &volume.name, &source.claim_name).await?
        } else if let Some(source) = &volume.host_path {
            PathBuf::from(&source.path)
        } else if volume.empty_dir.is_some() {
            make_dir(&volume.name, &local)?;
            local
        } else {
            let payload = payload_of(client, volume, pod, facts, sources).await?;
            atomic::write(&local, &payload).map_err(|source| VolumeError::Write {
                volume: volume.name.clone(),
                path: local.clone(),
                source,
            })?;
            local
        };
        mounts.volumes.insert(volume.name.clone(), path);
    }
    Ok(mounts)
}

async fn payload_of(
    client: &Client,
    volume: &Volume,
    pod: &Pod,
    facts: &PodFacts,
    sources: &Sources,
) -> Result<Payload, VolumeError> {
    let mut payload = payload::of(volume, pod, facts, sources)?;
    let tokens = volume
        .projected
        .iter()
        .flat_map(|projected| projected.sources.iter().flatten());
    for request in tokens.filter_map(|source| source.service_account_token.as_ref()) {
        let token = payload::service_account_token(client, pod, request)
            .await
            .map_err(|source| VolumeError::Api {
                volume: volume.name.clone(),
                source,
            })?;
        payload.insert(PathBuf::from(&request.path), (token.into_bytes(), 0o600));
    }
    Ok(payload)
}

async fn bound_claim(
    client: &Client,
    root: &Path,
    namespace: &str,
    volume: &str,
    claim: &str,
) -> Result<PathBuf, VolumeError> {
    let api: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), namespace);
    let found = api
        .get_opt(claim)
        .await
        .map_err(|source| VolumeError::Api {
            volume: volume.to_owned(),
            source,
        })?
        .ok_or_else(|| VolumeError::Missing {
            volume: volume.to_owned(),
            kind: "persistentvolumeclaim",
            name: claim.to_owned(),
        })?;
    let dir = claim_dir(root, namespace, claim);
    let bound = found.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound");
    if bound && dir.is_dir() {
        Ok(dir)
    } else {
        Err(VolumeError::Unbound {
            volume: volume.to_owned(),
            claim: claim.to_owned(),
        })
    }
}

fn make_dir(volume: &str, path: &Path) -> Result<(), VolumeError> {
    std::fs::create_dir_all(path).map_err(|source| VolumeError::Write {
        volume: volume.to_owned(),
        path: path.to_owned(),
        source,
    })
}

impl Mounts {
    /// Pairs of (mount path, local path) of one container. `subPathExpr` is expanded with `environment`.
    pub fn of_container(
        &self,
        container: &Container,
        environment: &BTreeMap<String, String>,
    ) -> Result<Vec<(String, String)>, VolumeError> {
        let mut pairs = Vec::new();
        for mount in container.volume_mounts.iter().flatten() {
            let base = self.volumes.get(&mount.name).ok_or_else(|| VolumeError::Undeclared {
                container: container.name.clone(),
                volume: mount.name.clone(),
            })?;
            let sub = match &mount.sub_path_expr {
                Some(expression) => super::expansion::expand(expression, |name| environment.get(name).cloned()),
                None => mount.sub_path.clone().unwrap_or_default(),
            };
            if Path::new(&sub)
                .components()
                .any(|part| !matches!(part, std::path::Component::Normal(_)))
            {
                let what = format!("subPath \"{sub}\": it leaves the volume");
                return Err(VolumeError::Unsupported {
                    volume: mount.name.clone(),
                    what,
                });
            }
            let local = if sub.is_empty() { base.clone() } else { base.join(&sub) };
            if !local.exists() {
                make_dir(&mount.name, &local)?;
            }
            pairs.push((mount.mount_path.clone(), local.to_string_lossy().into_owned()));
        }
        Ok(pairs)
    }
}
