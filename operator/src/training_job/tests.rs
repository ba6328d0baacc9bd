use std::{collections::BTreeSet, sync::Arc};

use flotilla_api::{
    Dataset, ModelCheckpoint, TrainingJobStatus,
    evaluation::Score,
    names::{condition, reason},
    progress::{CheckpointRecord, Progress, Stage},
    role::{ModelSource, Precision, Role, Train},
    training_job::{LastCheckpoint, TrainingPhase},
};
use k8s_openapi::{
    api::core::v1::Pod,
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::{SignedDuration, Timestamp},
};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{apply::Applied, *};
use crate::{
    conditions::{find, holds},
    model::Resolution,
    owner::Owner,
    pod_view::{Exit, PodStage, PodView},
    refusal::Refusal,
    report::Note,
    run_pod::RunNames,
};

mod rollout_pods;

const DIGEST: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).expect("in range")
}

fn dataset(name: &str, format: &str, phase: &str) -> Arc<Dataset> {
    let dataset = json!({"apiVersion": "flotilla.dev/v1alpha1", "kind": "Dataset",
        "metadata": {"name": name, "namespace": "lab", "uid": name},
        "spec": {"source": {"uri": "pvc://digits/raw"}, "conversion": {"format": {format: {}}},
            "storage": {"claimName": "digits"}},
        "status": {"phase": phase, "message": "3 rows are bad",
            "report": {"uri": format!("pvc://digits/datasets/lab/{name}-1"), "digest": DIGEST}}});
    Arc::new(serde_json::from_value(dataset).expect("a Dataset"))
}

fn checkpoint(name: &str, uid: &str, step: u32, digest: &str) -> Arc<ModelCheckpoint> {
    let checkpoint = json!({"apiVersion": "flotilla.dev/v1alpha1", "kind": "ModelCheckpoint",
        "metadata": {"name": name, "namespace": "lab", "uid": format!("uid-of-{name}")},
        "spec": {"uri": "pvc://digits/x", "digest": digest, "producedBy": {"name": "critic", "uid": uid, "step": step}}});
    Arc::new(serde_json::from_value(checkpoint).expect("a ModelCheckpoint"))
}

/// A GRPO job with everything it needs, at second 1000, before its first pass.
fn observed(spec: Value) -> Observed {
    let mut base = json!({"model": {"checkpointRef": {"name": "base"}}, "datasets": [{"datasetRef": {"name": "pairs"}}],
        "algorithm": {"grpo": {"steps": 80}}, "rewards": [{"rule": "preference", "weight": 1.0}], "seed": 7,
        "evaluation": {"everySteps": 10, "sets": [{"name": "held-out", "datasetRef": {"name": "pairs"}, "maxRows": 9}]},
        "checkpoint": {"storage": {"claimName": "digits"}}});
    if let (Some(base), Value::Object(spec)) = (base.as_object_mut(), spec) {
        base.extend(spec);
    }
    let job = json!({"apiVersion": "flotilla.dev/v1alpha1", "kind": "TrainingJob",
        "metadata": {"name": "critic", "namespace": "lab", "uid": "0123456789", "generation": 3}, "spec": base});
    let job: TrainingJob = serde_json::from_value(job).expect("a TrainingJob");
    let owner = Owner::of(&job).expect("an identity");
    Observed {
        names: RunNames::new(&owner, "train"),
        rollout_names: RunNames::new(&owner, "rollout"),
        owner,
        job,
        status: TrainingJobStatus::default(),
        model: Resolution::Resolved {
            source: ModelSource {
                uri: "pvc://models/base".into(),
                digest: Some(DIGEST.into()),
                random_seed: None,
            },
            name: "base".into(),
        },
        datasets: vec![dataset("pairs", "preference", "Ready")],
        pod: None,
        others: Vec::new(),
        rollout: Vec::new(),
        live: None,
        checkpoints: Vec::new(),
        in_use: BTreeSet::new(),
        now: at(1000),
    }
}

fn pod(stage: PodStage) -> PodView {
    let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "critic-train-1", "uid": "p1"}})).expect("a pod");
    PodView {
        stage,
        attempt: 1,
        ..PodView::of(&pod, at(0))
    }
}

fn exit(code: i32, progress: Progress) -> Exit {
    Exit {
        code: Some(code),
        disrupted: false,
        at: Some(at(0)),
        progress: Some(Box::new(progress)),
        reason: String::new(),
    }
}

fn at_step(step: u32, steps: &[u32]) -> Progress {
    Progress {
        stage: Stage::Running,
        step,
        total_steps: 80,
        eta_seconds: Some(130),
        metrics: [("reward/overall", 0.912), ("loss", 0.1), ("actor/kl_loss", 0.02131)]
            .map(|(name, value)| (name.to_owned(), value))
            .into(),
        scores: vec![Score {
            set: "held-out".into(),
            step,
            accuracy: 0.9312,
            format_rate: 1.0,
            swap_consistency: None,
            prompts: 9,
        }],
        checkpoints: steps.iter().map(|step| record(*step)).collect(),
        ..Progress::default()
    }
}

fn record(step: u32) -> CheckpointRecord {
    CheckpointRecord {
        step,
        uri: format!("pvc://digits/jobs/lab/critic-01234567/checkpoints/step-{step:08}"),
        digest: DIGEST.into(),
        bytes: 3_449_000,
        metrics: std::collections::BTreeMap::new(),
    }
}

#[test]
fn a_checkpoint_is_verified_where_the_learner_may_go_without_its_devices() {
    let pod = json!({"image": "mine", "resources": {"limits": {"nvidia.com/gpu": "8"}},
        "podOverrides": {"nodeSelector": {"pool": "gpu"}}});
    let observed = training(json!({"roles": {"learner": {"pod": pod}}}), at_step(10, &[10]));
    let verify = &checkpoints::plan(&observed).register[0].spec.verify;
    assert_eq!(verify.image.as_deref(), Some("mine"));
    assert_eq!(verify.pod_overrides.node_selector["pool"], "gpu");
    assert!(verify.resources.limits.is_empty());
}

/// A job whose first pod trains.
fn training(spec: Value, live: Progress) -> Observed {
    let mut observed = observed(spec);
    observed.status.attempt = 1;
    observed.status.start_time = Some(Time(at(500)));
    observed.pod = Some(pod(PodStage::Running));
    observed.live = Some(live);
    observed
}

/// A job whose first pod ended.
fn ended(spec: Value, code: i32, progress: Progress) -> Observed {
    let mut observed = training(spec, Progress::default());
    observed.live = None;
    observed.pod = Some(pod(PodStage::Exited(exit(code, progress))));
    observed
}

fn decided(observed: &Observed) -> Decision {
    decide(observed, validate(observed).as_ref().err())
}

fn fleet(observed: &Observed) -> Fleet {
    rollout::decide(observed, &decided(observed), validate(observed).is_ok())
}

fn step(observed: &Observed) -> (TrainingJobStatus, Vec<Note>) {
    let registry = checkpoints::plan(observed);
    let applied = Applied {
        registered: Vec::new(),
        last: registry.last,
    };
    let decision = decided(observed);
    let fleet = fleet(observed);
    report::next_status(observed, &decision, &fleet, &applied)
}

fn refused(observed: &Observed) -> Refusal {
    validate(observed).expect_err("refused")
}

#[test]
fn the_learner_is_told_model_rows_digests_and_where_to_write() {
    let plan = validate(&observed(json!({}))).expect("valid");
    assert_eq!(plan.rollout, None);
    let Role::Train(train) = plan.learner.role else {
        panic!("another role");
    };
    let Train {
        model,
        datasets,
        evaluation_sets,
        output_uri,
        seed,
        evaluate_every,
        ..
    } = *train;
    assert_eq!(model.digest.as_deref(), Some(DIGEST));
    assert_eq!(
        (datasets[0].name.as_str(), datasets[0].digest.as_str()),
        ("pairs", DIGEST)
    );
    assert_eq!(
        (evaluation_sets[0].name.as_str(), evaluation_sets[0].max_rows),
        ("held-out", 9)
    );
    assert_eq!(output_uri, "pvc://digits/jobs/lab/critic-01234567");
    assert_eq!((seed, evaluate_every), (7, 10));
}

#[test]
fn learner_and_rollout_pods_are_told_the_same_precision() {
    let precision = |spec: Value| {
        let plan = validate(&observed(spec)).expect("valid");
        let rollout = plan.rollout.expect("rollout pods").role;
        let (Role::Train(train), Role::Rollout(rollout)) = (plan.learner.role, rollout) else {
            panic!("other roles");
        };
        assert_eq!(train.dtype, rollout.dtype);
        train.dtype
    };
    let roles = json!({"rollout": {"replicas": 2}});
    assert_eq!(precision(json!({"roles": roles})), None);
    assert_eq!(
        precision(json!({"roles": roles, "precision": "BF16"})),
        Some(Precision::Bf16)
    );
}

#[test]
fn a_job_waits_for_what_it_refers_to_and_says_so() {
    let mut observed = observed(json!({}));
    observed.datasets = vec![dataset("pairs", "preference", "Preparing")];
    let (status, _) = step(&observed);
    assert_eq!((status.phase, status.attempt), (TrainingPhase::Waiting, 0));
    assert_eq!(status.message, r#"Dataset "pairs" is not ready (Preparing)"#);
    let ready = find(&status.conditions, condition::READY).expect("Ready");
    assert_eq!(
        (ready.status.as_str(), ready.reason.as_str()),
        ("False", reason::WAITING_FOR_REFERENCE)
    );
    observed.datasets = vec![dataset("pairs", "preference", "Failed")];
    assert_eq!(refused(&observed).message, r#"Dataset "pairs" failed: 3 rows are bad"#);
    observed.datasets.clear();
    assert_eq!(refused(&observed).message, r#"Dataset "pairs" does not exist"#);
    observed.model = Resolution::Waiting("TrainingJob \"sft\" is not complete (Running)".into());
    assert_eq!(refused(&observed).reason, reason::WAITING_FOR_REFERENCE);
}

#[test]
fn rows_that_do_not_suit_the_algorithm_are_an_invalid_spec() {
    let mut observed = observed(json!({}));
    observed.datasets = vec![dataset("pairs", "instruction", "Ready")];
    assert_eq!(refused(&observed).reason, reason::INVALID_SPEC);
    observed.datasets = vec![dataset("pairs", "exactMatch", "Ready")];
    assert_eq!(refused(&observed).reason, reason::INVALID_SPEC);
}

#[test]
fn the_first_pass_makes_pod_one() {
    let (status, notes) = step(&observed(json!({})));
    assert_eq!(
        (status.phase, status.attempt, status.restarts),
        (TrainingPhase::Starting, 1, 0)
    );
    assert_eq!(status.start_time, Some(Time(at(1000))));
    assert_eq!(status.observed_generation, Some(3));
    assert!(holds(&status.conditions, condition::READY));
    assert_eq!(notes[0].reason, reason::PODS_CREATED);
}

#[test]
fn progress_is_shown_as_kubectl_prints_it() {
    let (status, _) = step(&training(json!({}), at_step(40, &[40])));
    let progress = status.progress.expect("progress");
    assert_eq!(progress.steps, "40/80");
    assert_eq!(progress.reward.as_deref(), Some("0.91"));
    assert_eq!(progress.accuracy.as_deref(), Some("93.1%"));
    assert_eq!(progress.kl.as_deref(), Some("0.0213"));
    assert_eq!(progress.eta.as_deref(), Some("2m10s"));
    assert_eq!(status.phase, TrainingPhase::Running);
    let last = LastCheckpoint {
        name: "critic-step-40".into(),
        step: 40,
        digest: DIGEST.into(),
    };
    assert_eq!(status.last_checkpoint, Some(last));
    assert!(holds(&status.conditions, condition::RUNNING) && holds(&status.conditions, condition::MODEL_LOADED));
}

#[test]
fn a_pass_without_news_changes_nothing() {
    let mut observed = training(json!({}), at_step(40, &[40]));
    let (first, _) = step(&observed);
    observed.status = first.clone();
    observed.now = at(2000);
    let (second, notes) = step(&observed);
    assert_eq!(second, first);
    assert!(notes.is_empty());
}

#[test]
fn a_worker_that_does_not_answer_for_a_moment_stays_what_it_was() {
    let mut observed = training(json!({}), at_step(40, &[40]));
    let (first, _) = step(&observed);
    observed.status = first.clone();
    observed.live = None;
    assert_eq!(step(&observed).0, first);
}

#[test]
fn a_pod_that_was_killed_is_replaced_and_counted_once() {
    let mut observed = ended(json!({}), 137, at_step(40, &[40]));
    let (status, notes) = step(&observed);
    assert_eq!(
        (status.attempt, status.restarts, status.phase),
        (2, 1, TrainingPhase::Restarting)
    );
    assert_eq!(notes[0].reason, reason::RESTARTED);
    // The status write was lost: the same decision again, the same counters.
    assert_eq!(step(&observed).0, status);
    observed.status = status;
    observed.pod = Some(pod(PodStage::Running));
    assert_eq!(step(&observed).0.restarts, 1);
}

#[test]
fn a_permanent_failure_ends_the_run_with_the_workers_message() {
    let mut progress = at_step(0, &[]);
    progress.message = "config.json: hidden_size is 0".into();
    let (status, notes) = step(&ended(json!({}), 78, progress));
    assert_eq!(status.phase, TrainingPhase::Failed);
    assert_eq!(status.message, "config.json: hidden_size is 0");
    let failed = find(&status.conditions, condition::FAILED).expect("Failed");
    assert_eq!(failed.reason, reason::PERMANENT_FAILURE);
    assert!(status.completion_time.is_some() && notes[0].warning);
}

#[test]
fn a_run_that_reached_its_goal_is_complete_even_if_it_was_just_suspended() {
    let (status, _) = step(&ended(json!({"suspend": true}), 0, at_step(80, &[40, 80])));
    assert_eq!(status.phase, TrainingPhase::Complete);
    assert_eq!(status.last_checkpoint.map(|last| last.step), Some(80));
    assert_eq!(
        status.progress.map(|progress| (progress.steps, progress.eta)),
        Some(("80/80".into(), None))
    );
}

#[test]
fn a_suspended_run_stops_its_pod_once_and_counts_no_failure() {
    let mut observed = training(json!({"suspend": true}), at_step(40, &[40]));
    assert_eq!(decided(&observed), Decision::Suspend { stop: true });
    let (status, notes) = step(&observed);
    assert_eq!(status.phase, TrainingPhase::Suspending);
    assert_eq!(notes[0].reason, reason::SUSPENDED);
    observed.status = status;
    if let Some(pod) = &mut observed.pod {
        pod.terminating = true;
    }
    assert_eq!(decided(&observed), Decision::Suspend { stop: false });
    observed.pod = None;
    observed.live = None;
    let (status, notes) = step(&observed);
    assert_eq!((status.phase, status.restarts), (TrainingPhase::Suspended, 0));
    assert!(notes.is_empty() && holds(&status.conditions, condition::SUSPENDED));
    observed.status = status;
    observed.job.spec.suspend = false;
    let (status, notes) = step(&observed);
    assert_eq!(
        (status.attempt, status.restarts, status.phase),
        (2, 0, TrainingPhase::Starting)
    );
    assert_eq!(notes[0].reason, reason::RESUMED);
    assert!(!holds(&status.conditions, condition::SUSPENDED));
}

#[test]
fn a_suspended_job_stops_a_pod_that_was_made_after_its_status_was_written() {
    let mut observed = training(json!({"suspend": true}), at_step(40, &[40]));
    let mut next = pod(PodStage::Running);
    (next.attempt, next.name, next.uid) = (2, "critic-train-2".to_owned(), "p2".to_owned());
    observed.pod = None;
    observed.others = vec![next];
    let decision = decided(&observed);
    assert_eq!(decision, Decision::Suspend { stop: false });
    let objects = build::build(&observed, &decision, &fleet(&observed), None, "worker").expect("builds");
    assert_eq!(objects.stop, [("critic-train-2".to_owned(), "p2".to_owned())]);
}

#[test]
fn a_lifetime_beyond_the_calendar_never_ends() {
    let observed = |seconds: i64| training(json!({"ttlSecondsAfterFinished": seconds}), at_step(40, &[40]));
    assert_eq!(ttl::due(&observed(5).job, at(1000)), Some(at(1005)));
    assert_eq!(ttl::due(&observed(i64::MAX).job, at(1000)), None);
}

#[test]
fn a_resumed_run_waits_until_the_old_pod_has_stopped() {
    let mut observed = training(json!({}), at_step(40, &[40]));
    if let Some(pod) = &mut observed.pod {
        pod.terminating = true;
    }
    assert_eq!(decided(&observed), Decision::Watch);
}

#[test]
fn the_deadline_counts_active_time_only() {
    let late = || training(json!({"activeDeadlineSeconds": 400}), at_step(40, &[]));
    assert!(matches!(
        decided(&late()),
        Decision::Fail {
            reason: reason::DEADLINE,
            ..
        }
    ));
    let in_time = training(json!({"activeDeadlineSeconds": 600}), at_step(40, &[]));
    assert_eq!(deadline::ends(&in_time), Some(at(1100)));
    let mut resumed = late();
    crate::conditions::Conditions::new(&mut resumed.status.conditions, None, at(900)).set(
        "Suspended",
        false,
        "Resumed",
        "",
    );
    assert_eq!(deadline::ends(&resumed), Some(at(1300)));
    let mut suspended = late();
    suspended.job.spec.suspend = true;
    assert_eq!(deadline::ends(&suspended), None);
}

#[test]
fn a_job_past_its_deadline_stops_its_pod() {
    let observed = training(json!({"activeDeadlineSeconds": 400}), at_step(40, &[]));
    let objects = build::build(&observed, &decided(&observed), &fleet(&observed), None, "worker").expect("builds");
    assert_eq!(objects.stop, [("critic-train-1".to_owned(), "p1".to_owned())]);
}

#[test]
fn a_finished_job_expires_by_its_completion_time() {
    let mut observed = ended(json!({"ttlSecondsAfterFinished": 60}), 0, at_step(80, &[80]));
    observed.status = step(&observed).0;
    assert_eq!(
        decided(&observed),
        Decision::Rest {
            expires: Some(at(1060))
        }
    );
    observed.now = at(1060);
    assert_eq!(decided(&observed), Decision::Expire);
}

#[test]
fn every_stable_checkpoint_is_registered_once_and_outlives_the_job() {
    let mut observed = training(json!({}), at_step(40, &[20, 40]));
    let registry = checkpoints::plan(&observed);
    let names: Vec<_> = registry
        .register
        .iter()
        .filter_map(|checkpoint| checkpoint.metadata.name.clone())
        .collect();
    assert_eq!(names, ["critic-step-20", "critic-step-40"]);
    assert!(
        registry
            .register
            .iter()
            .all(|checkpoint| checkpoint.metadata.owner_references.is_none())
    );
    observed.checkpoints = vec![checkpoint("critic-step-20", "0123456789", 20, DIGEST)];
    assert_eq!(checkpoints::plan(&observed).register.len(), 1);
}

#[test]
fn checkpoints_that_the_learner_removed_are_forgotten_unless_they_are_served() {
    let mut observed = training(json!({}), at_step(40, &[30, 40]));
    observed.checkpoints = [10, 20, 50]
        .map(|step| checkpoint(&format!("critic-step-{step}"), "0123456789", step, DIGEST))
        .into();
    observed
        .checkpoints
        .push(checkpoint("critic-step-5", "another", 5, DIGEST));
    observed.in_use.insert("critic-step-10".into());
    let forgotten = |observed: &Observed| {
        let forget = checkpoints::plan(observed).forget;
        forget.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
    };
    // 10 is served, 50 is newer than the list, 5 belongs to a deleted namesake.
    assert_eq!(forgotten(&observed), ["critic-step-20"]);
    // A guard that tripped removed what came after the result.
    observed.live = Some(Progress {
        stage: Stage::Completed,
        ..at_step(40, &[30, 40])
    });
    assert_eq!(forgotten(&observed), ["critic-step-20", "critic-step-50"]);
    // A worker that only starts has not looked yet.
    observed.live = Some(Progress {
        stage: Stage::Loading,
        ..at_step(0, &[40])
    });
    assert!(forgotten(&observed).is_empty());
}

#[test]
fn a_checkpoint_that_was_written_again_with_other_bytes_is_registered_again() {
    let mut observed = training(json!({}), at_step(40, &[40]));
    let other = "sha256:1111111111111111111111111111111111111111111111111111111111111111";
    observed.checkpoints = vec![checkpoint("critic-step-40", "0123456789", 40, other)];
    let registry = checkpoints::plan(&observed);
    assert_eq!((registry.register.len(), registry.forget.len()), (1, 1));
    assert_eq!(registry.register[0].spec.digest, DIGEST);
}

#[test]
fn the_checkpoint_of_a_deleted_namesake_keeps_its_name() {
    let mut observed = training(json!({}), at_step(40, &[40]));
    observed.checkpoints = vec![checkpoint("critic-step-40", "another", 40, DIGEST)];
    let registry = checkpoints::plan(&observed);
    assert_eq!(
        registry.register[0].metadata.name.as_deref(),
        Some("critic-step-40-01234567")
    );
    assert_eq!(
        registry.last.map(|last| last.name).as_deref(),
        Some("critic-step-40-01234567")
    );
}

#[test]
fn a_termination_message_that_was_cut_forgets_nothing() {
    let mut cut = at_step(80, &[80]);
    cut.metrics.clear();
    let mut observed = ended(json!({}), 0, cut);
    observed.checkpoints = vec![checkpoint("critic-step-40", "0123456789", 40, DIGEST)];
    assert!(checkpoints::plan(&observed).forget.is_empty());
}

fn any_pod() -> impl Strategy<Value = Option<PodView>> {
    let code = prop_oneof![Just(0), Just(1), Just(78), Just(137), Just(143)];
    let stage = prop_oneof![
        Just(PodStage::Running),
        Just(PodStage::Pending {
            scheduled: true,
            message: None
        }),
        code.prop_map(|code| PodStage::Exited(exit(code, at_step(80, &[80])))),
    ];
    let view = |(stage, terminating)| PodView {
        terminating,
        ..pod(stage)
    };
    proptest::option::of((stage, any::<bool>()).prop_map(view))
}

proptest! {
    #[test]
    fn terminal_states_are_final_and_counters_never_fall(
        pods in proptest::collection::vec((any_pod(), any::<bool>()), 1..30), max_restarts in 0_u32..3,
    ) {
        let mut observed = observed(json!({"failurePolicy": {"maxRestarts": max_restarts}}));
        for (pod, suspend) in pods {
            observed.job.spec.suspend = suspend;
            // Before the first attempt there is no pod to be seen.
            observed.pod = pod.filter(|_| observed.status.attempt > 0);
            observed.now += SignedDuration::from_secs(100);
            let before = observed.status.clone();
            let finished = observed.is_finished();
            let (after, notes) = step(&observed);
            prop_assert!(after.attempt >= before.attempt && after.restarts >= before.restarts);
            prop_assert!(after.restarts <= max_restarts && after.attempt <= before.attempt + 1);
            prop_assert!(!(holds(&after.conditions, "Complete") && holds(&after.conditions, "Failed")));
            if finished {
                prop_assert_eq!(&after.phase, &before.phase);
                prop_assert_eq!(&after.completion_time, &before.completion_time);
                prop_assert!(notes.is_empty());
            }
            observed.status = after;
        }
    }
}
