//! Container logs: what the API server asks of whoever runs the pods.

use std::{io, pin::Pin};

use bytes::Bytes;
use futures::{Stream, future::BoxFuture};

/// Container whose log is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogTarget {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// `metadata.uid` of the pod.
    pub uid: String,
    /// Name of the container (init containers too).
    pub container: String,
}

/// Query of `GET …/pods/NAME/log` (core/v1 `PodLogOptions`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogOptions {
    /// Go on until the container ends.
    pub follow: bool,
    /// The log of the run before the present one.
    pub previous: bool,
    /// Begin each line with an RFC 3339 time.
    pub timestamps: bool,
    /// Only the last lines.
    pub tail_lines: Option<u64>,
    /// Only lines of the last seconds.
    pub since_seconds: Option<i64>,
    /// Only lines from this time on.
    pub since_time: Option<jiff::Timestamp>,
    /// At most this many bytes.
    pub limit_bytes: Option<u64>,
}

impl LogOptions {
    /// Reads them from pairs of a query; those of other names are passed over. An error says which value is bad.
    pub fn from_pairs(pairs: impl IntoIterator<Item = (String, String)>) -> Result<Self, String> {
        let mut options = Self::default();
        for (key, value) in pairs {
            let bad = || format!("invalid value {value:?} of query parameter {key}");
            let flag = matches!(value.as_str(), "" | "1" | "true");
            match key.as_str() {
                "follow" => options.follow = flag,
                "previous" => options.previous = flag,
                "timestamps" => options.timestamps = flag,
                "tailLines" => options.tail_lines = Some(value.parse().map_err(|_| bad())?),
                "sinceSeconds" => options.since_seconds = Some(value.parse().map_err(|_| bad())?),
                "sinceTime" => options.since_time = Some(value.parse().map_err(|_| bad())?),
                "limitBytes" => options.limit_bytes = Some(value.parse().map_err(|_| bad())?),
                _ => {}
            }
        }
        Ok(options)
    }
}

/// Why a log cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The container has not begun yet, or there was no run before the present one. Answered with 400.
    #[error("{0}")]
    NotStarted(String),
    /// The node has no such container. Answered with 404.
    #[error("{0}")]
    NotFound(String),
    /// The file could not be read. Answered with 500.
    #[error("reading the log of container {container} of pod {pod}: {source}")]
    Read {
        /// The container.
        container: String,
        /// The pod.
        pod: String,
        /// What the file system said.
        source: io::Error,
    },
}

/// The bytes of a log, in pieces of at most some KiB.
pub type LogStream = Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>;

/// Source of container logs; the node implements it.
pub trait PodLogs: Send + Sync {
    /// Opens the log of one container. Dropping the stream ends it.
    fn open(&self, target: LogTarget, options: LogOptions) -> BoxFuture<'static, Result<LogStream, LogError>>;
}
