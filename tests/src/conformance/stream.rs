//! A watch as it comes over the wire: one JSON event a line.

use std::time::Duration;

use anyhow::{Context, ensure};
use futures::{StreamExt, stream::BoxStream};
use http_body_util::BodyExt;
use kube::client::Body;
use serde_json::Value;

/// How long the next event may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// One event.
#[derive(Clone, Debug)]
pub struct Event {
    /// `ADDED`, `MODIFIED`, `DELETED`, `BOOKMARK` or `ERROR`.
    pub kind: String,
    /// The object.
    pub object: Value,
}

impl Event {
    /// Type of the event and name of the object.
    #[must_use]
    pub fn summary(&self) -> (&str, &str) {
        (&self.kind, self.object["metadata"]["name"].as_str().unwrap_or_default())
    }
}

/// An open watch.
pub struct Watch {
    chunks: BoxStream<'static, anyhow::Result<Vec<u8>>>,
    read: Vec<u8>,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

impl Watch {
    /// Reads the answer to a watch.
    pub(super) async fn open(answer: http::Response<Body>) -> anyhow::Result<Self> {
        let status = answer.status();
        if !status.is_success() {
            let text = answer.into_body().collect().await?.to_bytes();
            anyhow::bail!("the watch was refused: {status} {}", String::from_utf8_lossy(&text));
        }
        let chunks = answer.into_body().into_data_stream();
        Ok(Self {
            chunks: chunks.map(|chunk| Ok(chunk?.to_vec())).boxed(),
            read: Vec::new(),
        })
    }

    /// The next event; `None` when the server ended the watch.
    pub async fn next_or_end(&mut self) -> anyhow::Result<Option<Event>> {
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                let mut event: Value = serde_json::from_slice(&line)?;
                let kind = event["type"].as_str().context("an event without type")?.to_owned();
                let object = event["object"].take();
                return Ok(Some(Event { kind, object }));
            }
            let chunk = tokio::time::timeout(PATIENCE, self.chunks.next()).await;
            match chunk.context("no event came")? {
                Some(chunk) => self.read.extend(chunk?),
                None => return Ok(None),
            }
        }
    }

    /// The next event.
    pub async fn next(&mut self) -> anyhow::Result<Event> {
        self.next_or_end().await?.context("the watch ended")
    }

    /// The next event is of this type and about this object.
    pub async fn expect(&mut self, kind: &str, name: &str) -> anyhow::Result<Value> {
        let event = self.next().await?;
        ensure!(
            event.summary() == (kind, name),
            "expected {kind} {name}, got {} {}",
            event.kind,
            event.object
        );
        Ok(event.object)
    }
}
