use flotilla_api::progress::Progress;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::*;
use crate::{
    owner::Owner,
    pod_view::{Exit, PodStage, PodView},
    run_pod::RunNames,
};

const DIGEST: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

fn observed(produced_by: &Value) -> Observed {
    let checkpoint = json!({"apiVersion": "flotilla.dev/v1alpha1", "kind": "ModelCheckpoint",
        "metadata": {"name": "base", "namespace": "lab", "uid": "0123456789", "generation": 1},
        "spec": {"uri": "pvc://digits/models/base", "digest": DIGEST, "producedBy": produced_by, "sizeBytes": 3_449_000}});
    let checkpoint: ModelCheckpoint = serde_json::from_value(checkpoint).expect("a ModelCheckpoint");
    let owner = Owner::of(&checkpoint).expect("an identity");
    Observed {
        names: RunNames::new(&owner, "verify"),
        owner,
        checkpoint,
        status: flotilla_api::ModelCheckpointStatus::default(),
        pod: None,
        now: Timestamp::from_second(1000).expect("in range"),
    }
}

fn ended(code: i32) -> PodView {
    let pod: k8s_openapi::api::core::v1::Pod =
        serde_json::from_value(json!({"metadata": {"name": "p"}})).expect("a pod");
    PodView {
        stage: PodStage::Exited(Exit {
            code: Some(code),
            disrupted: false,
            at: Some(Timestamp::UNIX_EPOCH),
            progress: Some(Box::new(Progress {
                message: "model.safetensors differs".into(),
                ..Progress::default()
            })),
            reason: String::new(),
        }),
        ..PodView::of(&pod, Timestamp::UNIX_EPOCH)
    }
}

fn step(observed: &Observed) -> flotilla_api::ModelCheckpointStatus {
    let plan = validate(observed);
    report::next_status(observed, &decide(observed, plan.as_ref().err())).0
}

#[test]
fn what_a_job_produced_is_available_at_once() {
    let status = step(&observed(&json!({"name": "a", "uid": "u", "step": 40})));
    assert_eq!((status.phase, status.attempt), (CheckpointPhase::Available, 0));
    assert_eq!(status.size.as_deref(), Some("3.4 MB"));
}

#[test]
fn imported_weights_are_verified_by_a_pod_first() {
    let mut observed = observed(&Value::Null);
    let status = step(&observed);
    assert_eq!((status.phase, status.attempt), (CheckpointPhase::Verifying, 1));
    observed.status = status;
    observed.pod = Some(ended(0));
    assert_eq!(step(&observed).phase, CheckpointPhase::Available);
}

#[test]
fn a_digest_that_differs_is_refused_for_good() {
    let mut observed = observed(&Value::Null);
    observed.status.attempt = 1;
    observed.pod = Some(ended(78));
    let status = step(&observed);
    assert_eq!(status.phase, CheckpointPhase::Refused);
    assert_eq!(status.message, "model.safetensors differs");
    observed.status = status.clone();
    observed.pod = Some(ended(0));
    assert_eq!(step(&observed), status);
}

#[test]
fn a_verification_that_was_killed_is_tried_again() {
    let mut observed = observed(&Value::Null);
    observed.status.attempt = 7;
    observed.pod = Some(ended(137));
    assert_eq!(step(&observed).attempt, 8);
}
