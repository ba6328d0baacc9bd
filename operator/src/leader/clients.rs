//! The clients of an operator that takes part in an election.

use kube::{
    Client, Config,
    client::{ClientBuilder, retry::RetryPolicy},
};
use tower::{buffer::BufferLayer, retry::RetryLayer};

use super::{candidate::Candidate, config::ElectionConfig, guard::WriteGuard};
use crate::error::{Error, Result};

/// Requests that may wait between the layers of a client; kube's own bound.
const WAITING: usize = 1024;

/// A client whose writes are fenced, and the candidate that opens the fence.
pub fn candidate(mut config: Config, election: ElectionConfig) -> Result<(Client, Candidate)> {
    election.check()?;
    let guard = WriteGuard::default();
    // kube's own retries lie below every layer that is added, and would send a write again after the deadline.
    config.default_retry = false;
    let lease = Client::try_from(config.clone()).map_err(Error::api("build the client of the lease"))?;
    let client = ClientBuilder::try_from(config)
        .map_err(Error::api("build the client of the controllers"))?
        .with_layer(&guard)
        .with_layer(&BufferLayer::new(WAITING))
        .with_layer(&RetryLayer::new(RetryPolicy::server_retry()))
        .build();
    Ok((client, Candidate::new(lease, election, guard)))
}

/// Names the process in the API server's audit log: `flotilla-operator/0.1.0 (identity)`.
pub fn with_user_agent(mut config: Config, identity: &str) -> Config {
    let text = format!("flotilla-operator/{} ({identity})", env!("CARGO_PKG_VERSION"));
    // An identity with characters that no header may have is left out rather than refused.
    if let Ok(value) = http::HeaderValue::from_str(&text) {
        config.headers.push((http::header::USER_AGENT, value));
    }
    config
}
