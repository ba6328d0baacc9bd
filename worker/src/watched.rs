//! Files that are read again while the process runs: keys and certificates, which are replaced in place or, as Secrets of
//! Kubernetes are, by a link to another directory.

use std::{path::PathBuf, time::Duration};

use sha2::{Digest as _, Sha256};
use tokio::io::AsyncReadExt as _;
use tokio_util::sync::CancellationToken;

/// How often files are looked at.
pub const INTERVAL: Duration = Duration::from_secs(2);

/// Bytes of each file that are read.
const MAX_BYTES: u64 = 1 << 20;

/// Files that belong together.
#[derive(Debug)]
pub struct WatchedFiles {
    what: &'static str,
    paths: Vec<PathBuf>,
    seen: Option<[u8; 32]>,
}

impl WatchedFiles {
    /// These files; `what` they hold is for logs.
    pub fn new(what: &'static str, paths: Vec<PathBuf>) -> Self {
        Self {
            what,
            paths,
            seen: None,
        }
    }

    /// What the files hold, if that is not what they held the last time.
    pub async fn changed(&mut self) -> std::io::Result<Option<Vec<Vec<u8>>>> {
        let (mut contents, mut digest) = (Vec::new(), Sha256::new());
        for path in &self.paths {
            let mut bytes = Vec::new();
            let file = tokio::fs::File::open(path).await?;
            file.take(MAX_BYTES + 1).read_to_end(&mut bytes).await?;
            if bytes.len() as u64 > MAX_BYTES {
                return Err(std::io::Error::other(format!("more than {MAX_BYTES} bytes")));
            }
            digest.update((bytes.len() as u64).to_le_bytes());
            digest.update(&bytes);
            contents.push(bytes);
        }
        let digest = digest.finalize().into();
        Ok((self.seen.replace(digest) != Some(digest)).then_some(contents))
    }

    /// Gives new contents to `take` until `stop`. What it refuses, and what cannot be read, is told once; what was there
    /// before stays.
    pub async fn follow(
        mut self,
        interval: Duration,
        stop: CancellationToken,
        take: impl Fn(&[Vec<u8>]) -> Result<(), String>,
    ) {
        let what = self.what;
        let mut complaint = String::new();
        loop {
            let outcome = match self.changed().await {
                Ok(Some(contents)) => take(&contents),
                // A complaint about the contents holds until they change.
                Ok(None) => Err(complaint.clone()),
                Err(error) => Err(error.to_string()),
            };
            match outcome {
                Ok(()) => complaint.clear(),
                Err(new) if new != complaint => {
                    tracing::warn!("{what} changed but cannot be taken over, the old ones stay: {new}");
                    complaint = new;
                }
                Err(_) => {}
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(interval) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[tokio::test]
    async fn a_change_is_seen_once_even_if_it_is_another_directory_behind_a_link() {
        // As the kubelet does: data -> generation, key -> data/key; a new generation is linked in by a rename.
        let root = tempfile::tempdir().expect("a directory");
        let at = |name: &str| root.path().join(name);
        for (generation, text) in [("1", "old"), ("2", "new")] {
            std::fs::create_dir(at(generation)).expect("creates");
            std::fs::write(at(generation).join("key"), text).expect("writes");
        }
        symlink("1", at("data")).expect("a link");
        symlink("data/key", at("key")).expect("a link");
        let mut files = WatchedFiles::new("keys", vec![at("key")]);
        assert_eq!(files.changed().await.expect("reads"), Some(vec![b"old".to_vec()]));
        assert_eq!(files.changed().await.expect("reads"), None);
        symlink("2", at("next")).expect("a link");
        std::fs::rename(at("next"), at("data")).expect("renames");
        assert_eq!(files.changed().await.expect("reads"), Some(vec![b"new".to_vec()]));
        assert_eq!(files.changed().await.expect("reads"), None);
    }

    #[tokio::test]
    async fn a_file_that_is_gone_for_a_moment_is_read_when_it_is_back() {
        let root = tempfile::tempdir().expect("a directory");
        let path = root.path().join("key");
        let mut files = WatchedFiles::new("keys", vec![path.clone()]);
        assert!(files.changed().await.is_err());
        std::fs::write(&path, "x").expect("writes");
        assert!(files.changed().await.expect("reads").is_some());
    }
}
