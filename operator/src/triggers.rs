//! Who must be reconciled when something changes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flotilla_api::{Dataset, ModelCheckpoint, ModelDeployment, TrainingJob};
use futures::{
    StreamExt as _,
    channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded},
};
use k8s_openapi::{api::core::v1::Pod, jiff::Timestamp};
use kube::{Resource, ResourceExt as _, runtime::reflector::ObjectRef};

use crate::{
    cache::{Change, Stores},
    dependants::{Dependants, Used},
    owned_pods::OwnedPods,
    pod_view::PodView,
};

/// Queues of the four controllers.
#[derive(Clone, Debug)]
pub struct Triggers {
    datasets: UnboundedSender<ObjectRef<Dataset>>,
    training_jobs: UnboundedSender<ObjectRef<TrainingJob>>,
    model_checkpoints: UnboundedSender<ObjectRef<ModelCheckpoint>>,
    model_deployments: UnboundedSender<ObjectRef<ModelDeployment>>,
    users: Arc<Mutex<Users>>,
    pods: OwnedPods,
}

/// Who uses what.
#[derive(Debug, Default)]
struct Users {
    jobs: Dependants<TrainingJob>,
    deployments: Dependants<ModelDeployment>,
}

/// The reading ends of [`Triggers`].
#[derive(Debug)]
pub struct Queues {
    /// For the Dataset controller.
    pub datasets: UnboundedReceiver<ObjectRef<Dataset>>,
    /// For the TrainingJob controller.
    pub training_jobs: UnboundedReceiver<ObjectRef<TrainingJob>>,
    /// For the ModelCheckpoint controller.
    pub model_checkpoints: UnboundedReceiver<ObjectRef<ModelCheckpoint>>,
    /// For the ModelDeployment controller.
    pub model_deployments: UnboundedReceiver<ObjectRef<ModelDeployment>>,
}

impl Queues {
    /// Forgets what comes in, for ever: a standby makes no passes, and its queues must not grow.
    pub async fn discard(&mut self) {
        let Self {
            datasets,
            training_jobs,
            model_checkpoints,
            model_deployments,
        } = self;
        tokio::join!(
            datasets.for_each(|_| async {}),
            training_jobs.for_each(|_| async {}),
            model_checkpoints.for_each(|_| async {}),
            model_deployments.for_each(|_| async {}),
        );
    }
}

impl Triggers {
    /// Triggers and the queues that they fill; `pods` is kept up to date too.
    pub fn new(pods: OwnedPods) -> (Self, Queues) {
        let (datasets, datasets_queue) = unbounded();
        let (training_jobs, training_jobs_queue) = unbounded();
        let (model_checkpoints, model_checkpoints_queue) = unbounded();
        let (model_deployments, model_deployments_queue) = unbounded();
        let triggers = Self {
            datasets,
            training_jobs,
            model_checkpoints,
            model_deployments,
            users: Arc::default(),
            pods,
        };
        let queues = Queues {
            datasets: datasets_queue,
            training_jobs: training_jobs_queue,
            model_checkpoints: model_checkpoints_queue,
            model_deployments: model_deployments_queue,
        };
        (triggers, queues)
    }

    /// Everything that is known: what a new leader begins with.
    pub fn everything(&self, stores: &Stores) {
        for dataset in stores.datasets.state() {
            send_object(&self.datasets, &dataset);
        }
        for job in stores.training_jobs.state() {
            send_object(&self.training_jobs, &job);
        }
        for checkpoint in stores.model_checkpoints.state() {
            send_object(&self.model_checkpoints, &checkpoint);
        }
        for deployment in stores.model_deployments.state() {
            send_object(&self.model_deployments, &deployment);
        }
    }

    /// A pod concerns the object that controls it, which is told after [`crate::owned_pods`] knows.
    pub fn pod(&self, change: &Change<Pod>) {
        self.pods.record(change);
        let Some(pod) = change.object().filter(|_| self.concerns_owner(change)) else {
            return;
        };
        let namespace = pod.namespace().unwrap_or_default();
        let owners = pod.metadata.owner_references.iter().flatten();
        for owner in owners.filter(|owner| owner.controller == Some(true)) {
            match owner.kind.as_str() {
                "Dataset" => send(&self.datasets, &owner.name, &namespace),
                "TrainingJob" => send(&self.training_jobs, &owner.name, &namespace),
                "ModelCheckpoint" => send(&self.model_checkpoints, &owner.name, &namespace),
                "ModelDeployment" => send(&self.model_deployments, &owner.name, &namespace),
                _ => {}
            }
        }
    }

    /// A Dataset concerns itself and the jobs that read it.
    pub fn dataset(&self, change: &Change<Dataset>) {
        let Some(dataset) = change.object() else { return };
        if change.concerns_spec() {
            send_object(&self.datasets, dataset);
        }
        let (name, namespace) = identity(dataset);
        self.tell_users(&namespace, [Used::Dataset(name)]);
    }

    /// A TrainingJob concerns itself and whatever begins with its result.
    pub fn training_job(&self, change: &Change<TrainingJob>) {
        let Some(job) = change.object() else { return };
        self.users().jobs.note(change);
        if change.concerns_spec() {
            send_object(&self.training_jobs, job);
        }
        let (name, namespace) = identity(job);
        self.tell_users(&namespace, [Used::Job(name)]);
    }

    /// A ModelCheckpoint concerns itself and whatever uses it, by its own name or as the result of its job.
    pub fn model_checkpoint(&self, change: &Change<ModelCheckpoint>) {
        let Some(checkpoint) = change.object() else { return };
        if change.concerns_spec() {
            send_object(&self.model_checkpoints, checkpoint);
        }
        let (name, namespace) = identity(checkpoint);
        let job = checkpoint.spec.produced_by.as_ref();
        let job = job.map(|producer| Used::Job(producer.name.clone()));
        self.tell_users(&namespace, [Used::Checkpoint(name)].into_iter().chain(job));
    }

    /// A ModelDeployment concerns itself.
    pub fn model_deployment(&self, change: &Change<ModelDeployment>) {
        self.users().deployments.note(change);
        if let (true, Some(deployment)) = (change.concerns_spec(), change.object()) {
            send_object(&self.model_deployments, deployment);
        }
    }

    /// Whether the owner has anything to do about it. Of many rollout pods only what changes a decision or the status is told:
    /// that one was made, bound to a node, or that its container is being created, is not; and of their readiness the moment
    /// at which all are ready. Until then the next reading of the learner's progress brings the status up to date.
    fn concerns_owner(&self, change: &Change<Pod>) -> bool {
        let view = |pod: &Arc<Pod>| PodView::of(pod, Timestamp::UNIX_EPOCH);
        let Some(after) = change.after.as_ref() else {
            return true;
        };
        let now = view(after);
        if now.index.is_none() {
            return true;
        }
        let Some(before) = change.before.as_ref().map(view) else {
            return !now.is_fresh();
        };
        if before.became_ready(&now) {
            return self.pods.siblings_are_ready(after);
        }
        before.news() != now.news()
    }

    fn users(&self) -> MutexGuard<'_, Users> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_users(&self, namespace: &str, used: impl IntoIterator<Item = Used>) {
        let users = self.users();
        for used in used {
            for job in users.jobs.of(namespace, used.clone()) {
                // A closed queue means that the controller is shutting down.
                let _ = self.training_jobs.unbounded_send(job.clone());
            }
            for deployment in users.deployments.of(namespace, used) {
                let _ = self.model_deployments.unbounded_send(deployment.clone());
            }
        }
    }
}

fn identity<K: Resource<DynamicType = ()>>(object: &Arc<K>) -> (String, String) {
    (object.name_any(), object.namespace().unwrap_or_default())
}

fn send<K: Resource<DynamicType = ()>>(queue: &UnboundedSender<ObjectRef<K>>, name: &str, namespace: &str) {
    // A closed queue means that the controller is shutting down.
    let _ = queue.unbounded_send(ObjectRef::new(name).within(namespace));
}

fn send_object<K: Resource<DynamicType = ()>>(queue: &UnboundedSender<ObjectRef<K>>, object: &Arc<K>) {
    let _ = queue.unbounded_send(ObjectRef::from_obj(object.as_ref()));
}

#[cfg(test)]
mod tests {
    use flotilla_api::names::label;
    use serde_json::json;

    use super::*;

    fn pod(index: Option<u32>, phase: &str, ready: bool) -> Arc<Pod> {
        let mut pod = json!({
            "metadata": {"name": format!("a-{index:?}"), "namespace": "lab", "uid": format!("{index:?}"), "labels": {},
                "ownerReferences": [{"apiVersion": "v", "kind": "TrainingJob", "name": "a", "uid": "o", "controller": true}]},
            "status": {"phase": phase, "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]},
        });
        if let Some(index) = index {
            pod["metadata"]["labels"][label::INDEX] = json!(index.to_string());
        }
        Arc::new(serde_json::from_value(pod).expect("a pod"))
    }

    /// A pod as it was or is; None where there is none.
    type Seen = Option<Arc<Pod>>;

    /// How many times the job is told when its pods change like this, one after the other.
    fn told(changes: Vec<(Seen, Seen)>) -> usize {
        let (triggers, mut queues) = Triggers::new(OwnedPods::default());
        for (before, after) in changes {
            triggers.pod(&Change { before, after });
        }
        std::iter::from_fn(|| queues.training_jobs.try_recv().ok()).count()
    }

    #[test]
    fn a_learner_is_told_of_always() {
        let (pending, running) = (pod(None, "Pending", false), pod(None, "Running", false));
        assert_eq!(
            told(vec![
                (None, Some(Arc::clone(&pending))),
                (Some(pending), Some(Arc::clone(&running))),
                (Some(running), None),
            ]),
            3
        );
    }

    #[test]
    fn of_rollout_pods_that_come_up_the_last_one_is_told() {
        let made = |index| (None, Some(pod(Some(index), "Pending", false)));
        let ready = |index| {
            let before = pod(Some(index), "Pending", false);
            (Some(before), Some(pod(Some(index), "Running", true)))
        };
        assert_eq!(told(vec![made(0), made(1), made(2)]), 0);
        assert_eq!(told(vec![made(0), made(1), made(2), ready(0), ready(2)]), 0);
        assert_eq!(told(vec![made(0), made(1), made(2), ready(0), ready(2), ready(1)]), 1);
    }

    #[test]
    fn a_rollout_pod_that_fails_or_goes_is_told_at_once() {
        let made = |index| (None, Some(pod(Some(index), "Pending", false)));
        let pending = || Some(pod(Some(1), "Pending", false));
        assert_eq!(
            told(vec![made(0), made(1), (pending(), Some(pod(Some(1), "Failed", false)))]),
            1
        );
        assert_eq!(told(vec![made(0), made(1), (pending(), None)]), 1);
        let unready = (
            Some(pod(Some(1), "Running", true)),
            Some(pod(Some(1), "Running", false)),
        );
        assert_eq!(told(vec![made(0), unready]), 1);
    }
}
