//! What the operator is told when it starts.

use std::{net::SocketAddr, time::Duration};

/// Settings of one operator process.
#[derive(Clone, Debug)]
pub struct OperatorConfig {
    /// Image of worker pods whose spec names none.
    pub worker_image: String,
    /// Address of `/metrics`, `/healthz` and `/readyz`; port 0 takes a free one, None serves none.
    pub listen: Option<SocketAddr>,
    /// Passes of one controller that may run at the same time.
    pub concurrency: u16,
    /// Time between two reads of a running worker's `/progress`.
    pub progress_interval: Duration,
    /// Time after which an object is looked at again although nothing happened.
    pub resync_interval: Duration,
    /// Namespace to work in; None: all of them.
    pub namespace: Option<String>,
}

impl Default for OperatorConfig {
    fn default() -> Self {
        Self {
            worker_image: "flotilla-worker".into(),
            listen: None,
            concurrency: 32,
            progress_interval: Duration::from_secs(2),
            resync_interval: Duration::from_secs(300),
            namespace: None,
        }
    }
}
