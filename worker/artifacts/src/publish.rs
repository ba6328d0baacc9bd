//! How a directory becomes visible: written beside its place, flushed, renamed, marked.
//!
//! At any moment of a crash the place holds nothing, an unmarked directory (ignored and removed at the next start) or the
//! whole one.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use crate::{
    error::{ArtifactError, io},
    manifest::{MANIFEST, Manifest, list_files},
};

/// Marker of a directory that was completely written; it holds the digest.
pub const STABLE: &str = "STABLE";
/// Begin of the names of directories being written.
const TEMPORARY: &str = ".tmp-";

/// A directory that is being written. Dropping it without [`Draft::publish`] removes it.
#[derive(Debug)]
pub struct Draft {
    temporary: PathBuf,
    target: PathBuf,
    replaces: bool,
}

/// A directory that is visible.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Published {
    /// Where it lies.
    pub path: PathBuf,
    /// `sha256:<hex>` of its manifest.
    pub digest: String,
    /// Bytes of all files.
    pub bytes: u64,
}

impl Draft {
    /// Begins an empty directory beside `target`, in place of one that an earlier process left there.
    pub fn begin(target: &Path) -> Result<Self, ArtifactError> {
        if is_stable(target) {
            return Err(ArtifactError::AlreadyPublished {
                path: target.to_path_buf(),
            });
        }
        Self::begin_replacing(target)
    }

    /// Like [`Draft::begin`], but takes the place of a stable directory: that one stays readable until the new one is
    /// wholly on disk. A crash between the removal of the one and the renaming of the other loses both.
    pub fn begin_replacing(target: &Path) -> Result<Self, ArtifactError> {
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let parent = target.parent().unwrap_or(Path::new("."));
        let temporary = parent.join(format!("{TEMPORARY}{name}"));
        remove_dir(&temporary)?;
        fs::create_dir_all(&temporary).map_err(io("create", &temporary))?;
        Ok(Self {
            temporary,
            replaces: is_stable(target),
            target: target.to_path_buf(),
        })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Describes and flushes every file, renames the directory to its place and marks it.
    pub fn publish(self) -> Result<Published, ArtifactError> {
        let manifest = Manifest::of(&self.temporary)?;
        write_flushed(&self.temporary.join(MANIFEST), &manifest.to_bytes())?;
        flush_tree(&self.temporary)?;
        if self.replaces {
            remove_published(&self.target)?;
        }
        remove_dir(&self.target)?;
        fs::rename(&self.temporary, &self.target).map_err(io("rename", &self.temporary))?;
        let parent = self.target.parent().unwrap_or(Path::new("."));
        flush(parent)?;
        let digest = manifest.digest();
        let marker = self.target.join(format!("{TEMPORARY}{STABLE}"));
        write_flushed(&marker, format!("{digest}\n").as_bytes())?;
        fs::rename(&marker, self.target.join(STABLE)).map_err(io("rename", &marker))?;
        flush(&self.target)?;
        Ok(Published {
            path: self.target.clone(),
            digest,
            bytes: manifest.total_bytes(),
        })
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.temporary.exists() {
            drop(fs::remove_dir_all(&self.temporary));
        }
    }
}

/// True where a directory was completely written.
pub fn is_stable(dir: &Path) -> bool {
    dir.join(STABLE).is_file()
}

/// Takes the marker away first, so that a half-removed directory is never read, then removes the directory.
pub fn remove_published(dir: &Path) -> Result<(), ArtifactError> {
    let marker = dir.join(STABLE);
    if marker.exists() {
        fs::remove_file(&marker).map_err(io("remove", &marker))?;
        flush(dir)?;
    }
    remove_dir(dir)
}

/// Removes what an interrupted process left in a directory of published directories: unmarked and temporary ones.
/// Returns their names. Only the one process that writes there may call it.
pub fn remove_leftovers(parent: &Path) -> Result<Vec<String>, ArtifactError> {
    let mut removed = Vec::new();
    if !parent.is_dir() {
        return Ok(removed);
    }
    for entry in fs::read_dir(parent).map_err(io("list", parent))? {
        let path = entry.map_err(io("list", parent))?.path();
        if path.is_dir() && !is_stable(&path) {
            remove_dir(&path)?;
            removed.push(path.file_name().unwrap_or_default().to_string_lossy().into_owned());
        }
    }
    removed.sort();
    Ok(removed)
}

/// Writes a file by a flushed temporary beside it and a rename: readers see the old bytes or the new ones.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<(), ArtifactError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!("{TEMPORARY}{name}"));
    write_flushed(&temporary, bytes)?;
    fs::rename(&temporary, path).map_err(io("rename", &temporary))?;
    flush(path.parent().unwrap_or(Path::new(".")))
}

fn write_flushed(path: &Path, bytes: &[u8]) -> Result<(), ArtifactError> {
    let mut file = File::create(path).map_err(io("create", path))?;
    file.write_all(bytes).map_err(io("write", path))?;
    file.sync_all().map_err(io("flush", path))
}

/// Flushes every file and every folder below a directory.
fn flush_tree(dir: &Path) -> Result<(), ArtifactError> {
    let mut folders = vec![dir.to_path_buf()];
    for file in list_files(dir)? {
        let path = dir.join(file);
        flush(&path)?;
        let folder = path.parent().unwrap_or(dir).to_path_buf();
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    folders.iter().rev().try_for_each(|folder| flush(folder))
}

fn flush(path: &Path) -> Result<(), ArtifactError> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(io("flush", path))
}

fn remove_dir(dir: &Path) -> Result<(), ArtifactError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io("remove", dir)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft(target: &Path, text: &str) -> Draft {
        let draft = Draft::begin(target).expect("begin");
        fs::create_dir_all(draft.path().join("sub")).expect("sub");
        fs::write(draft.path().join("a.txt"), text).expect("a");
        fs::write(draft.path().join("sub/b.txt"), "b").expect("b");
        draft
    }

    #[test]
    fn a_directory_is_visible_only_when_whole() {
        let dir = tempfile::tempdir().expect("temp dir");
        let target = dir.path().join("x");
        let draft = draft(&target, "a");
        assert!(!target.exists());
        let published = draft.publish().expect("publish");
        assert!(is_stable(&target));
        assert_eq!(published.bytes, 2);
        let (manifest, digest) = Manifest::read(&target).expect("read").expect("manifest");
        assert_eq!(digest, published.digest);
        assert_eq!(manifest.digest(), digest);
        assert_eq!(
            fs::read_to_string(target.join(STABLE)).expect("marker").trim(),
            published.digest
        );
        manifest.check(&target).expect("files are those of the manifest");
    }

    #[test]
    fn the_same_files_have_the_same_digest_and_others_another() {
        let dir = tempfile::tempdir().expect("temp dir");
        let digest = |name: &str, text: &str| draft(&dir.path().join(name), text).publish().expect("publish").digest;
        assert_eq!(digest("x", "a"), digest("y", "a"));
        assert_ne!(digest("z", "b"), digest("w", "a"));
    }

    #[test]
    fn a_dropped_draft_leaves_nothing() {
        let dir = tempfile::tempdir().expect("temp dir");
        drop(draft(&dir.path().join("x"), "a"));
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 0);
    }

    #[test]
    fn leftovers_of_an_interrupted_process_are_removed_and_stable_ones_kept() {
        let dir = tempfile::tempdir().expect("temp dir");
        draft(&dir.path().join("kept"), "a").publish().expect("publish");
        fs::create_dir(dir.path().join("renamed-but-unmarked")).expect("create");
        std::mem::forget(draft(&dir.path().join("half"), "a"));
        assert_eq!(
            remove_leftovers(dir.path()).expect("remove"),
            vec![".tmp-half".to_owned(), "renamed-but-unmarked".to_owned()]
        );
        assert!(is_stable(&dir.path().join("kept")));
    }

    #[test]
    fn a_stable_directory_is_not_overwritten() {
        let dir = tempfile::tempdir().expect("temp dir");
        let target = dir.path().join("x");
        draft(&target, "a").publish().expect("publish");
        assert!(matches!(
            Draft::begin(&target),
            Err(ArtifactError::AlreadyPublished { .. })
        ));
    }

    #[test]
    fn a_replaced_directory_stays_until_the_new_one_is_written() {
        let dir = tempfile::tempdir().expect("temp dir");
        let target = dir.path().join("x");
        let first = draft(&target, "a").publish().expect("publish").digest;
        let second = Draft::begin_replacing(&target).expect("begin");
        fs::write(second.path().join("c.txt"), "c").expect("write");
        assert_eq!(Manifest::read(&target).expect("read").expect("manifest").1, first);
        let second = second.publish().expect("publish").digest;
        assert_eq!(Manifest::read(&target).expect("read").expect("manifest").1, second);
        assert!(is_stable(&target) && !target.join("a.txt").exists());
    }
}
