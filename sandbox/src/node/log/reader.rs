//! What `kubectl logs` asks for: last lines, lines since a time, the run before, following.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Seek, SeekFrom},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use async_stream::try_stream;
use bytes::Bytes;
use futures::{FutureExt, Stream, future::BoxFuture};
use jiff::{SignedDuration, Timestamp};

use super::{Line, pod_dir, run_file};
use crate::server::log::{LogError, LogOptions, LogStream, LogTarget, PodLogs};

/// How often a followed file is looked at.
const POLL: Duration = Duration::from_millis(100);

/// Logs below a sandbox's directory.
#[derive(Clone, Debug)]
pub struct LogFiles {
    root: PathBuf,
}

impl LogFiles {
    /// Logs of the node whose directory is `root`.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }
}

impl PodLogs for LogFiles {
    fn open(&self, target: LogTarget, options: LogOptions) -> BoxFuture<'static, Result<LogStream, LogError>> {
        let root = self.root.clone();
        async move {
            let dir = pod_dir(&root, &target.namespace, &target.pod, &target.uid).join(&target.container);
            let path = file_of_run(&dir, &target, options.previous)?;
            let ended = dir.join(ENDED);
            let stream: LogStream = Box::pin(read(path, ended, Selection::new(&options, Timestamp::now())));
            Ok(stream)
        }
        .boxed()
    }
}

/// File in a container's log directory that names the newest run that has ended.
const ENDED: &str = "ended";

/// Notes that run `restart` writes no more, so that followers end.
pub fn mark_ended(container_dir: &Path, restart: u32) -> io::Result<()> {
    fs::write(container_dir.join(ENDED), restart.to_string())
}

fn file_of_run(dir: &Path, target: &LogTarget, previous: bool) -> Result<PathBuf, LogError> {
    let newest = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            entry
                .ok()?
                .file_name()
                .to_str()?
                .strip_suffix(".log")?
                .parse::<u32>()
                .ok()
        })
        .max();
    let (pod, container) = (&target.pod, &target.container);
    let run = match (newest, previous) {
        (Some(newest), false) => newest,
        (Some(newest), true) if newest > 0 => newest - 1,
        (_, true) => {
            let text = format!("previous terminated container \"{container}\" in pod \"{pod}\" not found");
            return Err(LogError::NotStarted(text));
        }
        (None, false) => {
            let text = format!("container \"{container}\" in pod \"{pod}\" is waiting to start: ContainerCreating");
            return Err(LogError::NotStarted(text));
        }
    };
    Ok(run_file(dir, run))
}

/// Which lines of a log are wanted.
#[derive(Clone, Debug, Default)]
struct Selection {
    follow: bool,
    timestamps: bool,
    tail: Option<u64>,
    since: Option<Timestamp>,
    limit: Option<u64>,
}

impl Selection {
    fn new(options: &LogOptions, now: Timestamp) -> Self {
        let since_seconds = options
            .since_seconds
            .and_then(|seconds| now.checked_sub(SignedDuration::from_secs(seconds)).ok());
        Self {
            follow: options.follow,
            timestamps: options.timestamps,
            tail: options.tail_lines,
            since: options.since_time.or(since_seconds),
            limit: options.limit_bytes,
        }
    }

    fn render(&self, line: &[u8]) -> Option<Vec<u8>> {
        let line = Line::parse(line)?;
        if self.since.is_some_and(|since| line.time < since) {
            return None;
        }
        let mut out = Vec::with_capacity(line.text.len() + 40);
        if self.timestamps {
            out.extend_from_slice(line.stamp);
            out.push(b' ');
        }
        out.extend_from_slice(line.text);
        if !line.partial {
            out.push(b'\n');
        }
        Some(out)
    }
}

/// Lines of one run: the rotated files, then the present one.
struct Follower {
    path: PathBuf,
    reader: BufReader<File>,
    inode: u64,
    partial: Vec<u8>,
}

impl Follower {
    fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let inode = file.metadata()?.ino();
        Ok(Self {
            path: path.to_owned(),
            reader: BufReader::new(file),
            inode,
            partial: Vec::new(),
        })
    }

    /// The next whole line without its line feed, or `None` when there is none yet.
    fn next_line(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            self.reader.read_until(b'\n', &mut self.partial)?;
            if self.partial.last() == Some(&b'\n') {
                self.partial.pop();
                return Ok(Some(std::mem::take(&mut self.partial)));
            }
            // At the end: a new file may have taken this one's place.
            let Ok(metadata) = fs::metadata(&self.path) else {
                return Ok(None);
            };
            if metadata.ino() == self.inode {
                return Ok(None);
            }
            *self = Self::open(&self.path)?;
        }
    }
}

fn read(path: PathBuf, ended: PathBuf, selection: Selection) -> impl Stream<Item = io::Result<Bytes>> + Send {
    try_stream! {
        let mut left = selection.limit.unwrap_or(u64::MAX);
        let (history, mut follower) = history(&path, selection.tail)?;
        for line in history {
            if let Some(bytes) = selection.render(&line).and_then(|bytes| within(bytes, &mut left)) {
                yield bytes;
            }
        }
        loop {
            // The end must be looked up before the file is: lines written before the mark are then still read.
            let over = !selection.follow || has_ended(&path, &ended);
            let mut batch = Vec::new();
            while let Some(line) = follower.next_line()? {
                batch.extend(selection.render(&line).unwrap_or_default());
                if batch.len() > 32 * 1024
                    && let Some(bytes) = within(std::mem::take(&mut batch), &mut left)
                {
                    yield bytes;
                }
            }
            if let Some(bytes) = within(batch, &mut left) {
                yield bytes;
            }
            if over || left == 0 {
                break;
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

fn within(mut bytes: Vec<u8>, left: &mut u64) -> Option<Bytes> {
    bytes.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
    *left -= bytes.len() as u64;
    (!bytes.is_empty()).then(|| Bytes::from(bytes))
}

fn has_ended(path: &Path, ended: &Path) -> bool {
    let run = path
        .file_stem()
        .and_then(|stem| stem.to_str())
        .and_then(|stem| stem.parse::<u32>().ok());
    let last = fs::read_to_string(ended)
        .ok()
        .and_then(|text| text.trim().parse::<u32>().ok());
    matches!((run, last), (Some(run), Some(last)) if run <= last) || !path.exists()
}

/// Lines that are already there (the last `tail` of them), and a follower that stands behind them.
fn history(path: &Path, tail: Option<u64>) -> io::Result<(Vec<Vec<u8>>, Follower)> {
    let mut follower = Follower::open(path)?;
    let Some(tail) = tail else {
        let mut lines = Vec::new();
        for rotated in rotated_files(path) {
            let text = fs::read(rotated)?;
            lines.extend(
                text.split(|byte| *byte == b'\n')
                    .filter(|line| !line.is_empty())
                    .map(<[u8]>::to_vec),
            );
        }
        return Ok((lines, follower));
    };
    let wanted = usize::try_from(tail).unwrap_or(usize::MAX);
    let mut lines = std::collections::VecDeque::new();
    let mut keep = |line: Vec<u8>| {
        lines.push_back(line);
        if lines.len() > wanted {
            lines.pop_front();
        }
    };
    for rotated in rotated_files(path) {
        let text = fs::read(rotated)?;
        text.split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .for_each(|line| keep(line.to_vec()));
    }
    let end = fs::metadata(path)?.len();
    while follower.reader.stream_position()? < end {
        match follower.next_line()? {
            Some(line) => keep(line),
            None => break,
        }
    }
    Ok((lines.into(), follower))
}

/// `RESTART.log.N`, oldest first.
fn rotated_files(path: &Path) -> Vec<PathBuf> {
    let numbered = |n: usize| PathBuf::from(format!("{}.{n}", path.display()));
    let mut files: Vec<PathBuf> = (1..).map(numbered).take_while(|file| file.exists()).collect();
    files.reverse();
    files
}

/// The last lines of a run, at most 80 of them and 2048 bytes: what `FallbackToLogsOnError` puts into a status.
pub fn tail_for_status(container_dir: &Path, restart: u32) -> String {
    const BYTES: usize = 2048;
    const LINES: u64 = 80;
    let Ok(mut file) = File::open(run_file(container_dir, restart)) else {
        return String::new();
    };
    // Each stored line has some 42 bytes of prefix.
    let length = file.metadata().map(|metadata| metadata.len()).unwrap_or(0);
    let from = length.saturating_sub(BYTES as u64 + LINES * 64);
    if file.seek(SeekFrom::Start(from)).is_err() {
        return String::new();
    }
    let selection = Selection::default();
    let lines: Vec<Vec<u8>> = BufReader::new(file)
        .split(b'\n')
        .filter_map(|line| selection.render(&line.ok()?))
        .collect();
    let skip = lines.len().saturating_sub(usize::try_from(LINES).unwrap_or(usize::MAX));
    let text = lines[skip..].concat();
    String::from_utf8_lossy(&text[text.len().saturating_sub(BYTES)..]).into_owned()
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    fn target() -> LogTarget {
        LogTarget {
            namespace: "n".into(),
            pod: "p".into(),
            uid: "u".into(),
            container: "c".into(),
        }
    }

    struct Fixture {
        root: tempfile::TempDir,
        dir: PathBuf,
    }

    fn fixture(lines: &[(i64, &str)]) -> Fixture {
        let root = tempfile::tempdir().unwrap();
        let dir = pod_dir(root.path(), "n", "p", "u").join("c");
        fs::create_dir_all(&dir).unwrap();
        let fixture = Fixture { root, dir };
        fixture.append(0, lines);
        fixture
    }

    impl Fixture {
        fn append(&self, restart: u32, lines: &[(i64, &str)]) {
            let mut file = File::options()
                .create(true)
                .append(true)
                .open(run_file(&self.dir, restart))
                .unwrap();
            for (second, text) in lines {
                let time = Timestamp::from_second(*second).unwrap();
                io::Write::write_all(&mut file, &Line::format(time, "stdout", false, text.as_bytes())).unwrap();
            }
        }

        async fn open(&self, options: LogOptions) -> Result<LogStream, LogError> {
            LogFiles::new(self.root.path().to_owned()).open(target(), options).await
        }

        async fn text(&self, options: LogOptions) -> String {
            let pieces: Vec<Bytes> = self.open(options).await.unwrap().map(Result::unwrap).collect().await;
            String::from_utf8(pieces.concat()).unwrap()
        }
    }

    #[tokio::test]
    async fn all_lines_the_last_ones_those_since_a_time_and_the_first_bytes() {
        let fixture = fixture(&[(1, "a"), (2, "b"), (3, "c")]);
        assert_eq!(fixture.text(LogOptions::default()).await, "a\nb\nc\n");
        assert_eq!(
            fixture
                .text(LogOptions {
                    tail_lines: Some(2),
                    ..LogOptions::default()
                })
                .await,
            "b\nc\n"
        );
        assert_eq!(
            fixture
                .text(LogOptions {
                    tail_lines: Some(0),
                    ..LogOptions::default()
                })
                .await,
            ""
        );
        let since = LogOptions {
            since_time: Timestamp::from_second(3).ok(),
            ..LogOptions::default()
        };
        assert_eq!(fixture.text(since).await, "c\n");
        assert_eq!(
            fixture
                .text(LogOptions {
                    limit_bytes: Some(3),
                    ..LogOptions::default()
                })
                .await,
            "a\nb"
        );
        let stamped = LogOptions {
            timestamps: true,
            tail_lines: Some(1),
            ..LogOptions::default()
        };
        assert_eq!(fixture.text(stamped).await, "1970-01-01T00:00:03.000000000Z c\n");
    }

    #[tokio::test]
    async fn the_run_before_is_read_by_previous() {
        let fixture = fixture(&[(1, "first")]);
        let previous = LogOptions {
            previous: true,
            ..LogOptions::default()
        };
        let Err(error) = fixture.open(previous.clone()).await else {
            panic!("there was no run before")
        };
        assert_eq!(
            error.to_string(),
            "previous terminated container \"c\" in pod \"p\" not found"
        );
        fixture.append(1, &[(2, "second")]);
        assert_eq!(fixture.text(previous).await, "first\n");
        assert_eq!(fixture.text(LogOptions::default()).await, "second\n");
    }

    #[tokio::test]
    async fn following_passes_a_rotation_and_ends_with_the_run() {
        let fixture = fixture(&[(1, "a")]);
        let mut stream = fixture
            .open(LogOptions {
                follow: true,
                ..LogOptions::default()
            })
            .await
            .unwrap();
        assert_eq!(stream.next().await.unwrap().unwrap(), "a\n");
        fixture.append(0, &[(2, "b")]);
        fs::rename(run_file(&fixture.dir, 0), fixture.dir.join("0.log.1")).unwrap();
        fixture.append(0, &[(3, "c")]);
        assert_eq!(stream.next().await.unwrap().unwrap(), "b\nc\n");
        mark_ended(&fixture.dir, 0).unwrap();
        assert!(stream.next().await.is_none());
    }

    #[tokio::test]
    async fn the_text_for_a_status_is_the_end_of_the_log() {
        let long = "x".repeat(1500);
        let fixture = fixture(&[(1, &long), (2, &long), (3, "last")]);
        let text = tail_for_status(&fixture.dir, 0);
        assert_eq!(text.len(), 2048);
        assert!(text.ends_with("xx\nlast\n"));
    }
}
