//! Container logs on disk, in the format of the container runtime interface: `TIME STREAM TAG TEXT`, the tag `F` for a
//! full line and `P` for a part of a longer one.
//!
//! # Layout
//!
//! | file | what it holds |
//! |---|---|
//! | `mod.rs` | where logs lie, the format of a line |
//! | `writer.rs` | from the pipes of a process to files of bounded size |
//! | `reader.rs` | what `kubectl logs` asks for |
//!
//! A run writes `logs/NAMESPACE/POD_UID/CONTAINER/RESTART.log`; a full file becomes `RESTART.log.1` and so on.

mod reader;
mod writer;

use std::path::{Path, PathBuf};

use jiff::Timestamp;

pub use reader::{LogFiles, mark_ended, tail_for_status};
pub use writer::{LogLimits, LogSink, collect};

/// Directory of a pod's logs below the sandbox's directory.
pub fn pod_dir(root: &Path, namespace: &str, pod: &str, uid: &str) -> PathBuf {
    root.join("logs").join(namespace).join(format!("{pod}_{uid}"))
}

/// File of one run of a container.
pub fn run_file(container_dir: &Path, restart: u32) -> PathBuf {
    container_dir.join(format!("{restart}.log"))
}

/// One parsed line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line<'a> {
    /// When it was read.
    pub time: Timestamp,
    /// The time as it stands in the file.
    pub stamp: &'a [u8],
    /// The line goes on in the next one.
    pub partial: bool,
    /// The text, without line feed.
    pub text: &'a [u8],
}

impl<'a> Line<'a> {
    /// Parses a line without its line feed.
    pub fn parse(line: &'a [u8]) -> Option<Self> {
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let stamp = parts.next()?;
        let time = std::str::from_utf8(stamp).ok()?.parse().ok()?;
        parts.next()?;
        let partial = parts.next()? == b"P";
        Some(Self {
            time,
            stamp,
            partial,
            text: parts.next().unwrap_or_default(),
        })
    }

    /// The line as it is written.
    pub fn format(time: Timestamp, stream: &str, partial: bool, text: &[u8]) -> Vec<u8> {
        let mut line = format!("{time:.9} {stream} {} ", if partial { 'P' } else { 'F' }).into_bytes();
        line.extend_from_slice(text);
        line.push(b'\n');
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_formatted_line_parses_to_itself() {
        let time: Timestamp = "2026-01-02T03:04:05.6Z".parse().unwrap();
        let bytes = Line::format(time, "stdout", false, b"two words");
        assert_eq!(bytes, b"2026-01-02T03:04:05.600000000Z stdout F two words\n");
        let line = Line::parse(&bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(
            (line.time, line.partial, line.text),
            (time, false, b"two words".as_slice())
        );
        assert_eq!(Line::parse(b"no time"), None);
    }
}
