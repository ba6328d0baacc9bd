//! Files of an origin into a directory: some at once, resumed where an earlier attempt broke off, compared when they are whole.

use std::{
    collections::BTreeSet,
    fs,
    future::Future,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use tokio::io::{AsyncWriteExt, BufWriter};

use super::{
    error::{RemoteError, io},
    file::RemoteFile,
    origin::{Origin, Version},
    plan::{self, Guide, MAX_LIST_BYTES},
};
use crate::{manifest::MANIFEST, publish::STABLE};

/// Files that are read at once.
const FILES_AT_ONCE: usize = 4;
/// Files whose size is asked at once.
const ASKED_AT_ONCE: usize = 8;
/// Attempts in a row that may end without a new byte.
const MAX_FAILURES: u32 = 6;
/// Longest pause between attempts.
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// A source that sends nothing for so long has broken off.
const SILENCE: Duration = Duration::from_secs(60);
/// Bytes that are written to the file at once.
const WRITE_BLOCK: usize = 1 << 20;

/// Bytes of a download.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Bytes of all files.
    pub total: AtomicU64,
    /// Bytes that are on disk.
    pub done: AtomicU64,
    /// Bytes that were on disk before.
    pub before: AtomicU64,
}

/// The download of one version into one directory.
#[derive(Debug)]
pub(super) struct Download<'a> {
    /// Where the files come from.
    pub origin: &'a Origin,
    /// Which version.
    pub version: &'a Version,
    /// Where they go.
    pub dir: &'a Path,
    /// First pause after a failure.
    pub pause: Duration,
    /// How far it is.
    pub counters: &'a Counters,
}

impl Download<'_> {
    /// Fetches every file that the model needs.
    pub async fn run(&self) -> Result<(), RemoteError> {
        fs::create_dir_all(self.dir).map_err(io("create", self.dir))?;
        let files = self.files().await?;
        let size = files.iter().map(|file| file.size).sum::<u64>();
        let present = files.iter().map(|file| self.present(file)).sum::<u64>();
        self.check_space(size.saturating_sub(present))?;
        self.counters.total.store(size, Ordering::Relaxed);
        self.counters.done.store(present, Ordering::Relaxed);
        self.counters.before.store(present, Ordering::Relaxed);
        // Boxed one by one: a closure over references would keep the whole future from moving between threads.
        let fetches = files.iter().map(|file| self.fetch(file).boxed()).collect::<Vec<_>>();
        stream::iter(fetches)
            .buffer_unordered(FILES_AT_ONCE)
            .try_collect::<Vec<()>>()
            .await?;
        self.remove_others(&files)
    }

    /// The files that the model needs, with what is known of each.
    async fn files(&self) -> Result<Vec<RemoteFile>, RemoteError> {
        let (names, source) = (&self.version.names, self.origin.name());
        let guide = plan::guide(names);
        let mut needed = plan::needed(names, guide);
        match guide {
            Guide::None => {}
            Guide::Index => {
                let index = self.read_guide(plan::INDEX_FILE).await?;
                needed.extend(plan::shards(&source, &index, names)?);
            }
            Guide::Manifest => {
                if let Some(manifest) = plan::manifest(&source, &self.read_guide(MANIFEST).await?)? {
                    return self.listed(&manifest).await;
                }
                needed = plan::needed(names, Guide::None);
            }
        }
        self.describe(needed).await
    }

    /// The files of a manifest, which tells their digests, and what marks a directory of Flotilla's.
    async fn listed(&self, manifest: &crate::manifest::Manifest) -> Result<Vec<RemoteFile>, RemoteError> {
        let listed = manifest.files.iter().map(|file| file.path.clone());
        let own = [MANIFEST, STABLE].map(str::to_owned);
        let mut files = self.describe(listed.chain(own).collect()).await?;
        for file in &mut files {
            let record = manifest.files.iter().find(|record| record.path == file.name);
            let Some(record) = record else { continue };
            if record.bytes != file.size {
                return Err(RemoteError::Differs {
                    source_name: self.origin.name(),
                    file: file.name.clone(),
                    expected: format!("{} bytes", record.bytes),
                    found: format!("{} bytes", file.size),
                });
            }
            file.digest = Some(super::file::Digest::Sha256(record.sha256.clone()));
        }
        Ok(files)
    }

    async fn describe(&self, names: BTreeSet<String>) -> Result<Vec<RemoteFile>, RemoteError> {
        let described = stream::iter(names)
            .map(|name| async move { persist(self.pause, || self.origin.describe(self.version, &name)).await })
            .buffer_unordered(ASKED_AT_ONCE)
            .try_collect::<Vec<_>>()
            .await;
        let mut files = described?;
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(files)
    }

    /// Fetches the small file that says which others are needed.
    async fn read_guide(&self, name: &str) -> Result<Vec<u8>, RemoteError> {
        let [file] = self
            .describe(BTreeSet::from([name.to_owned()]))
            .await?
            .try_into()
            .map_err(|_| self.invalid(name))?;
        if file.size > MAX_LIST_BYTES {
            return Err(RemoteError::Invalid {
                source_name: self.origin.name(),
                reason: format!("{name} has {} bytes, the limit is {MAX_LIST_BYTES}", file.size),
            });
        }
        self.fetch(&file).await?;
        let path = self.dir.join(name);
        fs::read(&path).map_err(io("read", &path))
    }

    fn invalid(&self, name: &str) -> RemoteError {
        RemoteError::Invalid {
            source_name: self.origin.name(),
            reason: format!("it lacks {name}"),
        }
    }

    fn paths(&self, file: &RemoteFile) -> (PathBuf, PathBuf) {
        (self.dir.join(&file.name), self.dir.join(format!("{}.part", file.name)))
    }

    /// Bytes of a file that are here already.
    fn present(&self, file: &RemoteFile) -> u64 {
        let (whole, part) = self.paths(file);
        let length = |path: &Path| fs::metadata(path).map(|metadata| metadata.len());
        length(&whole).or_else(|_| length(&part)).unwrap_or(0).min(file.size)
    }

    fn check_space(&self, needed: u64) -> Result<(), RemoteError> {
        let disk = rustix::fs::statvfs(self.dir).map_err(|error| io("inspect", self.dir)(error.into()))?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        if needed <= free {
            return Ok(());
        }
        Err(RemoteError::Space {
            source_name: self.origin.name(),
            needed,
            free,
            path: self.dir.to_owned(),
        })
    }

    /// Fetches one file, going on after every interruption.
    async fn fetch(&self, file: &RemoteFile) -> Result<(), RemoteError> {
        let (whole, part) = self.paths(file);
        // Only files that were compared have their names.
        if fs::metadata(&whole).is_ok_and(|metadata| metadata.len() == file.size) {
            return Ok(());
        }
        if let Some(parent) = whole.parent() {
            fs::create_dir_all(parent).map_err(io("create", parent))?;
        }
        let mut resumed = length(&part) > 0;
        loop {
            self.fetch_bytes(file, &part).await?;
            match compare(self.origin.name(), file.clone(), part.clone()).await {
                Ok(()) => return fs::rename(&part, &whole).map_err(io("rename", &part)),
                Err(error) => {
                    self.counters.done.fetch_sub(length(&part), Ordering::Relaxed);
                    fs::remove_file(&part).map_err(io("remove", &part))?;
                    // What an earlier process left may have been damaged.
                    if !std::mem::take(&mut resumed) {
                        return Err(error);
                    }
                    tracing::warn!(%error, "fetching the file again from its beginning");
                }
            }
        }
    }

    /// Attempts until all bytes are there or too many attempts in a row brought none.
    async fn fetch_bytes(&self, file: &RemoteFile, part: &Path) -> Result<(), RemoteError> {
        let mut failures = 0;
        loop {
            let before = length(part);
            match self.attempt(file, part).await {
                Err(error @ RemoteError::Unreachable { .. }) => {
                    failures = if length(part) > before { 1 } else { failures + 1 };
                    if failures > MAX_FAILURES {
                        return Err(error);
                    }
                    tracing::warn!(file = file.name, failures, "{error}; trying again");
                    tokio::time::sleep(pause(self.pause, failures)).await;
                }
                outcome => return outcome,
            }
        }
    }

    async fn attempt(&self, file: &RemoteFile, part: &Path) -> Result<(), RemoteError> {
        let options = fs::OpenOptions::new().append(true).create(true).open(part);
        let out = options.map_err(io("open", part))?;
        let mut begin = length(part);
        if begin > file.size {
            out.set_len(0).map_err(io("truncate", part))?;
            self.counters.done.fetch_sub(file.size, Ordering::Relaxed);
            begin = 0;
        }
        if begin == file.size {
            return Ok(());
        }
        let mut reading = self.origin.read(self.version, file, begin).await?;
        if reading.begin != begin {
            out.set_len(0).map_err(io("truncate", part))?;
            self.counters.done.fetch_sub(begin, Ordering::Relaxed);
            begin = 0;
        }
        let mut out = BufWriter::with_capacity(WRITE_BLOCK, tokio::fs::File::from_std(out));
        let outcome = self.copy(file, begin, &mut reading.stream, &mut out, part).await;
        // What has come is kept, whatever ended it.
        out.flush().await.map_err(io("write", part))?;
        out.get_ref().sync_all().await.map_err(io("flush", part))?;
        outcome
    }

    async fn copy(
        &self,
        file: &RemoteFile,
        begin: u64,
        stream: &mut stream::BoxStream<'static, Result<bytes::Bytes, RemoteError>>,
        out: &mut BufWriter<tokio::fs::File>,
        part: &Path,
    ) -> Result<(), RemoteError> {
        let unreachable = |reason: String| RemoteError::Unreachable {
            source_name: self.origin.name(),
            reason,
        };
        let mut reached = begin;
        while let Some(chunk) = tokio::time::timeout(SILENCE, stream.next())
            .await
            .map_err(|_| unreachable(format!("nothing came for {} s", SILENCE.as_secs())))?
        {
            let chunk = chunk?;
            reached += chunk.len() as u64;
            if reached > file.size {
                return Err(RemoteError::Differs {
                    source_name: self.origin.name(),
                    file: file.name.clone(),
                    expected: format!("{} bytes", file.size),
                    found: "more".to_owned(),
                });
            }
            out.write_all(&chunk).await.map_err(io("write", part))?;
            self.counters.done.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        }
        if reached < file.size {
            let reason = format!("{} ended after {reached} of {} bytes", file.name, file.size);
            return Err(unreachable(reason));
        }
        Ok(())
    }

    /// Removes what an interrupted fetch by other rules left.
    fn remove_others(&self, files: &[RemoteFile]) -> Result<(), RemoteError> {
        let listed = crate::manifest::list_files(self.dir)
            .map_err(|error| io("list", self.dir)(std::io::Error::other(error)))?;
        for name in listed {
            if !files.iter().any(|file| file.name == name) {
                let path = self.dir.join(name);
                fs::remove_file(&path).map_err(io("remove", &path))?;
            }
        }
        Ok(())
    }
}

/// Repeats a question while its source cannot be reached, up to [`MAX_FAILURES`] times.
pub(super) async fn persist<T, F>(first_pause: Duration, mut ask: impl FnMut() -> F) -> Result<T, RemoteError>
where
    F: Future<Output = Result<T, RemoteError>>,
{
    let mut failures = 0;
    loop {
        match ask().await {
            Err(error @ RemoteError::Unreachable { .. }) if failures < MAX_FAILURES => {
                failures += 1;
                tracing::warn!(failures, "{error}; trying again");
                tokio::time::sleep(pause(first_pause, failures)).await;
            }
            outcome => return outcome,
        }
    }
}

/// The pause after so many failures in a row: each twice the one before.
fn pause(first: Duration, failures: u32) -> Duration {
    first
        .saturating_mul(1 << failures.saturating_sub(1).min(16))
        .min(MAX_PAUSE)
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// Compares the digest of a whole file with the one announced, on a thread that may block.
async fn compare(source_name: String, file: RemoteFile, path: PathBuf) -> Result<(), RemoteError> {
    let Some(expected) = file.digest else { return Ok(()) };
    let place = path.clone();
    let found = tokio::task::spawn_blocking(move || expected.of_file(&path).map(|found| (expected, found))).await;
    let (expected, found) = found.map_err(|error| io("read", &place)(std::io::Error::other(error)))??;
    if expected == found {
        return Ok(());
    }
    Err(RemoteError::Differs {
        source_name,
        file: file.name,
        expected: expected.to_string(),
        found: found.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_limit() {
        let first = Duration::from_millis(500);
        assert_eq!(
            [1, 2, 3].map(|failures| pause(first, failures).as_millis()),
            [500, 1000, 2000]
        );
        assert_eq!(pause(first, 40), MAX_PAUSE);
    }
}
