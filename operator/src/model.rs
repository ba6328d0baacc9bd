//! From a reference to a model to the directory and digest that a worker loads.

use flotilla_api::{
    ModelCheckpoint, TrainingJob,
    model_checkpoint::CheckpointPhase,
    reference::ModelReference,
    role::ModelSource,
    training_job::{LastCheckpoint, TrainingPhase},
};
use kube::runtime::reflector::ObjectRef;

use crate::cache::Stores;

/// What a reference stands for at this moment.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Resolution {
    /// The model is there.
    Resolved {
        /// What a worker loads.
        source: ModelSource,
        /// Name of the ModelCheckpoint, or the URI.
        name: String,
    },
    /// It is not there yet; the text says what is missing.
    Waiting(String),
}

/// Looks `reference` up in the namespace. Something that failed is waited for too: it can be deleted and made again.
pub fn resolve(reference: &ModelReference, namespace: &str, stores: &Stores) -> Resolution {
    if let Some(uri) = &reference.uri {
        return Resolution::Resolved {
            source: ModelSource {
                uri: uri.clone(),
                digest: None,
                random_seed: reference.random_seed.and_then(|seed| u64::try_from(seed).ok()),
            },
            name: uri.clone(),
        };
    }
    if let Some(checkpoint) = &reference.checkpoint_ref {
        return by_checkpoint(&checkpoint.name, namespace, stores);
    }
    if let Some(job) = &reference.training_job_ref {
        return match result_of(&job.name, namespace, stores) {
            Err(missing) => Resolution::Waiting(missing),
            Ok(last) => match by_checkpoint(&last.name, namespace, stores) {
                // The copy in memory still holds the one that the job's last write replaced.
                Resolution::Resolved { source, name } if source.digest.as_ref() != Some(&last.digest) => {
                    Resolution::Waiting(format!("ModelCheckpoint {name:?} is being replaced"))
                }
                resolution => resolution,
            },
        };
    }
    Resolution::Waiting("spec.model names no model".to_owned())
}

/// The checkpoint that a finished job left.
fn result_of(job: &str, namespace: &str, stores: &Stores) -> Result<LastCheckpoint, String> {
    let key = ObjectRef::<TrainingJob>::new(job).within(namespace);
    let found = stores.training_jobs.get(&key);
    let found = found.ok_or_else(|| format!("TrainingJob {job:?} does not exist"))?;
    let status = found.status.clone().unwrap_or_default();
    match (status.phase, status.last_checkpoint) {
        (TrainingPhase::Complete, Some(checkpoint)) => Ok(checkpoint),
        (TrainingPhase::Complete, None) => Err(format!("TrainingJob {job:?} is complete without a checkpoint")),
        (TrainingPhase::Failed, _) => Err(format!("TrainingJob {job:?} failed: {}", status.message)),
        (phase, _) => Err(format!("TrainingJob {job:?} is not complete ({phase:?})")),
    }
}

fn by_checkpoint(name: &str, namespace: &str, stores: &Stores) -> Resolution {
    let key = ObjectRef::<ModelCheckpoint>::new(name).within(namespace);
    let Some(checkpoint) = stores.model_checkpoints.get(&key) else {
        return Resolution::Waiting(format!("ModelCheckpoint {name:?} does not exist"));
    };
    let status = checkpoint.status.clone().unwrap_or_default();
    match status.phase {
        CheckpointPhase::Available => Resolution::Resolved {
            source: ModelSource {
                uri: checkpoint.spec.uri.clone(),
                digest: Some(checkpoint.spec.digest.clone()),
                random_seed: None,
            },
            name: name.to_owned(),
        },
        CheckpointPhase::Refused => {
            Resolution::Waiting(format!("ModelCheckpoint {name:?} was refused: {}", status.message))
        }
        CheckpointPhase::Pending | CheckpointPhase::Verifying => Resolution::Waiting(format!(
            "ModelCheckpoint {name:?} is not available ({:?})",
            status.phase
        )),
    }
}

#[cfg(test)]
mod tests {
    use flotilla_api::reference::LocalObjectReference;
    use kube::runtime::watcher::Event;
    use serde_json::json;

    use super::*;
    use crate::cache::stores;

    const DIGEST: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

    fn with(job_phase: &str, checkpoint_phase: &str) -> Stores {
        let (stores, mut writers) = stores();
        let checkpoint = json!({"apiVersion": "flotilla.dev/v1alpha1", "kind": "ModelCheckpoint",
            "metadata": {"name": "a-step-40", "namespace": "lab"},
            "spec": {"uri": "pvc://c/jobs/a", "digest": DIGEST},
            "status": {"phase": checkpoint_phase, "message": "file x differs"}});
        let job = json!({"apiVersion": "flotilla.dev/v1alpha1", "kind": "TrainingJob",
            "metadata": {"name": "a", "namespace": "lab"},
            "spec": {"model": {"uri": "pvc://c/m"}, "datasets": [], "algorithm": {"sft": {}},
                "checkpoint": {"storage": {"claimName": "c"}}},
            "status": {"phase": job_phase, "message": "no rows",
                "lastCheckpoint": {"name": "a-step-40", "step": 40, "digest": DIGEST}}});
        let checkpoint = serde_json::from_value(checkpoint).expect("a checkpoint");
        writers.model_checkpoints.apply_watcher_event(&Event::Apply(checkpoint));
        writers
            .training_jobs
            .apply_watcher_event(&Event::Apply(serde_json::from_value(job).expect("a job")));
        stores
    }

    fn of_job() -> ModelReference {
        ModelReference {
            training_job_ref: Some(LocalObjectReference { name: "a".into() }),
            ..ModelReference::default()
        }
    }

    #[test]
    fn the_result_of_a_complete_job_is_its_checkpoint_with_digest() {
        let resolution = resolve(&of_job(), "lab", &with("Complete", "Available"));
        let Resolution::Resolved { source, name } = resolution else {
            panic!("{resolution:?}");
        };
        assert_eq!(
            (source.uri.as_str(), source.digest.as_deref()),
            ("pvc://c/jobs/a", Some(DIGEST))
        );
        assert_eq!(name, "a-step-40");
    }

    #[test]
    fn what_is_waited_for_is_named() {
        let text = |stores: &Stores, namespace: &str| match resolve(&of_job(), namespace, stores) {
            Resolution::Waiting(text) => text,
            Resolution::Resolved { .. } => String::new(),
        };
        assert_eq!(
            text(&with("Running", "Available"), "lab"),
            r#"TrainingJob "a" is not complete (Running)"#
        );
        assert_eq!(
            text(&with("Failed", "Available"), "lab"),
            r#"TrainingJob "a" failed: no rows"#
        );
        assert_eq!(
            text(&with("Complete", "Pending"), "lab"),
            r#"ModelCheckpoint "a-step-40" is not available (Pending)"#
        );
        let refused = text(&with("Complete", "Refused"), "lab");
        assert_eq!(refused, r#"ModelCheckpoint "a-step-40" was refused: file x differs"#);
        assert_eq!(
            text(&with("Complete", "Available"), "other"),
            r#"TrainingJob "a" does not exist"#
        );
    }
}
