use flotilla_api::{
    names::{condition, reason},
    progress::{ConversionReport, Progress},
};
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::*;
use crate::{
    conditions::holds,
    owner::Owner,
    pod_view::{Exit, PodStage, PodView},
    run_pod::RunNames,
};

fn observed(spec: Value) -> Observed {
    let mut base = json!({"source": {"uri": "pvc://digits/raw"}, "conversion": {"format": {"preference": {}}},
        "storage": {"claimName": "digits"}});
    if let (Some(base), Value::Object(spec)) = (base.as_object_mut(), spec) {
        base.extend(spec);
    }
    let dataset = json!({"apiVersion": "flotilla.dev/v1alpha1", "kind": "Dataset",
        "metadata": {"name": "pairs", "namespace": "lab", "uid": "0123456789", "generation": 1}, "spec": base});
    let dataset: Dataset = serde_json::from_value(dataset).expect("a Dataset");
    let owner = Owner::of(&dataset).expect("an identity");
    Observed {
        names: RunNames::new(&owner, "prepare"),
        owner,
        dataset,
        status: flotilla_api::DatasetStatus::default(),
        pod: None,
        now: Timestamp::from_second(1000).expect("in range"),
    }
}

fn ended(mut observed: Observed, code: i32, report: Option<ConversionReport>, message: &str) -> Observed {
    let exit = Exit {
        code: Some(code),
        disrupted: false,
        at: Some(Timestamp::UNIX_EPOCH),
        progress: Some(Box::new(Progress {
            message: message.into(),
            conversion: report,
            ..Progress::default()
        })),
        reason: String::new(),
    };
    let pod: k8s_openapi::api::core::v1::Pod =
        serde_json::from_value(json!({"metadata": {"name": "p"}})).expect("a pod");
    observed.status.attempt = 1;
    observed.pod = Some(PodView {
        stage: PodStage::Exited(exit),
        ..PodView::of(&pod, observed.now)
    });
    observed
}

fn step(observed: &Observed) -> (flotilla_api::DatasetStatus, Vec<crate::report::Note>) {
    let plan = validate(observed);
    report::next_status(observed, &decide(observed, plan.as_ref().err()))
}

fn counts(bad: u64) -> Option<ConversionReport> {
    Some(ConversionReport {
        rows_in: 10,
        rows_out: 10 - bad,
        bad_records: bad,
        digest: "sha256:1".into(),
        uri: "pvc://digits/datasets/lab/pairs-1".into(),
        ..ConversionReport::default()
    })
}

#[test]
fn the_rows_go_to_a_directory_of_this_object_and_generation() {
    let config = validate(&observed(json!({}))).expect("valid");
    let flotilla_api::role::Role::Prepare(prepare) = config.role else {
        panic!("another role");
    };
    assert_eq!(prepare.output_uri, "pvc://digits/datasets/lab/pairs-01234567-1");
}

#[test]
fn a_new_dataset_gets_a_pod() {
    let (status, notes) = step(&observed(json!({})));
    assert_eq!((status.attempt, status.phase), (1, DatasetPhase::Pending));
    assert_eq!(notes[0].reason, reason::PODS_CREATED);
}

#[test]
fn a_source_that_is_no_place_is_an_invalid_spec_and_makes_no_pod() {
    let observed = observed(json!({"source": {"uri": "pvc:///x"}}));
    let (status, _) = step(&observed);
    assert_eq!(status.attempt, 0);
    assert_eq!(status.conditions[0].reason, reason::INVALID_SPEC);
}

#[test]
fn a_dataset_is_ready_with_its_counts() {
    let (status, _) = step(&ended(
        observed(json!({"conversion": {"format": {"preference": {}}, "maxBadRecords": 2}})),
        0,
        counts(1),
        "",
    ));
    assert_eq!(status.phase, DatasetPhase::Ready);
    assert_eq!(status.message, "1 of 10 rows were left out");
    assert_eq!(status.report, counts(1));
    assert!(holds(&status.conditions, condition::READY));
}

#[test]
fn too_many_bad_rows_fail_the_dataset_with_the_workers_message_and_counts() {
    let (status, notes) = step(&ended(
        observed(json!({})),
        78,
        counts(3),
        "3 rows are bad: row 0: no image",
    ));
    assert_eq!(status.phase, DatasetPhase::Failed);
    assert_eq!(status.message, "3 rows are bad: row 0: no image");
    assert_eq!(status.report.map(|report| report.bad_records), Some(3));
    assert_eq!(notes[0].reason, reason::TOO_MANY_BAD_RECORDS);
}

#[test]
fn ready_and_failed_are_final() {
    for code in [0, 78] {
        let mut observed = ended(observed(json!({})), code, counts(0), "");
        let (first, _) = step(&observed);
        observed.status = first.clone();
        observed.pod = None;
        let (second, notes) = step(&observed);
        assert_eq!(second, first);
        assert!(notes.is_empty());
    }
}
