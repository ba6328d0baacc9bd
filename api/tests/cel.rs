//! The rules that the API server enforces, run here without a cluster: each has a case that passes and one that fails.
#![cfg(feature = "crd")]
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use flotilla_api::{Dataset, ModelCheckpoint, ModelDeployment, TrainingJob};
use serde_json::{Value, json};

fn job(change: impl FnOnce(&mut Value)) -> TrainingJob {
    let mut value = json!({
        "apiVersion": "flotilla.dev/v1alpha1",
        "kind": "TrainingJob",
        "metadata": { "name": "critic", "namespace": "default" },
        "spec": {
            "model": { "trainingJobRef": { "name": "base" } },
            "datasets": [{ "datasetRef": { "name": "pairs" } }],
            "algorithm": { "grpo": { "steps": 10 } },
            "rewards": [{ "rule": "preference", "weight": 0.9 }, { "rule": "format", "weight": 0.1 }],
            "evaluation": {
                "sets": [{ "name": "critic", "datasetRef": { "name": "held-out" } }],
                "guard": { "set": "critic", "maxDrop": 0.05 }
            },
            "checkpoint": { "storage": { "claimName": "data" } }
        }
    });
    change(&mut value);
    serde_json::from_value(value).unwrap()
}

fn refusal<T, E: std::fmt::Display>(result: Result<T, E>) -> String {
    result.err().map(|error| error.to_string()).unwrap_or_default()
}

#[test]
fn a_sound_training_job_passes() {
    job(|_| {}).validate_cel().unwrap();
}

#[test]
fn an_algorithm_has_exactly_one_member() {
    let both = job(|v| v["spec"]["algorithm"]["sft"] = json!({ "steps": 1 }));
    assert!(refusal(both.validate_cel()).contains("algorithm takes exactly one of grpo and sft"));
    let none = job(|v| v["spec"]["algorithm"] = json!({}));
    assert!(refusal(none.validate_cel()).contains("algorithm takes exactly one of grpo and sft"));
}

#[test]
fn a_model_reference_has_exactly_one_member() {
    let both = job(|v| v["spec"]["model"]["uri"] = json!("pvc://data/base"));
    assert!(refusal(both.validate_cel()).contains("exactly one of checkpointRef, trainingJobRef and uri"));
    let seed = job(|v| v["spec"]["model"]["randomSeed"] = json!(1));
    assert!(refusal(seed.validate_cel()).contains("model.randomSeed needs model.uri"));
}

#[test]
fn grpo_needs_rewards_and_sft_takes_none() {
    let grpo = job(|v| v["spec"]["rewards"] = json!([]));
    assert!(refusal(grpo.validate_cel()).contains("grpo needs at least one reward"));
    let sft = job(|v| v["spec"]["algorithm"] = json!({ "sft": { "steps": 1 } }));
    assert!(refusal(sft.validate_cel()).contains("sft takes no rewards"));
}

#[test]
fn grpo_starts_from_trained_weights() {
    let random = job(|v| v["spec"]["model"] = json!({ "uri": "pvc://data/base", "randomSeed": 1 }));
    assert!(refusal(random.validate_cel()).contains("grpo needs trained weights"));
}

#[test]
fn a_guard_names_an_evaluation_set() {
    let other = job(|v| v["spec"]["evaluation"]["guard"]["set"] = json!("policy"));
    assert!(refusal(other.validate_cel()).contains("evaluation.guard.set must be the name of one of evaluation.sets"));
}

#[test]
fn a_name_leaves_room_for_the_names_made_of_it() {
    let long = job(|v| v["metadata"]["name"] = json!("x".repeat(53)));
    assert!(refusal(long.validate_cel()).contains("at most 52 characters"));
}

#[test]
fn what_a_run_is_cannot_change_but_suspend_can() {
    let old = job(|_| {});
    job(|v| v["spec"]["suspend"] = json!(true))
        .validate_cel_update(&old)
        .unwrap();
    for (field, value) in [
        ("algorithm", json!({ "grpo": { "steps": 11 } })),
        ("model", json!({ "uri": "pvc://data/base" })),
        ("datasets", json!([{ "datasetRef": { "name": "other" } }])),
        ("rewards", json!([{ "rule": "format", "weight": 1.0 }])),
        ("seed", json!(7)),
    ] {
        let new = job(|v| v["spec"][field] = value);
        assert!(
            refusal(new.validate_cel_update(&old)).contains(&format!("{field} is immutable")),
            "{field}"
        );
    }
}

fn with_rollout_pods(replicas: u32) -> TrainingJob {
    job(|v| v["spec"]["roles"] = json!({ "rollout": { "replicas": replicas } }))
}

#[test]
fn rollout_pods_are_for_grpo() {
    with_rollout_pods(2).validate_cel().unwrap();
    let sft = |replicas: u32| {
        job(|v| {
            v["spec"]["algorithm"] = json!({ "sft": { "steps": 1 } });
            v["spec"]["rewards"] = json!([]);
            v["spec"]["roles"] = json!({ "rollout": { "replicas": replicas } });
        })
    };
    sft(0).validate_cel().unwrap();
    assert!(refusal(sft(1).validate_cel()).contains("roles.rollout.replicas is for grpo"));
}

#[test]
fn rollout_pods_come_and_go_but_not_where_rollouts_run() {
    let (none, two, nine) = (with_rollout_pods(0), with_rollout_pods(2), with_rollout_pods(9));
    nine.validate_cel_update(&two).unwrap();
    two.validate_cel_update(&nine).unwrap();
    none.validate_cel_update(&job(|_| {})).unwrap();
    assert!(refusal(two.validate_cel_update(&none)).contains("not between none and some"));
    assert!(refusal(none.validate_cel_update(&two)).contains("not between none and some"));
}

fn dataset(change: impl FnOnce(&mut Value)) -> Dataset {
    let mut value = json!({
        "apiVersion": "flotilla.dev/v1alpha1",
        "kind": "Dataset",
        "metadata": { "name": "pairs", "namespace": "default" },
        "spec": {
            "source": { "uri": "pvc://source/pairs.parquet" },
            "conversion": {
                "format": { "preference": { "order": "Both" } },
                "template": { "builtin": "critic-short" }
            },
            "storage": { "claimName": "data" }
        }
    });
    change(&mut value);
    serde_json::from_value(value).unwrap()
}

#[test]
fn a_dataset_has_one_format_one_template_and_never_changes() {
    let old = dataset(|_| {});
    old.validate_cel().unwrap();
    let two = dataset(|v| v["spec"]["conversion"]["format"]["instruction"] = json!({}));
    assert!(refusal(two.validate_cel()).contains("format takes exactly one of"));
    let template = dataset(|v| v["spec"]["conversion"]["template"] = json!({}));
    assert!(refusal(template.validate_cel()).contains("template takes exactly one of"));
    let moved = dataset(|v| v["spec"]["source"]["uri"] = json!("pvc://source/other.parquet"));
    assert!(refusal(moved.validate_cel_update(&old)).contains("source is immutable"));
    let seeded = dataset(|v| v["spec"]["conversion"]["seed"] = json!(3));
    assert!(refusal(seeded.validate_cel_update(&old)).contains("conversion is immutable"));
}

fn checkpoint(change: impl FnOnce(&mut Value)) -> ModelCheckpoint {
    let mut value = json!({
        "apiVersion": "flotilla.dev/v1alpha1",
        "kind": "ModelCheckpoint",
        "metadata": { "name": "critic-step-10", "namespace": "default" },
        "spec": { "uri": "pvc://data/a", "digest": format!("sha256:{}", "0".repeat(64)) }
    });
    change(&mut value);
    serde_json::from_value(value).unwrap()
}

#[test]
fn a_checkpoint_never_changes() {
    let old = checkpoint(|_| {});
    checkpoint(|_| {}).validate_cel_update(&old).unwrap();
    let uri = checkpoint(|v| v["spec"]["uri"] = json!("pvc://data/b"));
    assert!(refusal(uri.validate_cel_update(&old)).contains("uri is immutable"));
    let digest = checkpoint(|v| v["spec"]["digest"] = json!(format!("sha256:{}", "1".repeat(64))));
    assert!(refusal(digest.validate_cel_update(&old)).contains("digest is immutable"));
    let made = checkpoint(|v| v["spec"]["producedBy"] = json!({ "name": "a", "uid": "b", "step": 1 }));
    assert!(refusal(made.validate_cel_update(&old)).contains("producedBy is immutable"));
}

#[test]
fn a_deployment_serves_trained_weights() {
    let value = |model: Value| -> ModelDeployment {
        serde_json::from_value(json!({
            "apiVersion": "flotilla.dev/v1alpha1",
            "kind": "ModelDeployment",
            "metadata": { "name": "critic", "namespace": "default" },
            "spec": { "model": model }
        }))
        .unwrap()
    };
    value(json!({ "checkpointRef": { "name": "a" } }))
        .validate_cel()
        .unwrap();
    let random = value(json!({ "uri": "pvc://data/base", "randomSeed": 3 }));
    assert!(refusal(random.validate_cel()).contains("serves trained weights"));
}

#[test]
fn every_definition_fits_the_annotation_of_a_plain_apply() {
    for (file, crd) in flotilla_api::crd::all() {
        let bytes = serde_json::to_vec(&crd).unwrap().len();
        assert!(bytes < flotilla_api::crd::MAX_CRD_BYTES, "{file} has {bytes} bytes");
        let text = serde_json::to_string(&crd).unwrap();
        assert!(
            !text.contains(r#""additionalProperties":false"#),
            "{file}: the API server forbids this in a structural schema"
        );
    }
}

#[test]
fn models_may_lie_elsewhere_and_data_may_not() {
    let patterns = flotilla_api::crd::all().into_iter().filter_map(|(_, crd)| {
        let crd = serde_json::to_value(&crd).unwrap();
        let spec = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties";
        let kind = crd["spec"]["names"]["kind"].as_str()?.to_owned();
        let place = match kind.as_str() {
            "ModelCheckpoint" => "uri",
            "Dataset" => "source/properties/uri",
            _ => "model/properties/uri",
        };
        let pattern = crd.pointer(&format!("{spec}/{place}/pattern"))?.as_str()?.to_owned();
        Some((kind, regex::Regex::new(&pattern).unwrap()))
    });
    let patterns = patterns.collect::<Vec<_>>();
    assert_eq!(patterns.len(), 4);
    for (kind, pattern) in patterns {
        let is_model = kind != "Dataset";
        for uri in ["pvc://claim/path", "file:///path"] {
            assert!(pattern.is_match(uri), "{kind} {uri}");
        }
        for uri in [
            "hf://org/name",
            "hf://org/name@refs/pr/1",
            "s3://b/p",
            "gs://b/p",
            "az://c/p",
        ] {
            assert_eq!(pattern.is_match(uri), is_model, "{kind} {uri}");
        }
        for uri in [
            "https://host/x",
            "hf://name",
            "hf://org/name/file",
            "s3://",
            "pvc://",
            "model",
        ] {
            assert!(!pattern.is_match(uri), "{kind} {uri}");
        }
    }
}
