//! What the API server's audit log says about the operator.

use std::{
    fs::File,
    io::{BufRead as _, BufReader},
    path::Path,
};

use anyhow::Context as _;
use serde_json::Value;

/// Requests in the audit log, told apart by their user agent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Audited {
    /// Of the operator, watches left out: they are noted when they end.
    pub requests: u64,
    /// Those of them that may change something.
    pub writes: u64,
}

/// Counts the operator's requests in `path`.
pub fn read(path: &Path) -> anyhow::Result<Audited> {
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut audited = Audited::default();
    for line in BufReader::new(file).lines() {
        let line = line?;
        // Most lines are others': parsing them all would take longer than the experiment.
        if !line.contains("\"flotilla-operator/") {
            continue;
        }
        // The API server may be writing the last line.
        let Ok(event) = serde_json::from_str::<Value>(&line) else {
            continue;
        };
        let agent = event["userAgent"].as_str().unwrap_or_default();
        let verb = event["verb"].as_str().unwrap_or_default();
        if agent.starts_with("flotilla-operator/") && event["stage"] == "ResponseComplete" && verb != "watch" {
            audited.requests += 1;
            audited.writes += u64::from(!matches!(verb, "get" | "list"));
        }
    }
    Ok(audited)
}
