//! Objects of one kind, kept up to date by a watch.

use std::{fmt::Debug, hash::Hash, sync::Arc, time::Duration};

use futures::StreamExt;
use kube::{
    Api,
    core::Resource,
    runtime::{
        WatchStreamExt,
        reflector::{self, Store},
        watcher,
    },
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::{Notify, mpsc},
    task::{AbortHandle, JoinSet},
};

/// What changed since the last look, as far as anybody asked.
#[derive(Clone, Debug, Default)]
pub struct Bell {
    rung: Arc<Notify>,
}

impl Bell {
    /// Something changed.
    pub fn ring(&self) {
        self.rung.notify_one();
    }

    /// Waits for a change, or for `at_most`.
    pub async fn wait(&self, at_most: Duration) {
        // The end of the time is as good a reason to look as a change.
        drop(tokio::time::timeout(at_most, self.rung.notified()).await);
    }
}

/// Keeps `api`'s objects and rings at every change. The watch ends with `tasks`.
pub fn mirror<K>(api: Api<K>, config: watcher::Config, bell: &Bell, tasks: &mut JoinSet<()>) -> Store<K>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    K::DynamicType: Default + Eq + Hash + Clone + Send + Sync,
{
    mirror_with(api, config, bell, tasks, None).0
}

/// As [`mirror`]; also hands deleted objects to `deleted`.
pub fn mirror_with<K>(
    api: Api<K>,
    config: watcher::Config,
    bell: &Bell,
    tasks: &mut JoinSet<()>,
    deleted: Option<mpsc::UnboundedSender<K>>,
) -> (Store<K>, AbortHandle)
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    K::DynamicType: Default + Eq + Hash + Clone + Send + Sync,
{
    let (store, writer) = reflector::store();
    let bell = bell.clone();
    let stream = watcher(api, config).default_backoff();
    let handle = tasks.spawn(async move {
        let mut stream = Box::pin(reflector::reflector(writer, stream));
        while let Some(event) = stream.next().await {
            match event {
                Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => {}
                Ok(watcher::Event::Delete(object)) => {
                    if let Some(deleted) = &deleted
                        && deleted.send(object).is_err()
                    {
                        return;
                    }
                    bell.ring();
                }
                Ok(watcher::Event::Apply(_) | watcher::Event::InitDone) => bell.ring(),
                Err(error) => tracing::warn!(kind = %K::kind(&K::DynamicType::default()), %error, "watching"),
            }
        }
    });
    (store, handle)
}
