//! What "done" means for each kind. Pure.

use flotilla_api::{
    Dataset, ModelCheckpoint, ModelDeployment, TrainingJob, dataset::DatasetPhase, evaluation::Score,
    model_checkpoint::CheckpointPhase, model_deployment::DeploymentPhase, training_job::TrainingPhase,
};
use kube::core::DynamicObject;
use serde::de::DeserializeOwned;

/// How far one object is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Standing {
    /// Its phase, in the words of its kind.
    pub phase: String,
    /// Numbers and reasons, for people.
    pub detail: String,
    /// Steps done and steps of the whole, where it has steps.
    pub steps: Option<(u64, u64)>,
    /// Whether and how it ended.
    pub outcome: Option<Outcome>,
}

/// How an object ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// It reached its goal.
    Reached,
    /// It never will.
    Missed,
}

/// The standing of `object`; objects of kinds that have no goal are done once they exist.
pub fn standing(object: &DynamicObject) -> Standing {
    match object.types.as_ref().map(|types| types.kind.as_str()) {
        Some("Dataset") => typed::<Dataset>(object).map(dataset),
        Some("TrainingJob") => typed::<TrainingJob>(object).map(training_job),
        Some("ModelCheckpoint") => typed::<ModelCheckpoint>(object).map(model_checkpoint),
        Some("ModelDeployment") => typed::<ModelDeployment>(object).map(model_deployment),
        _ => Some(Standing {
            phase: "Applied".into(),
            outcome: Some(Outcome::Reached),
            ..Standing::default()
        }),
    }
    .unwrap_or_default()
}

fn typed<K: DeserializeOwned>(object: &DynamicObject) -> Option<K> {
    serde_json::from_value(serde_json::to_value(object).ok()?).ok()
}

fn is_current(observed: Option<i64>, generation: Option<i64>) -> bool {
    observed.is_some() && observed == generation
}

fn dataset(object: Dataset) -> Standing {
    let Some(status) = object.status else { return waiting() };
    let detail = match &status.report {
        Some(report) => {
            let bad = if report.bad_records > 0 {
                format!(", {} bad", report.bad_records)
            } else {
                String::new()
            };
            format!(
                "{} prompts of {} rows, {} images{bad}",
                report.rows_out, report.rows_in, report.images
            )
        }
        None => status.message.clone(),
    };
    let outcome = match status.phase {
        DatasetPhase::Ready => Some(Outcome::Reached),
        DatasetPhase::Failed => Some(Outcome::Missed),
        DatasetPhase::Pending | DatasetPhase::Preparing => None,
    };
    let detail = if outcome == Some(Outcome::Missed) {
        status.message
    } else {
        detail
    };
    Standing {
        phase: format!("{:?}", status.phase),
        detail,
        steps: None,
        outcome,
    }
}

fn training_job(object: TrainingJob) -> Standing {
    let Some(status) = object.status else { return waiting() };
    let mut parts = Vec::new();
    if let Some(progress) = &status.progress {
        let named = [
            ("reward", &progress.reward),
            ("loss", &progress.loss),
            ("kl", &progress.kl),
        ];
        parts.extend(
            named
                .iter()
                .filter_map(|(name, value)| value.as_ref().map(|value| format!("{name} {value}"))),
        );
    }
    parts.extend(status.scores.iter().map(score));
    let outcome = match status.phase {
        TrainingPhase::Complete => Some(Outcome::Reached),
        TrainingPhase::Failed => Some(Outcome::Missed),
        _ => None,
    };
    if outcome.is_none()
        && let Some(eta) = status.progress.as_ref().and_then(|progress| progress.eta.as_ref())
    {
        parts.push(format!("ETA {eta}"));
    }
    if parts.is_empty() || outcome == Some(Outcome::Missed) {
        parts = vec![status.message];
    }
    let steps = status
        .progress
        .map(|progress| (u64::from(progress.step), u64::from(progress.total_steps)));
    Standing {
        phase: format!("{:?}", status.phase),
        detail: parts.join("  "),
        steps,
        outcome,
    }
}

fn score(score: &Score) -> String {
    format!("{} {:.1}%", score.set, 100.0 * score.accuracy)
}

fn model_checkpoint(object: ModelCheckpoint) -> Standing {
    let Some(status) = object.status else { return waiting() };
    let outcome = match status.phase {
        CheckpointPhase::Available => Some(Outcome::Reached),
        CheckpointPhase::Refused => Some(Outcome::Missed),
        CheckpointPhase::Pending | CheckpointPhase::Verifying => None,
    };
    Standing {
        phase: format!("{:?}", status.phase),
        detail: status.message,
        steps: None,
        outcome,
    }
}

fn model_deployment(object: ModelDeployment) -> Standing {
    let Some(status) = object.status else { return waiting() };
    let settled = is_current(status.observed_generation, object.metadata.generation);
    let outcome = match status.phase {
        DeploymentPhase::Available | DeploymentPhase::ScaledToZero if settled => Some(Outcome::Reached),
        DeploymentPhase::Degraded => Some(Outcome::Missed),
        _ => None,
    };
    let detail = match (&outcome, status.url) {
        (Some(Outcome::Reached), Some(url)) => format!("{} ready  {}  {url}", status.ready, status.checkpoint),
        _ => status.message,
    };
    Standing {
        phase: format!("{:?}", status.phase),
        detail,
        steps: None,
        outcome,
    }
}

fn waiting() -> Standing {
    Standing {
        phase: "Pending".into(),
        ..Standing::default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn job(status: &serde_json::Value) -> Standing {
        let object = json!({
            "apiVersion": "flotilla.dev/v1alpha1",
            "kind": "TrainingJob",
            "metadata": { "name": "a" },
            "spec": {
                "model": { "uri": "pvc://a/b" },
                "datasets": [{ "datasetRef": { "name": "d" } }],
                "algorithm": { "sft": { "steps": 4 } },
                "checkpoint": { "storage": { "claimName": "a" } }
            },
            "status": status
        });
        standing(&serde_json::from_value(object).expect("an object"))
    }

    #[test]
    fn a_running_job_shows_steps_and_scores() {
        let standing = job(&json!({
            "phase": "Running",
            "progress": { "step": 3, "totalSteps": 4, "steps": "3/4", "reward": "0.91", "eta": "2m10s" },
            "scores": [{ "set": "critic", "step": 2, "accuracy": 0.875, "formatRate": 1.0, "prompts": 8 }]
        }));
        assert_eq!(standing.steps, Some((3, 4)));
        assert_eq!(standing.detail, "reward 0.91  critic 87.5%  ETA 2m10s");
        assert_eq!(standing.outcome, None);
    }

    #[test]
    fn a_failed_job_missed_its_goal_and_says_why() {
        let standing = job(&json!({ "phase": "Failed", "message": "digest differs" }));
        assert_eq!(
            (standing.outcome, standing.detail.as_str()),
            (Some(Outcome::Missed), "digest differs")
        );
    }

    #[test]
    fn an_object_without_goal_is_done_once_it_exists() {
        let claim = json!({ "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": { "name": "a" } });
        let object: DynamicObject = serde_json::from_value(claim).expect("an object");
        assert_eq!(standing(&object).outcome, Some(Outcome::Reached));
    }
}
