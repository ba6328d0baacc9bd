//! The controllers that the objects of a cluster need to live and die: what kube-controller-manager, kube-scheduler and
//! kube-proxy are to a real one.
//!
//! Each is a small level-triggered loop: it keeps what it watches, decides by a pure function, writes, and looks again
//! at every change and now and then without one.
//!
//! # Layout
//!
//! | file | what it does |
//! |---|---|
//! | `mirror.rs` | objects of one kind, kept up to date |
//! | `scheduler.rs` | gives pending pods a node |
//! | `fit.rs` | pure: whether a pod may run on a node |
//! | `garbage_collector.rs` | deletes what lost its owner |
//! | `ownership.rs` | pure: who must go, who may go, who waits |
//! | `namespace.rs` | empties namespaces that are being deleted; gives each its default service account |
//! | `disruption.rs` | counts what disruption budgets allow |
//! | `remainder.rs` | what keeps a namespace from ending, as its conditions tell it |
//! | `claim.rs` | makes directories for claims |
//! | `provisioner.rs` | claims of a real cluster as directories |
//! | `service.rs` | addresses and endpoints of services |
//! | `proxy.rs` | takes connections to services on to pods |

mod claim;
mod disruption;
mod fit;
mod garbage_collector;
mod mirror;
mod namespace;
mod ownership;
pub mod provisioner;
mod proxy;
mod remainder;
mod scheduler;
mod service;

use std::{path::PathBuf, sync::Arc, time::Duration};

use kube::Client;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{
    node::{address::AddressBlock, event::EventRecorder},
    tls,
};

/// How long a loop goes without looking, when nothing changes.
const RESYNC: Duration = Duration::from_secs(30);
/// Pause after a failure, and the least pause between two looks.
const RETRY: Duration = Duration::from_millis(500);

/// What the controllers need.
#[derive(Clone, Debug)]
pub struct ControllerConfig {
    /// Directory of the sandbox; claims lie below `volumes`.
    pub dir: PathBuf,
    /// Where addresses of services come from.
    pub addresses: Arc<AddressBlock>,
}

/// Runs all controllers until `shutdown`.
pub async fn run(client: Client, config: ControllerConfig, shutdown: CancellationToken) {
    let events = |component: &str| EventRecorder::new(client.clone(), component, None);
    let mut tasks = JoinSet::new();
    tasks.spawn(scheduler::run(client.clone(), events("default-scheduler")));
    tasks.spawn(garbage_collector::run(
        client.clone(),
        events("garbage-collector-controller"),
    ));
    let roots = tls::authority_of_directory(&config.dir).unwrap_or_else(|error| {
        tracing::warn!(%error, "namespaces get no certificates of the API server");
        String::new()
    });
    tasks.spawn(namespace::run(client.clone(), roots));
    tasks.spawn(disruption::run(client.clone()));
    tasks.spawn(claim::run(
        client.clone(),
        config.dir.clone(),
        events("persistentvolume-controller"),
    ));
    tasks.spawn(service::run(
        client.clone(),
        Arc::clone(&config.addresses),
        events("service-controller"),
    ));
    shutdown.cancelled().await;
    tasks.shutdown().await;
}
