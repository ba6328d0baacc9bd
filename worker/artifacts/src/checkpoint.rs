//! The checkpoints of a run: list, verify, prune. They are written by [`crate::publish::Draft`].

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    error::{ArtifactError, io},
    layout::checkpoint_step,
    manifest::Manifest,
    publish::{is_stable, remove_published},
};

/// A stable checkpoint on disk.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Checkpoint {
    /// Step after which it was written.
    pub step: u32,
    /// Where it lies.
    pub path: PathBuf,
    /// `sha256:<hex>` of its manifest.
    pub digest: String,
    /// Bytes of all files.
    pub bytes: u64,
}

/// What [`verify`] found.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Verified {
    /// Digest of the manifest, None for a directory that Flotilla did not write and of which no digest was demanded.
    pub digest: Option<String>,
    /// Bytes of all files of the manifest.
    pub bytes: u64,
}

/// Stable checkpoints of a run, oldest first.
pub fn list(checkpoints: &Path) -> Result<Vec<Checkpoint>, ArtifactError> {
    let mut found = Vec::new();
    if !checkpoints.is_dir() {
        return Ok(found);
    }
    for entry in fs::read_dir(checkpoints).map_err(io("list", checkpoints))? {
        let path = entry.map_err(io("list", checkpoints))?.path();
        let step = checkpoint_step(&path.file_name().unwrap_or_default().to_string_lossy());
        let Some(step) = step.filter(|_| is_stable(&path)) else {
            continue;
        };
        if let Some((manifest, digest)) = Manifest::read(&path)? {
            found.push(Checkpoint {
                step,
                path,
                digest,
                bytes: manifest.total_bytes(),
            });
        }
    }
    found.sort_by_key(|checkpoint| checkpoint.step);
    Ok(found)
}

/// The newest stable checkpoint of a run.
pub fn newest(checkpoints: &Path) -> Result<Option<Checkpoint>, ArtifactError> {
    Ok(list(checkpoints)?.pop())
}

/// Reads every byte of a model directory and compares it with its manifest, and the manifest's digest with the one
/// demanded. A directory with neither manifest nor demanded digest (one that Flotilla did not write) passes unread.
pub fn verify(dir: &Path, expected: Option<&str>) -> Result<Verified, ArtifactError> {
    let Some((manifest, found)) = Manifest::read(dir)? else {
        return match expected {
            Some(expected) => Err(ArtifactError::NoManifest {
                path: dir.to_path_buf(),
                expected: expected.to_owned(),
            }),
            None => Ok(Verified { digest: None, bytes: 0 }),
        };
    };
    if !is_stable(dir) {
        return Err(ArtifactError::NotStable {
            path: dir.to_path_buf(),
        });
    }
    if let Some(expected) = expected.filter(|expected| *expected != found) {
        return Err(ArtifactError::DigestMismatch {
            path: dir.to_path_buf(),
            expected: expected.to_owned(),
            found,
        });
    }
    manifest.check(dir)?;
    Ok(Verified {
        digest: Some(found),
        bytes: manifest.total_bytes(),
    })
}

/// Removes the oldest stable checkpoints until `keep_last` (at least one) are left; `keep` is never removed and does not
/// count. Returns the removed steps.
pub fn prune(checkpoints: &Path, keep_last: usize, keep: Option<u32>) -> Result<Vec<u32>, ArtifactError> {
    let mut all = list(checkpoints)?;
    all.retain(|checkpoint| Some(checkpoint.step) != keep);
    let surplus = all.len().saturating_sub(keep_last.max(1));
    all.truncate(surplus);
    for checkpoint in &all {
        remove_published(&checkpoint.path)?;
    }
    Ok(all.into_iter().map(|checkpoint| checkpoint.step).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{layout::RunDir, publish::Draft};

    fn write(run: &RunDir, step: u32) -> String {
        let draft = Draft::begin(&run.checkpoint(step)).expect("begin");
        fs::write(draft.path().join("model.safetensors"), format!("weights {step}")).expect("weights");
        fs::write(draft.path().join("config.json"), "{}").expect("config");
        draft.publish().expect("publish").digest
    }

    #[test]
    fn only_stable_checkpoints_are_listed_oldest_first() {
        let dir = tempfile::tempdir().expect("temp dir");
        let run = RunDir::new(dir.path());
        let digests = [write(&run, 20), write(&run, 5)];
        fs::create_dir(run.checkpoint(30)).expect("unmarked");
        let found = list(&run.checkpoints()).expect("list");
        assert_eq!(found.iter().map(|c| c.step).collect::<Vec<_>>(), vec![5, 20]);
        let last = newest(&run.checkpoints()).expect("newest").expect("some");
        assert_eq!((last.step, &last.digest), (20, &digests[0]));
    }

    #[test]
    fn verify_names_the_first_file_that_differs() {
        let dir = tempfile::tempdir().expect("temp dir");
        let run = RunDir::new(dir.path());
        let digest = write(&run, 1);
        let path = run.checkpoint(1);
        assert_eq!(
            verify(&path, Some(&digest)).expect("intact").digest,
            Some(digest.clone())
        );
        fs::write(path.join("model.safetensors"), "weights 2").expect("flip");
        let error = verify(&path, Some(&digest)).expect_err("differs").to_string();
        assert!(error.contains("model.safetensors has sha256"), "{error}");
        fs::write(path.join("model.safetensors"), "weights").expect("cut");
        let error = verify(&path, None).expect_err("differs").to_string();
        assert!(
            error.contains("model.safetensors has 7 bytes, the manifest says 9"),
            "{error}"
        );
        fs::remove_file(path.join("model.safetensors")).expect("remove");
        let error = verify(&path, None).expect_err("missing").to_string();
        assert!(error.contains("model.safetensors cannot be read"), "{error}");
    }

    #[test]
    fn a_file_that_the_manifest_does_not_know_is_refused() {
        let dir = tempfile::tempdir().expect("temp dir");
        let run = RunDir::new(dir.path());
        write(&run, 1);
        fs::write(run.checkpoint(1).join("model-2.safetensors"), "x").expect("write");
        let error = verify(&run.checkpoint(1), None).expect_err("extra").to_string();
        assert!(error.contains("model-2.safetensors is not in the manifest"), "{error}");
    }

    #[test]
    fn another_digest_than_demanded_is_refused() {
        let dir = tempfile::tempdir().expect("temp dir");
        let run = RunDir::new(dir.path());
        write(&run, 1);
        let error = verify(&run.checkpoint(1), Some("sha256:00")).expect_err("mismatch");
        assert!(matches!(error, ArtifactError::DigestMismatch { .. }), "{error}");
    }

    #[test]
    fn a_foreign_directory_passes_only_where_no_digest_is_demanded() {
        let dir = tempfile::tempdir().expect("temp dir");
        assert_eq!(verify(dir.path(), None).expect("foreign").digest, None);
        assert!(matches!(
            verify(dir.path(), Some("sha256:00")),
            Err(ArtifactError::NoManifest { .. })
        ));
    }

    #[test]
    fn prune_keeps_the_newest_and_the_protected_one() {
        let dir = tempfile::tempdir().expect("temp dir");
        let run = RunDir::new(dir.path());
        for step in 1..=5 {
            write(&run, step);
        }
        assert_eq!(prune(&run.checkpoints(), 2, Some(1)).expect("prune"), vec![2, 3]);
        let left: Vec<_> = list(&run.checkpoints()).expect("list").iter().map(|c| c.step).collect();
        assert_eq!(left, vec![1, 4, 5]);
    }
}
