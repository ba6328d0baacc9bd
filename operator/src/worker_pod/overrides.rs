//! What users may not override: the names and paths that the operator itself needs in a pod.

use flotilla_api::{names, pod::PodSettings};

use super::{CONFIG_VOLUME, SCRATCH_DIR, SCRATCH_VOLUME, SHARED_MEMORY_VOLUME, TOKEN_VOLUME};

/// An override that would break the pod.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum OverrideError {
    /// A variable that the operator sets.
    #[error("podOverrides.env: {name} is set by the operator")]
    Env {
        /// Name of the variable.
        name: String,
    },
    /// A volume with the name of one of the operator's.
    #[error("podOverrides.volumes: the name {name:?} is used by the operator")]
    Volume {
        /// Name of the volume.
        name: String,
    },
    /// A mount at or below a path of the operator's, or above it.
    #[error("podOverrides.volumeMounts: {path:?} overlaps {taken:?}, which the operator mounts")]
    Mount {
        /// The mount path.
        path: String,
        /// The operator's.
        taken: &'static str,
    },
    /// A mount without its volume.
    #[error("podOverrides.volumeMounts: no volume {name:?} in podOverrides.volumes")]
    NoVolume {
        /// Name of the volume.
        name: String,
    },
}

/// Refuses settings that collide with what the operator writes.
pub fn check(settings: &PodSettings) -> Result<(), OverrideError> {
    let overrides = &settings.pod_overrides;
    for variable in &overrides.env {
        if variable.name == names::POD_IP_ENV {
            return Err(OverrideError::Env {
                name: variable.name.clone(),
            });
        }
    }
    for volume in &overrides.volumes {
        let own = [CONFIG_VOLUME, TOKEN_VOLUME, SCRATCH_VOLUME, SHARED_MEMORY_VOLUME].contains(&volume.name.as_str());
        if own || volume.name.starts_with("claim-") {
            return Err(OverrideError::Volume {
                name: volume.name.clone(),
            });
        }
    }
    for mount in &overrides.volume_mounts {
        if !overrides.volumes.iter().any(|volume| volume.name == mount.name) {
            return Err(OverrideError::NoVolume {
                name: mount.name.clone(),
            });
        }
        for taken in [names::CONFIG_DIR, names::TOKEN_DIR, names::VOLUME_DIR, SCRATCH_DIR] {
            if overlaps(&mount.mount_path, taken) {
                return Err(OverrideError::Mount {
                    path: mount.mount_path.clone(),
                    taken,
                });
            }
        }
    }
    Ok(())
}

fn overlaps(a: &str, b: &str) -> bool {
    let (a, b) = (
        format!("{}/", a.trim_end_matches('/')),
        format!("{}/", b.trim_end_matches('/')),
    );
    a.starts_with(&b) || b.starts_with(&a)
}

#[cfg(test)]
mod tests {
    use flotilla_api::pod::PodOverrides;
    use k8s_openapi::api::core::v1::{EnvVar, Volume, VolumeMount};

    use super::*;

    fn settings(volume: &str, path: &str) -> PodSettings {
        PodSettings {
            pod_overrides: PodOverrides {
                volumes: vec![Volume {
                    name: volume.into(),
                    ..Volume::default()
                }],
                volume_mounts: vec![VolumeMount {
                    name: "cache".into(),
                    mount_path: path.into(),
                    ..VolumeMount::default()
                }],
                ..PodOverrides::default()
            },
            ..PodSettings::default()
        }
    }

    #[test]
    fn what_the_operator_needs_cannot_be_overridden() {
        assert_eq!(check(&settings("cache", "/cache")), Ok(()));
        assert!(matches!(
            check(&settings("token", "/cache")),
            Err(OverrideError::Volume { .. })
        ));
        assert!(matches!(
            check(&settings("other", "/cache")),
            Err(OverrideError::NoVolume { .. })
        ));
        assert!(matches!(
            check(&settings("cache", "/etc")),
            Err(OverrideError::Mount { .. })
        ));
        assert!(matches!(
            check(&settings("cache", "/tmp/x/")),
            Err(OverrideError::Mount { .. })
        ));
        assert_eq!(check(&settings("cache", "/tmpx")), Ok(()));
        let mut env = PodSettings::default();
        env.pod_overrides.env = vec![EnvVar {
            name: "POD_IP".into(),
            ..EnvVar::default()
        }];
        assert!(matches!(check(&env), Err(OverrideError::Env { .. })));
    }
}
