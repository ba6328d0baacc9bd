//! In-memory copies of what the operator watches: one watch per kind, shared by all controllers.
//!
//! kube's shared reflector streams leave out deletions, and the loss of a pod is what the operator must hear first; so each
//! watch here feeds a plain [`Store`] and says what every event changed.

use std::{collections::HashMap, fmt::Debug, hash::Hash, sync::Arc};

use flotilla_api::{Dataset, ModelCheckpoint, ModelDeployment, TrainingJob};
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodSpec, PodStatus};
use kube::{
    Api, Resource, ResourceExt as _,
    runtime::{
        WatchStreamExt as _,
        reflector::{
            ObjectRef, Store,
            store::{Writer, store},
        },
        watcher::{self, Event, watcher},
    },
};
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use crate::owned_pods::OwnedPods;

/// Readable copies of every watched kind.
#[derive(Clone)]
pub struct Stores {
    /// Pods that the operator made.
    pub pods: Store<Pod>,
    /// All Datasets.
    pub datasets: Store<Dataset>,
    /// All TrainingJobs.
    pub training_jobs: Store<TrainingJob>,
    /// All ModelCheckpoints.
    pub model_checkpoints: Store<ModelCheckpoint>,
    /// All ModelDeployments.
    pub model_deployments: Store<ModelDeployment>,
    /// The pods again, by owner.
    pub owned_pods: OwnedPods,
}

impl Debug for Stores {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stores").finish_non_exhaustive()
    }
}

/// The writing ends of [`Stores`].
#[expect(missing_debug_implementations, reason = "the writers of kube implement none")]
pub struct Writers {
    /// Of [`Stores::pods`].
    pub pods: Writer<Pod>,
    /// Of [`Stores::datasets`].
    pub datasets: Writer<Dataset>,
    /// Of [`Stores::training_jobs`].
    pub training_jobs: Writer<TrainingJob>,
    /// Of [`Stores::model_checkpoints`].
    pub model_checkpoints: Writer<ModelCheckpoint>,
    /// Of [`Stores::model_deployments`].
    pub model_deployments: Writer<ModelDeployment>,
}

/// Empty stores and their writing ends.
pub fn stores() -> (Stores, Writers) {
    let (pods, pods_writer) = store();
    let (datasets, datasets_writer) = store();
    let (training_jobs, training_jobs_writer) = store();
    let (model_checkpoints, model_checkpoints_writer) = store();
    let (model_deployments, model_deployments_writer) = store();
    let stores = Stores {
        pods,
        datasets,
        training_jobs,
        model_checkpoints,
        model_deployments,
        owned_pods: OwnedPods::default(),
    };
    let writers = Writers {
        pods: pods_writer,
        datasets: datasets_writer,
        training_jobs: training_jobs_writer,
        model_checkpoints: model_checkpoints_writer,
        model_deployments: model_deployments_writer,
    };
    (stores, writers)
}

/// What an event did to one object: None before a creation, None after a deletion.
#[derive(Debug)]
pub struct Change<K> {
    /// The object as it was known.
    pub before: Option<Arc<K>>,
    /// The object as it is.
    pub after: Option<Arc<K>>,
}

impl<K: Resource<DynamicType = ()>> Change<K> {
    /// The object, as it is or was last.
    pub fn object(&self) -> Option<&Arc<K>> {
        self.after.as_ref().or(self.before.as_ref())
    }

    /// Whether more than the status changed: a new object, a new spec or a request to delete it.
    pub fn concerns_spec(&self) -> bool {
        let (Some(before), Some(after)) = (&self.before, &self.after) else {
            return self.after.is_some();
        };
        let (before, after) = (before.meta(), after.meta());
        before.uid != after.uid
            || before.generation != after.generation
            || before.deletion_timestamp != after.deletion_timestamp
    }
}

/// What is not read of an object need not be kept in memory.
pub trait Trim {
    /// Drops it.
    fn trim(&mut self) {}
}

impl Trim for Dataset {}
impl Trim for TrainingJob {}
impl Trim for ModelCheckpoint {}
impl Trim for ModelDeployment {}

impl Trim for Pod {
    /// The operator wrote the spec and reads but one field of it; of the status it reads what [`crate::pod_view`] does.
    fn trim(&mut self) {
        self.metadata.annotations = None;
        let restart_policy = self.spec.take().and_then(|spec| spec.restart_policy);
        self.spec = Some(PodSpec {
            restart_policy,
            ..PodSpec::default()
        });
        if let Some(status) = self.status.take() {
            let containers = status.container_statuses;
            self.status = Some(PodStatus {
                conditions: status.conditions,
                container_statuses: containers.map(|list| list.into_iter().map(trimmed).collect()),
                message: status.message,
                phase: status.phase,
                pod_ip: status.pod_ip,
                reason: status.reason,
                ..PodStatus::default()
            });
        }
    }
}

fn trimmed(status: ContainerStatus) -> ContainerStatus {
    ContainerStatus {
        last_state: status.last_state,
        name: status.name,
        ready: status.ready,
        restart_count: status.restart_count,
        state: status.state,
        ..ContainerStatus::default()
    }
}

/// Keeps `writer` equal to what the API server has and calls `tell` for every change, until it is dropped. `listed` is
/// cancelled once the whole first list is told: a store says so earlier, when what is made from the changes lacks most of them.
pub async fn watch<K>(
    api: Api<K>,
    config: watcher::Config,
    mut writer: Writer<K>,
    listed: CancellationToken,
    mut tell: impl FnMut(Change<K>),
) where
    K: Trim + Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let kind = K::kind(&());
    let mut events = watcher(api, config).default_backoff().boxed();
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                let event = event.modify(|object| {
                    object.managed_fields_mut().clear();
                    object.trim();
                });
                take(&mut writer, &event, &listed, &mut tell);
            }
            Err(error) => tracing::warn!(%kind, %error, "watch interrupted, beginning again"),
        }
    }
}

fn take<K>(writer: &mut Writer<K>, event: &Event<K>, listed: &CancellationToken, tell: &mut impl FnMut(Change<K>))
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    apply(writer, event, tell);
    if matches!(event, Event::InitDone) {
        listed.cancel();
    }
}

fn apply<K>(writer: &mut Writer<K>, event: &Event<K>, tell: &mut impl FnMut(Change<K>))
where
    K: Resource<DynamicType = ()> + Clone + 'static,
    K::DynamicType: Eq + Hash + Clone,
{
    let store = writer.as_reader();
    match event {
        Event::Apply(object) | Event::Delete(object) => {
            let key = ObjectRef::from_obj(object);
            let known = store.get(&key);
            writer.apply_watcher_event(event);
            let after = store.get(&key);
            // A deletion of what was never known still ends somebody's waiting.
            let before = known.or_else(|| after.is_none().then(|| Arc::new(object.clone())));
            tell(Change { before, after });
        }
        Event::Init | Event::InitApply(_) => writer.apply_watcher_event(event),
        Event::InitDone => {
            let known = by_key(&store);
            writer.apply_watcher_event(event);
            let present = by_key(&store);
            for (key, object) in &known {
                if !present.contains_key(key) {
                    tell(Change {
                        before: Some(Arc::clone(object)),
                        after: None,
                    });
                }
            }
            for (key, object) in present {
                tell(Change {
                    before: known.get(&key).cloned(),
                    after: Some(object),
                });
            }
        }
    }
}

fn by_key<K>(store: &Store<K>) -> HashMap<ObjectRef<K>, Arc<K>>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    let objects = store.state().into_iter();
    objects
        .map(|object| (ObjectRef::from_obj(object.as_ref()), object))
        .collect()
}

#[cfg(test)]
mod tests {
    use flotilla_api::names::label;
    use k8s_openapi::jiff::Timestamp;
    use serde_json::json;

    use super::*;
    use crate::pod_view::PodView;

    fn pod(name: &str, generation: i64) -> Pod {
        serde_json::from_value(
            json!({"metadata": {"name": name, "namespace": "lab", "uid": name, "generation": generation}}),
        )
        .expect("a pod")
    }

    fn run(events: Vec<Event<Pod>>) -> Vec<(Option<i64>, Option<i64>)> {
        let (_store, mut writer) = store();
        let mut seen = Vec::new();
        for event in events {
            apply(&mut writer, &event, &mut |change: Change<Pod>| {
                let generation = |pod: Option<Arc<Pod>>| pod.and_then(|pod| pod.metadata.generation);
                seen.push((generation(change.before), generation(change.after)));
            });
        }
        seen
    }

    #[test]
    fn a_kind_is_listed_only_when_every_object_of_the_list_was_told() {
        let (_store, mut writer) = store();
        let listed = CancellationToken::new();
        let mut told = 0;
        for event in [
            Event::Init,
            Event::InitApply(pod("a", 1)),
            Event::InitApply(pod("b", 1)),
            Event::InitDone,
        ] {
            take(&mut writer, &event, &listed, &mut |_: Change<Pod>| {
                assert!(!listed.is_cancelled(), "told after the list is said to be complete");
                told += 1;
            });
        }
        assert!(listed.is_cancelled());
        assert_eq!(told, 2);
    }

    #[test]
    fn a_deletion_is_told() {
        let seen = run(vec![
            Event::Init,
            Event::InitDone,
            Event::Apply(pod("a", 1)),
            Event::Delete(pod("a", 1)),
        ]);
        assert_eq!(seen, [(None, Some(1)), (Some(1), None)]);
    }

    #[test]
    fn what_vanished_while_the_watch_was_down_is_told_after_the_next_list() {
        let first = vec![Event::Init, Event::InitApply(pod("a", 1)), Event::InitDone];
        let again = vec![Event::Init, Event::InitApply(pod("b", 2)), Event::InitDone];
        let seen = run([first, again].concat());
        assert_eq!(seen, [(None, Some(1)), (Some(1), None), (None, Some(2))]);
    }

    #[test]
    fn decisions_see_the_same_pod_in_a_trimmed_copy() {
        let killed =
            json!({"terminated": {"exitCode": 137, "reason": "OOMKilled", "finishedAt": "2026-01-01T00:00:00Z"}});
        let ended = json!({"terminated": {"exitCode": 0, "message": r#"{"stage":"Completed"}"#}});
        let waits = json!({"waiting": {"reason": "ErrImagePull", "message": "no such image"}});
        let states = [
            ("Pending", waits),
            ("Running", json!({"running": {}})),
            ("Running", ended),
        ];
        for (phase, state) in states {
            let mut pod: Pod = serde_json::from_value(json!({
                "metadata": {"name": "a", "uid": "u", "labels": {label::ATTEMPT: "2", label::INDEX: "1"},
                    "annotations": {"a": "b"}, "creationTimestamp": "2026-01-01T00:00:00Z"},
                "spec": {"restartPolicy": "Never", "containers": [{"name": "worker", "image": "w"}]},
                "status": {"phase": phase, "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}], "reason": "Evicted",
                    "message": "low on memory",
                    "conditions": [
                        {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"},
                        {"type": "PodScheduled", "status": "False", "message": "no node"}],
                    "containerStatuses": [{"name": "worker", "image": "w", "imageID": "w", "ready": true,
                        "restartCount": 3, "state": state, "lastState": killed}]}}))
            .expect("a pod");
            let view = |pod: &Pod| PodView::of(pod, Timestamp::UNIX_EPOCH);
            let before = view(&pod);
            pod.trim();
            assert_eq!(view(&pod), before);
            assert!(pod.spec.expect("a spec").containers.is_empty());
        }
    }

    #[test]
    fn a_status_write_does_not_concern_the_spec() {
        let change = |before, after| Change {
            before: Some(Arc::new(pod("a", before))),
            after: Some(Arc::new(pod("a", after))),
        };
        assert!(!change(1, 1).concerns_spec());
        assert!(change(1, 2).concerns_spec());
    }
}
