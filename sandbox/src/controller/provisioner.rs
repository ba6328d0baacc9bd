//! Claims of a real cluster as directories of this machine: an external provisioner in the sense of Kubernetes.
//!
//! It makes a StorageClass of its own; for each claim of that class a directory (filled from [`super::claim::SEED_FROM`],
//! once) and a PersistentVolume that names it. Binding is the work of kube-controller-manager. A released volume goes with
//! its directory. The node that mounts the claims must use the same directory.
//!
//! Whoever may make claims of the class may have any directory copied that this process can read: it is for clusters whose
//! users are trusted with the machine, as those of tests are.

use std::{io, path::PathBuf};

use k8s_openapi::api::{
    core::v1::{PersistentVolume, PersistentVolumeClaim},
    storage::v1::StorageClass,
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
    runtime::watcher,
};
use serde_json::json;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{
    RESYNC, RETRY,
    claim::{Place, SEED_FROM},
    mirror::{Bell, mirror},
};
use crate::node::event::{EventRecorder, Severity, reference};

/// Field manager of the class.
const MANAGER: &str = "flotilla-sandbox";
/// Says which provisioner made a volume.
const PROVISIONED_BY: &str = "pv.kubernetes.io/provisioned-by";

/// Claims of one class.
#[derive(Clone, Debug)]
pub struct ProvisionerConfig {
    /// Directory of the node; claims lie below `volumes`.
    pub dir: PathBuf,
    /// Name of the StorageClass.
    pub class: String,
}

impl ProvisionerConfig {
    /// Name under which the class knows this provisioner: two of one cluster never take each other's claims.
    fn provisioner(&self) -> String {
        format!("sandbox.flotilla.dev/{}", self.class)
    }
}

/// Makes the class, then provisions and reclaims until `shutdown`. The class is left: claims may still name it.
pub async fn run(client: Client, config: ProvisionerConfig, shutdown: CancellationToken) -> Result<(), kube::Error> {
    make_class(&client, &config).await?;
    let (bell, mut tasks) = (Bell::default(), JoinSet::new());
    let watch = watcher::Config::default;
    let claims = mirror(
        Api::<PersistentVolumeClaim>::all(client.clone()),
        watch(),
        &bell,
        &mut tasks,
    );
    let volumes = mirror(Api::<PersistentVolume>::all(client.clone()), watch(), &bell, &mut tasks);
    let provisioner = Provisioner {
        events: EventRecorder::new(client.clone(), &config.provisioner(), None),
        client,
        config,
    };
    let work = async {
        loop {
            let mut well = true;
            for claim in claims.state() {
                if provisioner.wants(&claim) {
                    well &= provisioner.provision(&claim).await;
                }
            }
            for volume in volumes.state() {
                if provisioner.is_released(&volume) {
                    well &= provisioner.reclaim(&volume).await;
                }
            }
            bell.wait(if well { RESYNC } else { RETRY }).await;
        }
    };
    tokio::select! {
        () = work => {}
        () = shutdown.cancelled() => {}
    }
    Ok(())
}

async fn make_class(client: &Client, config: &ProvisionerConfig) -> Result<(), kube::Error> {
    let classes: Api<StorageClass> = Api::all(client.clone());
    let class = json!({
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": config.class},
        "provisioner": config.provisioner(),
        "reclaimPolicy": "Delete",
        "volumeBindingMode": "Immediate",
    });
    let params = PatchParams::apply(MANAGER).force();
    classes.patch(&config.class, &params, &Patch::Apply(&class)).await?;
    Ok(())
}

struct Provisioner {
    client: Client,
    config: ProvisionerConfig,
    events: EventRecorder,
}

impl Provisioner {
    fn wants(&self, claim: &PersistentVolumeClaim) -> bool {
        let of_class = |spec: &k8s_openapi::api::core::v1::PersistentVolumeClaimSpec| {
            spec.storage_class_name.as_deref() == Some(&self.config.class) && spec.volume_name.is_none()
        };
        claim.metadata.deletion_timestamp.is_none() && claim.spec.as_ref().is_some_and(of_class)
    }

    async fn provision(&self, claim: &PersistentVolumeClaim) -> bool {
        let place = Place::of(&self.config.dir, claim);
        let seed = claim.annotations().get(SEED_FROM).map(PathBuf::from);
        let made = tokio::task::spawn_blocking({
            let place = place.clone();
            move || place.make(seed.as_deref())
        });
        let made = made.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        if let Err(error) = made {
            let text = format!("making {}: {error}", place.dir().display());
            self.events
                .record(reference(claim), Severity::Warning, "ProvisioningFailed", text);
            return false;
        }
        let volumes: Api<PersistentVolume> = Api::all(self.client.clone());
        let Some(volume) = self.volume(claim, &place) else {
            return true;
        };
        match volumes.create(&PostParams::default(), &volume).await {
            Ok(_) => {
                let text = format!("Successfully provisioned volume {}", volume.name_any());
                self.events
                    .record(reference(claim), Severity::Normal, "ProvisioningSucceeded", text);
                true
            }
            // It is there and not bound yet.
            Err(kube::Error::Api(status)) if status.code == 409 => true,
            Err(error) => {
                tracing::warn!(claim = claim.name_any(), %error, "a volume was not made");
                false
            }
        }
    }

    /// The volume of `claim`, bound to it and to no namesake that comes later.
    fn volume(&self, claim: &PersistentVolumeClaim, place: &Place) -> Option<PersistentVolume> {
        let (spec, uid) = (claim.spec.as_ref()?, claim.uid()?);
        let requests = spec.resources.as_ref().and_then(|resources| resources.requests.clone());
        serde_json::from_value(json!({
            "metadata": {
                "name": format!("pvc-{uid}"),
                "annotations": {PROVISIONED_BY: self.config.provisioner()},
            },
            "spec": {
                "capacity": requests.unwrap_or_default(),
                "accessModes": spec.access_modes,
                "persistentVolumeReclaimPolicy": "Delete",
                "storageClassName": self.config.class,
                "volumeMode": "Filesystem",
                "hostPath": {"path": place.dir(), "type": "Directory"},
                "claimRef": {
                    "apiVersion": "v1", "kind": "PersistentVolumeClaim", "uid": uid,
                    "namespace": claim.namespace(), "name": claim.name_any(),
                },
            },
        }))
        .ok()
    }

    fn is_released(&self, volume: &PersistentVolume) -> bool {
        let phase = volume.status.as_ref().and_then(|status| status.phase.as_deref());
        volume.annotations().get(PROVISIONED_BY) == Some(&self.config.provisioner())
            && volume.metadata.deletion_timestamp.is_none()
            && phase == Some("Released")
    }

    async fn reclaim(&self, volume: &PersistentVolume) -> bool {
        let claim = volume
            .spec
            .as_ref()
            .and_then(|spec| spec.claim_ref.clone())
            .unwrap_or_default();
        let (namespace, name) = (claim.namespace.unwrap_or_default(), claim.name.unwrap_or_default());
        let place = Place::named(&self.config.dir, &namespace, &name, &claim.uid.unwrap_or_default());
        let removed = tokio::task::spawn_blocking(move || place.remove()).await;
        if let Ok(Err(error)) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(volume = volume.name_any(), %error, "the directory of a released volume was not removed");
            return false;
        }
        let volumes: Api<PersistentVolume> = Api::all(self.client.clone());
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: volume.uid(),
                ..Preconditions::default()
            }),
            ..DeleteParams::default()
        };
        match volumes.delete(&volume.name_any(), &params).await {
            Ok(_) => true,
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => true,
            Err(error) => {
                tracing::warn!(volume = volume.name_any(), %error, "a released volume was not deleted");
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(spec: &serde_json::Value) -> PersistentVolumeClaim {
        let claim = json!({"metadata": {"name": "c", "namespace": "n", "uid": "u"}, "spec": spec});
        serde_json::from_value(claim).unwrap()
    }

    fn provisioner() -> Provisioner {
        let service = tower::service_fn(|_: http::Request<kube::client::Body>| async {
            Ok::<_, std::convert::Infallible>(http::Response::new(kube::client::Body::empty()))
        });
        let client = Client::new(service, "default");
        Provisioner {
            events: EventRecorder::new(client.clone(), "test", None),
            client,
            config: ProvisionerConfig {
                dir: PathBuf::from("/d"),
                class: "mine".to_owned(),
            },
        }
    }

    #[tokio::test]
    async fn only_unbound_claims_of_its_class_are_its_work() {
        let provisioner = provisioner();
        assert!(provisioner.wants(&claim(&json!({"storageClassName": "mine"}))));
        assert!(!provisioner.wants(&claim(&json!({"storageClassName": "other"}))));
        assert!(!provisioner.wants(&claim(&json!({}))));
        assert!(!provisioner.wants(&claim(&json!({"storageClassName": "mine", "volumeName": "v"}))));
    }

    #[tokio::test]
    async fn a_volume_is_tied_to_the_uid_of_its_claim() {
        let spec = json!({"storageClassName": "mine", "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": "1Gi"}}});
        let claim = claim(&spec);
        let volume = provisioner()
            .volume(&claim, &Place::of(&PathBuf::from("/d"), &claim))
            .unwrap();
        let spec = volume.spec.unwrap();
        assert_eq!(spec.claim_ref.unwrap().uid.as_deref(), Some("u"));
        assert_eq!(spec.capacity.unwrap()["storage"].0, "1Gi");
        assert_eq!(spec.host_path.unwrap().path, "/d/volumes/n/c");
    }
}
