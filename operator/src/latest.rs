//! The newest copy of an object: the watch's, or what the operator's own last write answered where the watch lags behind.
//!
//! Counters live in the status, so a pass over an old copy would count twice. The write that ends a pass carries the version
//! that the pass began with, so a copy that somebody else made old ends in a conflict and another pass.

use std::{
    any::Any,
    collections::HashMap,
    fmt::Debug,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use kube::{Resource, ResourceExt as _};

/// Answers are looked through for forgotten ones from this many on.
const MANY: usize = 1024;
/// An answer whose object the watch has not shown after so long belongs to a deleted object.
const MEMORY: Duration = Duration::from_secs(60);

/// Answers to writes, by UID, until the watch has caught up.
#[derive(Default)]
pub struct Latest(Mutex<HashMap<String, Answer>>);

/// An object of some kind, and when it was written.
type Answer = (Arc<dyn Any + Send + Sync>, Instant);

impl Debug for Latest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Latest").finish_non_exhaustive()
    }
}

impl Latest {
    /// Remembers what a write answered.
    pub fn remember<K: Resource<DynamicType = ()> + Send + Sync + 'static>(&self, written: K) {
        let Some(uid) = written.uid() else { return };
        let mut answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if answers.len() >= MANY {
            answers.retain(|_, (_, at)| at.elapsed() < MEMORY);
        }
        answers.insert(uid, (Arc::new(written), Instant::now()));
    }

    /// The newer one of `watched` and what was written last.
    pub fn of<K: Resource<DynamicType = ()> + Send + Sync + 'static>(&self, watched: &Arc<K>) -> Arc<K> {
        let Some(uid) = watched.uid() else {
            return Arc::clone(watched);
        };
        let mut answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let written = answers
            .get(&uid)
            .and_then(|(answer, _)| Arc::clone(answer).downcast::<K>().ok());
        match written {
            Some(written) if version(written.as_ref()) > version(watched.as_ref()) => written,
            Some(_) => {
                answers.remove(&uid);
                Arc::clone(watched)
            }
            None => Arc::clone(watched),
        }
    }
}

/// Resource versions of one kind are numbers that grow (Kubernetes says so since 1.35; etcd always did).
fn version<K: Resource<DynamicType = ()>>(object: &K) -> u128 {
    let text = object.meta().resource_version.as_deref().unwrap_or_default();
    text.parse().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use flotilla_api::TrainingJob;
    use serde_json::json;

    use super::*;

    fn job(version: &str) -> TrainingJob {
        let spec = json!({"model": {"uri": "pvc://c/m"}, "datasets": [], "algorithm": {}, "checkpoint": {"storage": {"claimName": "c"}}});
        let metadata = json!({"name": "a", "namespace": "lab", "uid": "u", "resourceVersion": version});
        serde_json::from_value(
            json!({"apiVersion": "flotilla.dev/v1alpha1", "kind": "TrainingJob", "metadata": metadata, "spec": spec}),
        )
        .expect("a job")
    }

    #[test]
    fn a_write_is_read_back_until_the_watch_has_caught_up() {
        let latest = Latest::default();
        let version = |watched: &str| latest.of(&Arc::new(job(watched))).resource_version();
        assert_eq!(version("9").as_deref(), Some("9"));
        latest.remember(job("10"));
        assert_eq!(version("9").as_deref(), Some("10"));
        assert_eq!(version("10").as_deref(), Some("10"));
        assert_eq!(version("9").as_deref(), Some("9"), "nothing is remembered any more");
    }
}
