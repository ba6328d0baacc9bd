//! What all controllers share.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use flotilla_api::names;
use k8s_openapi::jiff::Timestamp;
use kube::{
    Client,
    runtime::{
        controller::Action,
        events::{Recorder, Reporter},
    },
};
use tokio::sync::Semaphore;

use crate::{
    cache::Stores,
    config::OperatorConfig,
    error::{Error, Result},
    latest::Latest,
    metrics::Metrics,
    tokens::Tokens,
    worker_client::WorkerClient,
};

/// Writes of children that are on their way at once, over all controllers.
const WRITES_IN_FLIGHT: usize = 64;

/// What all controllers share.
pub struct Context {
    /// The API server.
    pub client: Client,
    /// Settings of this process.
    pub config: OperatorConfig,
    /// Copies of what is watched.
    pub stores: Stores,
    /// Counters.
    pub metrics: Metrics,
    /// Publishes Events.
    pub recorder: Recorder,
    /// Asks and tells workers.
    pub workers: WorkerClient,
    /// Tokens of workers.
    pub tokens: Tokens,
    /// Answers to the last status writes.
    pub latest: Latest,
    /// Places for writes of children: a gang of a thousand pods must not crowd out the rest of the cluster.
    pub writes: Semaphore,
    failures: Mutex<HashMap<String, u32>>,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Context {
    /// A context over `stores`.
    pub fn new(client: Client, config: OperatorConfig, stores: Stores, metrics: Metrics) -> Result<Self> {
        let reporter = Reporter {
            controller: names::FIELD_MANAGER.to_owned(),
            instance: None,
        };
        Ok(Self {
            recorder: Recorder::new(client.clone(), reporter),
            client,
            config,
            stores,
            metrics,
            workers: WorkerClient::new()?,
            tokens: Tokens::default(),
            latest: Latest::default(),
            writes: Semaphore::new(WRITES_IN_FLIGHT),
            failures: Mutex::default(),
        })
    }

    /// The clock, read once per pass.
    pub fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    /// When to look again at an object about which nothing is to be done.
    pub fn resync(&self) -> Action {
        Action::requeue(self.config.resync_interval)
    }

    /// Forgets the failures of an object whose pass succeeded.
    pub fn succeeded(&self, key: &str) {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }

    /// Counts a failed pass and says when to try again.
    pub fn failed(&self, key: &str, error: &Error) -> Action {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let count = failures.entry(key.to_owned()).or_insert(0);
        *count = count.saturating_add(1);
        Action::requeue(error.retry_after(*count))
    }
}
