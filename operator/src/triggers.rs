//! Who must be reconciled when something changes.

use std::sync::Arc;

use flotilla_api::{Dataset, ModelCheckpoint, ModelDeployment, TrainingJob, reference::ModelReference};
use futures::{
    StreamExt as _,
    channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded},
};
use k8s_openapi::{api::core::v1::Pod, jiff::Timestamp};
use kube::{Resource, ResourceExt as _, runtime::reflector::ObjectRef};

use crate::{
    cache::{Change, Stores},
    pod_view::PodView,
};

/// Queues of the four controllers.
#[derive(Clone, Debug)]
pub struct Triggers {
    datasets: UnboundedSender<ObjectRef<Dataset>>,
    training_jobs: UnboundedSender<ObjectRef<TrainingJob>>,
    model_checkpoints: UnboundedSender<ObjectRef<ModelCheckpoint>>,
    model_deployments: UnboundedSender<ObjectRef<ModelDeployment>>,
    stores: Stores,
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
    /// Triggers that look up dependants in `stores`.
    pub fn new(stores: Stores) -> (Self, Queues) {
        let (datasets, datasets_queue) = unbounded();
        let (training_jobs, training_jobs_queue) = unbounded();
        let (model_checkpoints, model_checkpoints_queue) = unbounded();
        let (model_deployments, model_deployments_queue) = unbounded();
        let triggers = Self {
            datasets,
            training_jobs,
            model_checkpoints,
            model_deployments,
            stores,
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
    pub fn everything(&self) {
        for dataset in self.stores.datasets.state() {
            send_object(&self.datasets, &dataset);
        }
        for job in self.stores.training_jobs.state() {
            send_object(&self.training_jobs, &job);
        }
        for checkpoint in self.stores.model_checkpoints.state() {
            send_object(&self.model_checkpoints, &checkpoint);
        }
        for deployment in self.stores.model_deployments.state() {
            send_object(&self.model_deployments, &deployment);
        }
    }

    /// A pod concerns the object that controls it, which is told after [`crate::owned_pods`] knows.
    pub fn pod(&self, change: &Change<Pod>) {
        self.stores.owned_pods.record(change);
        let Some(pod) = change.object().filter(|_| concerns_owner(change)) else {
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
        let readers = self.stores.training_jobs.state_filter(|job| {
            let sets = job.spec.evaluation.iter().flat_map(|plan| &plan.sets);
            let mut references = job
                .spec
                .datasets
                .iter()
                .map(|set| &set.dataset_ref)
                .chain(sets.map(|set| &set.dataset_ref));
            job.namespace().as_deref() == Some(&namespace) && references.any(|reference| reference.name == name)
        });
        for job in readers {
            send_object(&self.training_jobs, &job);
        }
    }

    /// A TrainingJob concerns itself and whatever begins with its result.
    pub fn training_job(&self, change: &Change<TrainingJob>) {
        let Some(job) = change.object() else { return };
        if change.concerns_spec() {
            send_object(&self.training_jobs, job);
        }
        let (name, namespace) = identity(job);
        self.users_of(&namespace, |model| names(model.training_job_ref.as_ref(), &name));
    }

    /// A ModelCheckpoint concerns itself and whatever uses it, by its own name or as the result of its job.
    pub fn model_checkpoint(&self, change: &Change<ModelCheckpoint>) {
        let Some(checkpoint) = change.object() else { return };
        if change.concerns_spec() {
            send_object(&self.model_checkpoints, checkpoint);
        }
        let (name, namespace) = identity(checkpoint);
        let job = checkpoint
            .spec
            .produced_by
            .as_ref()
            .map(|producer| producer.name.as_str());
        self.users_of(&namespace, |model| {
            names(model.checkpoint_ref.as_ref(), &name)
                || job.is_some_and(|job| names(model.training_job_ref.as_ref(), job))
        });
    }

    /// A ModelDeployment concerns itself.
    pub fn model_deployment(&self, change: &Change<ModelDeployment>) {
        if let (true, Some(deployment)) = (change.concerns_spec(), change.object()) {
            send_object(&self.model_deployments, deployment);
        }
    }

    fn users_of(&self, namespace: &str, uses: impl Fn(&ModelReference) -> bool) {
        for job in self.stores.training_jobs.state() {
            if job.namespace().as_deref() == Some(namespace) && uses(&job.spec.model) {
                send_object(&self.training_jobs, &job);
            }
        }
        for deployment in self.stores.model_deployments.state() {
            if deployment.namespace().as_deref() == Some(namespace) && uses(&deployment.spec.model) {
                send_object(&self.model_deployments, &deployment);
            }
        }
    }
}

/// Whether the owner has anything to do about it. Of many rollout pods only what changes a decision or the status is told:
/// that one was bound to a node, or that its container is being created, is not.
fn concerns_owner(change: &Change<Pod>) -> bool {
    let (Some(before), Some(after)) = (&change.before, &change.after) else {
        return true;
    };
    let view = |pod: &Pod| PodView::of(pod, Timestamp::UNIX_EPOCH);
    let (before, after) = (view(before), view(after));
    before.index.is_none() || before.news() != after.news()
}

fn names(reference: Option<&flotilla_api::reference::LocalObjectReference>, name: &str) -> bool {
    reference.is_some_and(|reference| reference.name == name)
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
