//! Where fetched models are kept: `<cache>/<service>/<model>/<version>/`, a directory that exists only when it is whole.
//!
//! Beside it lie `<version>.partial/`, which an interrupted fetch leaves and the next one goes on with, `<version>.lock`, held
//! by the one process that fetches, and `<revision>.ref`, the version that a moving name had last.

use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    address::{Address, Service},
    error::{RemoteError, io},
};
use crate::digest::sha256_hex;

/// How often a lock that another process holds is tried.
const LOCK_INTERVAL: Duration = Duration::from_millis(250);

/// The versions of one model.
#[derive(Clone, Debug)]
pub(super) struct Shelf {
    dir: PathBuf,
}

/// One version.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// The whole model, if it exists.
    pub whole: PathBuf,
    /// The model while it is fetched.
    pub partial: PathBuf,
    lock: PathBuf,
}

impl Shelf {
    /// The shelf of a model in a cache.
    pub fn of(cache: &Path, address: &Address) -> Self {
        let (service, model) = match address {
            Address::Hub { repo, .. } => ("hf", repo.replace('/', "--")),
            Address::Bucket {
                service,
                bucket,
                prefix,
            } => {
                let service = match service {
                    Service::S3 => "s3",
                    Service::Google => "gs",
                    Service::Azure => "az",
                };
                let key = sha256_hex(prefix.as_bytes());
                (service, format!("{bucket}--{}", &key[..16]))
            }
        };
        Self {
            dir: cache.join(service).join(model),
        }
    }

    /// The place of a version.
    pub fn place(&self, version: &str) -> Place {
        let beside = |suffix: &str| self.dir.join(format!("{version}.{suffix}"));
        Place {
            whole: self.dir.join(version),
            partial: beside("partial"),
            lock: beside("lock"),
        }
    }

    /// The version that a moving name had when it was last asked for, if it is still here.
    pub fn last(&self, revision: &str) -> Option<Place> {
        let version = fs::read_to_string(self.reference(revision)).ok()?;
        let is_plain = version.len() <= 64 && version.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let place = is_plain.then(|| self.place(&version))?;
        place.whole.is_dir().then_some(place)
    }

    /// Notes the version of a moving name.
    pub fn remember(&self, revision: &str, version: &str) -> Result<(), RemoteError> {
        let path = self.reference(revision);
        let temporary = self.dir.join(format!(".tmp-{}-{version}", std::process::id()));
        fs::write(&temporary, version).map_err(io("write", &temporary))?;
        fs::rename(&temporary, &path).map_err(io("write", &path))
    }

    fn reference(&self, revision: &str) -> PathBuf {
        self.dir.join(format!("{}.ref", revision.replace('/', "--")))
    }
}

impl Place {
    /// Waits until no other process fetches this version, and keeps others from it until the file is dropped.
    pub async fn lock(&self) -> Result<File, RemoteError> {
        if let Some(parent) = self.lock.parent() {
            fs::create_dir_all(parent).map_err(io("create", parent))?;
        }
        let file = File::create(&self.lock).map_err(io("create", &self.lock))?;
        let mut told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(error)) => return Err(io("lock", &self.lock)(error)),
                Err(TryLockError::WouldBlock) if !told => {
                    told = true;
                    tracing::info!(path = %self.whole.display(), "waiting for another process that fetches this model");
                }
                Err(TryLockError::WouldBlock) => {}
            }
            tokio::time::sleep(LOCK_INTERVAL).await;
        }
    }

    /// Gives the whole model its name.
    pub fn finish(&self) -> Result<(), RemoteError> {
        fs::rename(&self.partial, &self.whole).map_err(io("rename", &self.partial))?;
        let parent = self.whole.parent().unwrap_or(Path::new("."));
        let flushed = File::open(parent).and_then(|parent| parent.sync_all());
        flushed.map_err(io("flush", parent))
    }
}

/// The directory to keep models in: the one that is given, else the first that can be written of the user's cache directory,
/// `/var/cache/flotilla` and a directory below the one for temporary files.
pub(super) fn directory(given: Option<&Path>) -> Result<PathBuf, RemoteError> {
    if let Some(given) = given {
        return match writable(given) {
            Ok(()) => Ok(given.to_owned()),
            Err(error) => Err(io("write to the cache", given)(error)),
        };
    }
    let variable = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let user = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
    let temporary = std::env::temp_dir().join(format!("flotilla-cache-{}", rustix::process::getuid().as_raw()));
    let candidates = user.map(|user| user.join("flotilla")).into_iter();
    let candidates = candidates.chain([PathBuf::from("/var/cache/flotilla"), temporary]);
    let mut tried = Vec::new();
    for candidate in candidates {
        match writable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(error) => tried.push(format!("{}: {error}", candidate.display())),
        }
    }
    Err(RemoteError::NoCache {
        tried: tried.join(", "),
    })
}

/// Whether this user can write there. A directory of somebody else is refused: models from it would be that person's.
fn writable(dir: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    fs::create_dir_all(dir)?;
    let (owner, own) = (fs::metadata(dir)?.uid(), rustix::process::getuid().as_raw());
    // A volume's directory may belong to root.
    if owner != own && owner != 0 {
        return Err(std::io::Error::other(format!(
            "belongs to user {owner}, this process is {own}"
        )));
    }
    let probe = dir.join(format!(".probe-{}", std::process::id()));
    File::create(&probe)?;
    fs::remove_file(&probe)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(uri: &str) -> Address {
        Address::parse(uri).expect(uri)
    }

    #[test]
    fn models_of_different_addresses_have_different_shelves() {
        let shelves = ["hf://a/b", "s3://a/b", "s3://a/c", "gs://a/b", "az://a/b"];
        let shelves = shelves.map(|uri| Shelf::of(Path::new("/c"), &address(uri)).dir);
        let distinct = shelves.iter().collect::<std::collections::BTreeSet<_>>();
        assert_eq!(distinct.len(), shelves.len());
        assert!(shelves.iter().all(|shelf| shelf.starts_with("/c")));
    }

    #[test]
    fn a_moving_name_is_remembered_while_its_version_is_there() {
        let dir = tempfile::tempdir().expect("a directory");
        let shelf = Shelf::of(dir.path(), &address("hf://a/b"));
        let place = shelf.place("abc");
        fs::create_dir_all(&place.whole).expect("creates");
        assert!(shelf.last("refs/pr/1").is_none());
        shelf.remember("refs/pr/1", "abc").expect("writes");
        assert_eq!(shelf.last("refs/pr/1").expect("known").whole, place.whole);
        fs::remove_dir(&place.whole).expect("removes");
        assert!(shelf.last("refs/pr/1").is_none());
    }

    #[tokio::test]
    async fn one_process_at_a_time_fetches_a_version() {
        let dir = tempfile::tempdir().expect("a directory");
        let place = Shelf::of(dir.path(), &address("hf://a/b")).place("abc");
        let held = place.lock().await.expect("free");
        let other = place.clone();
        let waiting = tokio::spawn(async move { other.lock().await.map(drop) });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(held);
        waiting.await.expect("ends").expect("free now");
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("file");
        fs::write(&file, "").expect("writes");
        let message = directory(Some(&file)).expect_err("a file").to_string();
        assert!(message.contains(&file.display().to_string()), "{message}");
        assert_eq!(directory(Some(dir.path())).expect("writable"), dir.path());
    }
}
