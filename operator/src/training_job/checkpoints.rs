//! Which checkpoints of a run become ModelCheckpoints, and which of those are forgotten.

use flotilla_api::{
    ModelCheckpoint, ModelCheckpointSpec,
    model_checkpoint::ProducedBy,
    names::label,
    pod::{PodSettings, Resources},
    progress::{CheckpointRecord, Progress, Stage},
    training_job::LastCheckpoint,
};
use kube::{ResourceExt as _, api::ObjectMeta};

use super::gather::Observed;
use crate::owner::label_value;

/// What is to be registered and forgotten.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    /// ModelCheckpoints that are missing, also where files were written again: the old one is forgotten first.
    pub register: Vec<ModelCheckpoint>,
    /// Names and UIDs of those whose files the learner removed or rewrote.
    pub forget: Vec<(String, String)>,
    /// The newest one, which is the run's result once it is complete.
    pub last: Option<LastCheckpoint>,
}

/// Compares what the learner keeps with what is registered.
pub fn plan(observed: &Observed) -> Registry {
    // What users delete after the end of a run stays deleted.
    let Some(progress) = observed.news().filter(|_| !observed.is_finished()) else {
        return Registry::default();
    };
    let missing = |record: &&CheckpointRecord| {
        !own(observed).any(|known| step_of(known) == i64::from(record.step) && known.spec.digest == record.digest)
    };
    let register = progress.checkpoints.iter().filter(missing);
    Registry {
        register: register.map(|record| build(observed, record)).collect(),
        forget: forgotten(observed, progress),
        last: progress.checkpoints.last().map(|record| LastCheckpoint {
            name: name(observed, record.step),
            step: record.step,
            digest: record.digest.clone(),
        }),
    }
}

/// Registered checkpoints of this very job: a deleted namesake's stay as they are.
fn own(observed: &Observed) -> impl Iterator<Item = &ModelCheckpoint> {
    let uid = &observed.owner.uid;
    let produced = move |checkpoint: &&ModelCheckpoint| {
        checkpoint
            .spec
            .produced_by
            .as_ref()
            .is_some_and(|producer| producer.uid == *uid)
    };
    observed.checkpoints.iter().map(AsRef::as_ref).filter(produced)
}

fn step_of(checkpoint: &ModelCheckpoint) -> i64 {
    checkpoint
        .spec
        .produced_by
        .as_ref()
        .map_or(-1, |producer| producer.step)
}

/// A step that is registered but no longer kept, or whose files were written again with another digest. One that is in use
/// stays in the first case, so that its users can say what they miss; in the second its successor has its name.
fn forgotten(observed: &Observed, progress: &Progress) -> Vec<(String, String)> {
    let kept = |step: i64| {
        progress
            .checkpoints
            .iter()
            .find(|record| i64::from(record.step) == step)
    };
    let newest = progress.checkpoints.iter().map(|record| i64::from(record.step)).max();
    let complete = is_complete(observed, progress);
    let gone = |checkpoint: &&ModelCheckpoint| {
        let step = step_of(checkpoint);
        let Some(record) = kept(step) else {
            // A guard that tripped removes what came after the result, but only at the end.
            let removed = newest.is_some_and(|newest| step < newest || progress.stage == Stage::Completed);
            return complete && removed && !observed.in_use.contains(&checkpoint.name_any());
        };
        record.digest != checkpoint.spec.digest
    };
    let identity = |checkpoint: &ModelCheckpoint| Some((checkpoint.name_any(), checkpoint.uid()?));
    own(observed).filter(gone).filter_map(identity).collect()
}

/// Whether the list names all that is kept: a worker that only starts has not looked yet, and a termination message that
/// had to be cut loses its metrics before it loses checkpoints.
fn is_complete(observed: &Observed, progress: &Progress) -> bool {
    let looked = !matches!(progress.stage, Stage::Starting | Stage::Loading | Stage::Failed);
    let ended = observed.pod.as_ref().is_some_and(|pod| pod.exit().is_some());
    looked && (!ended || !progress.metrics.is_empty())
}

/// `<job>-step-<n>`, with a part of the UID where a deleted namesake's checkpoint has that name.
fn name(observed: &Observed, step: u32) -> String {
    let (job, uid) = (&observed.owner.name, &observed.owner.uid);
    let plain = format!("{job}-step-{step}");
    let taken = observed.checkpoints.iter().any(|known| {
        let producer = known.spec.produced_by.as_ref();
        known.name_any() == plain && producer.is_none_or(|producer| producer.uid != *uid)
    });
    if taken {
        format!("{plain}-{}", observed.owner.short_uid())
    } else {
        plain
    }
}

fn build(observed: &Observed, record: &CheckpointRecord) -> ModelCheckpoint {
    let mut metadata: ObjectMeta = observed.owner.child(name(observed, record.step), "checkpoint");
    // No owner reference: weights outlive the job that made them.
    metadata.owner_references = None;
    let labels = metadata.labels.get_or_insert_default();
    labels.insert(label::TRAINING_JOB.to_owned(), label_value(&observed.owner.name));
    ModelCheckpoint {
        metadata,
        spec: ModelCheckpointSpec {
            uri: record.uri.clone(),
            digest: record.digest.clone(),
            produced_by: Some(ProducedBy {
                name: observed.owner.name.clone(),
                uid: observed.owner.uid.clone(),
                step: i64::from(record.step),
            }),
            size_bytes: i64::try_from(record.bytes).ok(),
            metrics: record.metrics.clone(),
            verify: verifier(observed),
        },
        status: None,
    }
}

/// The pod that verifies a checkpoint goes where the learner may go and has its image, but needs none of its devices.
fn verifier(observed: &Observed) -> PodSettings {
    PodSettings {
        resources: Resources::default(),
        ..observed.job.spec.roles.learner.pod.clone()
    }
}
