//! Makes a directory for each claim and binds it.
//!
//! A claim's directory is `volumes/NAMESPACE/CLAIM`. The annotation [`SEED_FROM`] fills a new one with a copy of an
//! absolute directory, once. Beside the directory lies `.CLAIM.uid` with the uid of the claim that it belongs to: a
//! claim that was deleted and made anew begins empty, as with the reclaim policy `Delete`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::{
    Api, Client, ResourceExt,
    api::{Patch, PatchParams},
    runtime::watcher,
};
use serde_json::json;
use tokio::{sync::mpsc, task::JoinSet};

use super::{
    RESYNC,
    mirror::{Bell, mirror_with},
};
use crate::node::{
    claim_dir,
    event::{EventRecorder, Severity, reference},
};

/// Annotation with the directory whose files a new claim begins with. Equals `flotilla_api::names::annotation::SEED_FROM`.
pub const SEED_FROM: &str = "sandbox.flotilla.dev/seed-from";

/// Pause between two tries of a claim that cannot be provisioned.
const RETRY: std::time::Duration = std::time::Duration::from_secs(2);

/// Watches and binds for ever.
pub async fn run(client: Client, root: PathBuf, events: EventRecorder) {
    let (bell, mut tasks) = (Bell::default(), JoinSet::new());
    let (sender, mut deleted) = mpsc::unbounded_channel();
    let api: Api<PersistentVolumeClaim> = Api::all(client.clone());
    let (claims, _) = mirror_with(api, watcher::Config::default(), &bell, &mut tasks, Some(sender));
    loop {
        while let Ok(claim) = deleted.try_recv() {
            reclaim(&root, claim).await;
        }
        let mut well = true;
        for claim in claims.state() {
            let bound = claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound");
            if !bound && claim.metadata.deletion_timestamp.is_none() {
                well &= provision(&client, &root, &events, &claim).await;
            }
        }
        bell.wait(if well { RESYNC } else { RETRY }).await;
    }
}

async fn provision(client: &Client, root: &Path, events: &EventRecorder, claim: &PersistentVolumeClaim) -> bool {
    let place = Place::of(root, claim);
    let seed = claim.annotations().get(SEED_FROM).map(PathBuf::from);
    let made = tokio::task::spawn_blocking({
        let (place, seed) = (place.clone(), seed.clone());
        move || place.make(seed.as_deref())
    })
    .await
    .unwrap_or_else(|error| Err(io::Error::other(error)));
    if let Err(error) = made {
        let text = match &seed {
            Some(seed) => format!("filling {} from {}: {error}", place.dir.display(), seed.display()),
            None => format!("making {}: {error}", place.dir.display()),
        };
        events.record(reference(claim), Severity::Warning, "ProvisioningFailed", text);
        return false;
    }
    match bind(client, claim).await {
        Ok(()) => {
            let text = format!("Successfully provisioned {}", place.dir.display());
            events.record(reference(claim), Severity::Normal, "ProvisioningSucceeded", text);
            true
        }
        Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => true,
        Err(error) => {
            tracing::warn!(claim = claim.name_any(), %error, "a claim was not bound");
            false
        }
    }
}

async fn bind(client: &Client, claim: &PersistentVolumeClaim) -> Result<(), kube::Error> {
    let api: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), &claim.namespace().unwrap_or_default());
    let spec = claim.spec.clone().unwrap_or_default();
    let capacity = spec
        .resources
        .and_then(|resources| resources.requests)
        .unwrap_or_default();
    let (name, params) = (claim.name_any(), PatchParams::default());
    let uid = claim.uid();
    if spec.volume_name.is_none() {
        let volume = format!("pvc-{}", uid.clone().unwrap_or_default());
        let patch = json!({"metadata": {"uid": uid}, "spec": {"volumeName": volume}});
        api.patch(&name, &params, &Patch::Merge(&patch)).await?;
    }
    let patch = json!({"metadata": {"uid": uid}, "status": {
        "phase": "Bound", "accessModes": spec.access_modes, "capacity": capacity
    }});
    api.patch_status(&name, &params, &Patch::Merge(&patch)).await?;
    Ok(())
}

async fn reclaim(root: &Path, claim: PersistentVolumeClaim) {
    let place = Place::of(root, &claim);
    let removed = tokio::task::spawn_blocking(move || place.remove()).await;
    if let Ok(Err(error)) = removed {
        tracing::warn!(claim = claim.name_any(), %error, "the directory of a deleted claim was not removed");
    }
}

/// Where a claim's files lie and whose they are.
#[derive(Clone, Debug)]
pub(super) struct Place {
    dir: PathBuf,
    owner_file: PathBuf,
    uid: String,
}

impl Place {
    /// The place of `claim`.
    pub(super) fn of(root: &Path, claim: &PersistentVolumeClaim) -> Self {
        let (namespace, name) = (claim.namespace().unwrap_or_default(), claim.name_any());
        Self::named(root, &namespace, &name, &claim.uid().unwrap_or_default())
    }

    /// The place of the claim with this name and uid.
    pub(super) fn named(root: &Path, namespace: &str, name: &str, uid: &str) -> Self {
        let dir = claim_dir(root, namespace, name);
        Self {
            owner_file: dir.with_file_name(format!(".{name}.uid")),
            dir,
            uid: uid.to_owned(),
        }
    }

    /// The directory.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes the directory with a copy of `seed`. The owner file is written last: a copy that was cut short begins anew.
    pub(super) fn make(&self, seed: Option<&Path>) -> io::Result<()> {
        let owner = fs::read_to_string(&self.owner_file).unwrap_or_default();
        if owner == self.uid && self.dir.is_dir() {
            return Ok(());
        }
        if self.dir.exists() {
            fs::remove_dir_all(&self.dir)?;
        }
        if let Some(seed) = seed
            && !seed.is_dir()
        {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("{} is no directory", seed.display()),
            ));
        }
        fs::create_dir_all(&self.dir)?;
        if let Some(seed) = seed {
            copy_tree(seed, &self.dir)?;
        }
        fs::write(&self.owner_file, &self.uid)
    }

    /// Removes it, unless it belongs to another claim by now.
    pub(super) fn remove(&self) -> io::Result<()> {
        if fs::read_to_string(&self.owner_file).unwrap_or_default() != self.uid {
            return Ok(());
        }
        fs::remove_dir_all(&self.dir)?;
        fs::remove_file(&self.owner_file)
    }
}

/// Copies files and directories; what a link points to is copied, not the link.
fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            fs::create_dir_all(&target)?;
            copy_tree(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(root: &Path, uid: &str) -> Place {
        let claim = serde_json::from_value(json!({"metadata": {"name": "c", "namespace": "n", "uid": uid}})).unwrap();
        Place::of(root, &claim)
    }

    #[test]
    fn a_new_claim_begins_with_a_copy_of_its_seed_and_keeps_what_is_written() {
        let root = tempfile::tempdir().unwrap();
        let seed = root.path().join("seed");
        fs::create_dir_all(seed.join("deep")).unwrap();
        fs::write(seed.join("deep/a"), "1").unwrap();
        let place = place(root.path(), "u1");
        place.make(Some(&seed)).unwrap();
        assert_eq!(fs::read_to_string(place.dir.join("deep/a")).unwrap(), "1");
        fs::write(place.dir.join("b"), "2").unwrap();
        place.make(Some(&seed)).unwrap();
        assert!(place.dir.join("b").exists());
    }

    #[test]
    fn a_claim_of_the_same_name_does_not_see_what_the_deleted_one_left() {
        let root = tempfile::tempdir().unwrap();
        let first = place(root.path(), "u1");
        first.make(None).unwrap();
        fs::write(first.dir.join("a"), "1").unwrap();
        let second = place(root.path(), "u2");
        second.make(None).unwrap();
        assert!(!second.dir.join("a").exists());
        first.remove().unwrap();
        assert!(second.dir.exists());
        second.remove().unwrap();
        assert!(!second.dir.exists());
    }

    #[test]
    fn a_missing_seed_leaves_the_claim_unmade() {
        let root = tempfile::tempdir().unwrap();
        let place = place(root.path(), "u1");
        let error = place.make(Some(&root.path().join("none"))).unwrap_err();
        assert!(error.to_string().ends_with("none is no directory"), "{error}");
        assert!(!place.dir.exists());
    }
}
