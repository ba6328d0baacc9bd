//! From the pipes of a process to files of bounded size.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::Timestamp;
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    sync::mpsc,
};

use super::{Line, run_file};

/// Longest piece of a line; the rest follows in further pieces.
const PIECE: usize = 16 * 1024;
/// How long output is still read after the process ended (another process may hold the pipe open).
const DRAIN: Duration = Duration::from_secs(2);

/// How large logs become. The defaults are the kubelet's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLimits {
    /// Bytes of one file.
    pub file_bytes: u64,
    /// Files of one run.
    pub files: usize,
}

impl Default for LogLimits {
    fn default() -> Self {
        Self {
            file_bytes: 10 << 20,
            files: 5,
        }
    }
}

/// The open log of one run.
#[derive(Debug)]
pub struct LogSink {
    path: PathBuf,
    file: File,
    written: u64,
    limits: LogLimits,
}

impl LogSink {
    /// Opens the log of run `restart`, keeping the run before it and removing older ones.
    pub fn open(container_dir: &Path, restart: u32, limits: LogLimits) -> io::Result<Self> {
        fs::create_dir_all(container_dir)?;
        remove_older_runs(container_dir, restart.saturating_sub(1))?;
        let path = run_file(container_dir, restart);
        let file = File::options().create(true).append(true).open(&path)?;
        let written = file.metadata()?.len();
        Ok(Self {
            path,
            file,
            written,
            limits,
        })
    }

    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        let length = line.len() as u64;
        if self.written > 0 && self.written + length > self.limits.file_bytes {
            self.rotate()?;
        }
        self.file.write_all(line)?;
        self.written += length;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let numbered = |n: usize| PathBuf::from(format!("{}.{n}", self.path.display()));
        for n in (1..self.limits.files.saturating_sub(1)).rev() {
            if numbered(n).exists() {
                fs::rename(numbered(n), numbered(n + 1))?;
            }
        }
        if self.limits.files > 1 {
            fs::rename(&self.path, numbered(1))?;
        } else {
            fs::remove_file(&self.path)?;
        }
        self.file = File::options().create(true).append(true).open(&self.path)?;
        self.written = 0;
        Ok(())
    }
}

fn remove_older_runs(dir: &Path, oldest_kept: u32) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let run = name
            .to_str()
            .and_then(|name| name.split_once(".log"))
            .and_then(|(run, _)| run.parse::<u32>().ok());
        if run.is_some_and(|run| run < oldest_kept) {
            fs::remove_file(dir.join(&name))?;
        }
    }
    Ok(())
}

/// Writes both streams to `sink` until both end, or until [`DRAIN`] after `ended` resolves.
pub async fn collect(
    mut sink: LogSink,
    stdout: impl AsyncRead + Unpin + Send + 'static,
    stderr: impl AsyncRead + Unpin + Send + 'static,
    ended: impl Future<Output = ()>,
) {
    let (sender, mut lines) = mpsc::channel::<Vec<u8>>(1024);
    let readers = [
        tokio::spawn(pieces(stdout, "stdout", sender.clone())),
        tokio::spawn(pieces(stderr, "stderr", sender)),
    ];
    let write_all = async {
        while let Some(line) = lines.recv().await {
            if let Err(error) = sink.append(&line) {
                tracing::warn!(path = %sink.path.display(), %error, "a line of a container's log was lost");
            }
        }
    };
    tokio::select! {
        () = write_all => {}
        () = async { ended.await; tokio::time::sleep(DRAIN).await } => {}
    }
    for reader in readers {
        reader.abort();
    }
}

async fn pieces(mut stream: impl AsyncRead + Unpin, name: &'static str, sender: mpsc::Sender<Vec<u8>>) {
    let mut pending: Vec<u8> = Vec::new();
    let mut buffer = vec![0; PIECE];
    loop {
        let count = match stream.read(&mut buffer).await {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) => {
                tracing::debug!(stream = name, %error, "reading a container's output");
                break;
            }
        };
        pending.extend_from_slice(&buffer[..count]);
        for line in take_pieces(&mut pending, name, Timestamp::now()) {
            if sender.send(line).await.is_err() {
                return;
            }
        }
    }
    if !pending.is_empty() {
        // The receiver is gone only when nobody waits for the rest any more.
        drop(sender.send(Line::format(Timestamp::now(), name, false, &pending)).await);
    }
}

/// Takes whole lines, and pieces of lines that are too long, off the front of `pending`.
fn take_pieces(pending: &mut Vec<u8>, stream: &str, now: Timestamp) -> Vec<Vec<u8>> {
    let mut lines = Vec::new();
    let mut from = 0;
    loop {
        let rest = &pending[from..];
        let end = rest.iter().take(PIECE + 1).position(|byte| *byte == b'\n');
        match end {
            Some(end) => {
                lines.push(Line::format(now, stream, false, &rest[..end]));
                from += end + 1;
            }
            None if rest.len() > PIECE => {
                lines.push(Line::format(now, stream, true, &rest[..PIECE]));
                from += PIECE;
            }
            None => break,
        }
    }
    pending.drain(..from);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn written(text: &[u8], limits: LogLimits) -> (tempfile::TempDir, String) {
        let dir = tempfile::tempdir().unwrap();
        let sink = LogSink::open(dir.path(), 0, limits).unwrap();
        collect(
            sink,
            io::Cursor::new(text.to_vec()),
            tokio::io::empty(),
            std::future::pending(),
        )
        .await;
        let log = fs::read_to_string(run_file(dir.path(), 0)).unwrap();
        (dir, log)
    }

    #[tokio::test]
    async fn lines_are_stamped_and_a_last_one_without_line_feed_counts() {
        let (_dir, log) = written(b"a\nb", LogLimits::default()).await;
        let texts: Vec<&[u8]> = log
            .lines()
            .map(|line| Line::parse(line.as_bytes()).unwrap().text)
            .collect();
        assert_eq!(texts, [b"a", b"b"]);
    }

    #[tokio::test]
    async fn a_long_line_is_cut_into_parts() {
        let long = vec![b'x'; PIECE * 2 + 5];
        let (_dir, log) = written(&long, LogLimits::default()).await;
        let parts: Vec<(bool, usize)> = log
            .lines()
            .map(|line| Line::parse(line.as_bytes()).unwrap())
            .map(|l| (l.partial, l.text.len()))
            .collect();
        assert_eq!(parts, [(true, PIECE), (true, PIECE), (false, 5)]);
    }

    #[tokio::test]
    async fn a_full_file_is_rotated_and_old_ones_are_dropped() {
        let text: String = (0..20).map(|n| format!("line {n:02}\n")).collect();
        let (dir, log) = written(
            text.as_bytes(),
            LogLimits {
                file_bytes: 200,
                files: 2,
            },
        )
        .await;
        assert!(log.contains("line 19"));
        assert!(
            fs::read_to_string(dir.path().join("0.log.1"))
                .unwrap()
                .contains("line 1")
        );
        assert!(!dir.path().join("0.log.2").exists());
    }

    #[test]
    fn the_run_before_the_present_one_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        for restart in 0..3 {
            LogSink::open(dir.path(), restart, LogLimits::default()).unwrap();
        }
        let exists = |restart| run_file(dir.path(), restart).exists();
        assert_eq!([exists(0), exists(1), exists(2)], [false, true, true]);
    }
}
