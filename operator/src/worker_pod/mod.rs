//! The pod of any role: one worker container, its config, its token and the claims that its URIs name.
//!
//! Pods meet PodSecurity `restricted` and hold no Kubernetes credentials.

mod config_map;
mod overrides;
mod probes;
mod token;

use std::collections::BTreeMap;

use flotilla_api::{
    names::{self, label},
    pod::{PodSettings, Resources},
    role::{Role, RoleConfig},
};
use k8s_openapi::{
    api::core::v1::{
        Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvVar, EnvVarSource,
        ObjectFieldSelector, PersistentVolumeClaimVolumeSource, Pod, PodSecurityContext, PodSpec, ResourceRequirements,
        SeccompProfile, SecretVolumeSource, SecurityContext, Volume, VolumeMount,
    },
    apimachinery::pkg::{api::resource::Quantity, apis::meta::v1::ObjectMeta},
};

pub use self::{
    config_map::config_map,
    overrides::{OverrideError, check},
    token::{read as read_token, secret as token_secret},
};
use crate::{
    owner::Owner,
    volumes::{Access, UriError, claims},
};

/// User and group of the worker image; also the group that owns mounted claims.
const UID: i64 = 65532;
/// Names of the volumes that the operator adds.
const CONFIG_VOLUME: &str = "config";
const TOKEN_VOLUME: &str = "token";
const SCRATCH_VOLUME: &str = "scratch";
const SCRATCH_DIR: &str = "/tmp";
/// Where processes of a pod that share a model put what they exchange: the container runtime's own has 64 MiB, too few for NCCL.
const SHARED_MEMORY_VOLUME: &str = "shared-memory";
const SHARED_MEMORY_DIR: &str = "/dev/shm";
const SHARED_MEMORY_LIMIT: &str = "2Gi";

/// Everything a worker's pod is made from.
#[derive(Clone, Debug)]
pub struct WorkerPod<'a> {
    /// The object it works for.
    pub owner: &'a Owner,
    /// Its name.
    pub name: String,
    /// What it does.
    pub config: &'a RoleConfig,
    /// Name of the ConfigMap with that.
    pub config_map: &'a str,
    /// Name of the Secret with the bearer token of `/progress`.
    pub token: &'a str,
    /// What users set.
    pub settings: &'a PodSettings,
    /// The image where users set none.
    pub default_image: &'a str,
    /// Which pod of a run it is, or which in its place; None for servers.
    pub attempt: Option<u32>,
    /// Its place among the rollout pods of a run.
    pub index: Option<u32>,
    /// Hash of what it serves; None for runs.
    pub revision: Option<&'a str>,
    /// Seconds between SIGTERM and SIGKILL.
    pub grace_seconds: i64,
}

impl WorkerPod<'_> {
    /// The pod.
    pub fn build(&self) -> Result<Pod, UriError> {
        let claims = claims(&self.config.role)?;
        let overrides = &self.settings.pod_overrides;
        let mut volumes = self.own_volumes(&claims);
        volumes.extend(overrides.volumes.iter().cloned());
        let spec = PodSpec {
            containers: vec![self.container(&claims)],
            volumes: Some(volumes),
            restart_policy: Some(if self.answers() { "Always" } else { "Never" }.to_owned()),
            termination_grace_period_seconds: Some(self.grace_seconds),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            security_context: Some(pod_security()),
            node_selector: (!overrides.node_selector.is_empty()).then(|| overrides.node_selector.clone()),
            affinity: overrides.affinity.clone(),
            tolerations: (!overrides.tolerations.is_empty()).then(|| overrides.tolerations.clone()),
            service_account_name: overrides.service_account_name.clone(),
            image_pull_secrets: (!overrides.image_pull_secrets.is_empty())
                .then(|| overrides.image_pull_secrets.clone()),
            priority_class_name: overrides.priority_class_name.clone(),
            runtime_class_name: overrides.runtime_class_name.clone(),
            ..PodSpec::default()
        };
        Ok(Pod {
            metadata: self.metadata(),
            spec: Some(spec),
            status: None,
        })
    }

    /// Whether it answers requests until it is stopped. Such a container is started again in its place; one that works
    /// towards a goal ends, and what follows is decided by its owner.
    fn answers(&self) -> bool {
        matches!(self.config.role, Role::Serve(_) | Role::Rollout(_))
    }

    /// Whether the pod gets more memory that its processes share: where several GPUs share a model, and users mount nothing
    /// there themselves.
    fn shares_memory(&self) -> bool {
        let several = matches!(&self.config.role, Role::Serve(serve) if serve.tensor_parallel > 1);
        let mounts = &self.settings.pod_overrides.volume_mounts;
        several
            && !mounts
                .iter()
                .any(|mount| mount.mount_path.trim_end_matches('/') == SHARED_MEMORY_DIR)
    }

    fn metadata(&self) -> ObjectMeta {
        let mut metadata = self.owner.child(self.name.clone(), self.config.role.name());
        let labels = metadata.labels.get_or_insert_default();
        if let Some(attempt) = self.attempt {
            labels.insert(label::ATTEMPT.to_owned(), attempt.to_string());
        }
        if let Some(index) = self.index {
            labels.insert(label::INDEX.to_owned(), index.to_string());
        }
        if let Some(revision) = self.revision {
            labels.insert(label::REVISION.to_owned(), revision.to_owned());
        }
        metadata
    }

    fn container(&self, claims: &BTreeMap<String, Access>) -> Container {
        let overrides = &self.settings.pod_overrides;
        let mut mounts = own_mounts(claims);
        if self.shares_memory() {
            mounts.push(VolumeMount {
                name: SHARED_MEMORY_VOLUME.to_owned(),
                mount_path: SHARED_MEMORY_DIR.to_owned(),
                ..VolumeMount::default()
            });
        }
        mounts.extend(overrides.volume_mounts.iter().cloned());
        let mut env = own_env();
        env.extend(overrides.env.iter().cloned());
        Container {
            name: names::CONTAINER.to_owned(),
            image: Some(self.settings.image.as_deref().unwrap_or(self.default_image).to_owned()),
            args: Some(args(claims)),
            env: Some(env),
            ports: Some(vec![ContainerPort {
                name: Some(names::HTTP_PORT_NAME.to_owned()),
                container_port: i32::from(names::HTTP_PORT),
                protocol: Some("TCP".to_owned()),
                ..ContainerPort::default()
            }]),
            resources: Some(resources(&self.settings.resources)),
            volume_mounts: Some(mounts),
            startup_probe: Some(probes::startup()),
            readiness_probe: Some(probes::readiness(self.answers())),
            liveness_probe: Some(probes::liveness()),
            security_context: Some(container_security()),
            termination_message_path: Some(names::TERMINATION_LOG.to_owned()),
            termination_message_policy: Some("File".to_owned()),
            ..Container::default()
        }
    }

    fn own_volumes(&self, claims: &BTreeMap<String, Access>) -> Vec<Volume> {
        let mut volumes = vec![
            Volume {
                name: CONFIG_VOLUME.to_owned(),
                config_map: Some(ConfigMapVolumeSource {
                    name: self.config_map.to_owned(),
                    ..ConfigMapVolumeSource::default()
                }),
                ..Volume::default()
            },
            Volume {
                name: TOKEN_VOLUME.to_owned(),
                secret: Some(SecretVolumeSource {
                    secret_name: Some(self.token.to_owned()),
                    default_mode: Some(0o440),
                    ..SecretVolumeSource::default()
                }),
                ..Volume::default()
            },
            Volume {
                name: SCRATCH_VOLUME.to_owned(),
                empty_dir: Some(EmptyDirVolumeSource::default()),
                ..Volume::default()
            },
        ];
        if self.shares_memory() {
            volumes.push(Volume {
                name: SHARED_MEMORY_VOLUME.to_owned(),
                empty_dir: Some(EmptyDirVolumeSource {
                    medium: Some("Memory".to_owned()),
                    size_limit: Some(Quantity(SHARED_MEMORY_LIMIT.to_owned())),
                    ..EmptyDirVolumeSource::default()
                }),
                ..Volume::default()
            });
        }
        volumes.extend(claims.keys().enumerate().map(|(index, claim)| Volume {
            name: claim_volume(index),
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                claim_name: claim.clone(),
                read_only: None,
            }),
            ..Volume::default()
        }));
        volumes
    }
}

/// Claims may have names that volumes may not, so volumes are numbered in the order of the claims.
fn claim_volume(index: usize) -> String {
    format!("claim-{index}")
}

fn claim_dir(claim: &str) -> String {
    format!("{}/{claim}", names::VOLUME_DIR)
}

fn own_mounts(claims: &BTreeMap<String, Access>) -> Vec<VolumeMount> {
    let mount = |name: &str, path: &str, read_only: bool| VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    };
    let mut mounts = vec![
        mount(CONFIG_VOLUME, names::CONFIG_DIR, true),
        mount(TOKEN_VOLUME, names::TOKEN_DIR, true),
        mount(SCRATCH_VOLUME, SCRATCH_DIR, false),
    ];
    for (index, (claim, access)) in claims.iter().enumerate() {
        mounts.push(mount(&claim_volume(index), &claim_dir(claim), *access == Access::Read));
    }
    mounts
}

fn args(claims: &BTreeMap<String, Access>) -> Vec<String> {
    let mut args = vec![
        "run".to_owned(),
        "--config".to_owned(),
        names::ROLE_CONFIG_PATH.to_owned(),
    ];
    for claim in claims.keys() {
        args.push("--volume".to_owned());
        args.push(format!("{claim}={}", claim_dir(claim)));
    }
    args.push("--token-file".to_owned());
    args.push(format!("{}/{}", names::TOKEN_DIR, names::TOKEN_FILE));
    args.push("--termination-log".to_owned());
    args.push(names::TERMINATION_LOG.to_owned());
    args
}

fn own_env() -> Vec<EnvVar> {
    vec![
        EnvVar {
            name: names::POD_IP_ENV.to_owned(),
            value_from: Some(EnvVarSource {
                field_ref: Some(ObjectFieldSelector {
                    field_path: "status.podIP".to_owned(),
                    ..ObjectFieldSelector::default()
                }),
                ..EnvVarSource::default()
            }),
            ..EnvVar::default()
        },
        EnvVar {
            name: "TMPDIR".to_owned(),
            value: Some(SCRATCH_DIR.to_owned()),
            ..EnvVar::default()
        },
    ]
}

fn resources(settings: &Resources) -> ResourceRequirements {
    let quantities = |map: &BTreeMap<String, String>| {
        let quantities = map.iter().map(|(name, text)| (name.clone(), Quantity(text.clone())));
        (!map.is_empty()).then(|| quantities.collect())
    };
    ResourceRequirements {
        requests: quantities(&settings.requests),
        limits: quantities(&settings.limits),
        ..ResourceRequirements::default()
    }
}

fn pod_security() -> PodSecurityContext {
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: Some(UID),
        run_as_group: Some(UID),
        fs_group: Some(UID),
        // A claim of many gigabytes is not walked again for each pod.
        fs_group_change_policy: Some("OnRootMismatch".to_owned()),
        seccomp_profile: Some(SeccompProfile {
            type_: "RuntimeDefault".to_owned(),
            localhost_profile: None,
        }),
        ..PodSecurityContext::default()
    }
}

fn container_security() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        read_only_root_filesystem: Some(true),
        run_as_non_root: Some(true),
        capabilities: Some(Capabilities {
            add: None,
            drop: Some(vec!["ALL".to_owned()]),
        }),
        seccomp_profile: Some(SeccompProfile {
            type_: "RuntimeDefault".to_owned(),
            localhost_profile: None,
        }),
        ..SecurityContext::default()
    }
}

#[cfg(test)]
mod tests;
