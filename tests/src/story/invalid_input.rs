//! What the API server refuses before the operator sees it, and the words with which it does.

use anyhow::Context;
use flotilla_api::TrainingJob;
use kube::{
    Api,
    api::{PatchParams, PostParams},
};
use serde_json::{Value, json};

use crate::fleet::Fleet;

/// A job without a flaw.
fn job() -> Value {
    json!({
        "apiVersion": "flotilla.dev/v1alpha1",
        "kind": "TrainingJob",
        "metadata": {"name": "invalid"},
        "spec": {
            "model": {"uri": "pvc://models/base"},
            "datasets": [{"datasetRef": {"name": "pairs"}}],
            "algorithm": {"grpo": {"steps": 10}},
            "rewards": [{"rule": "preference", "weight": 1.0}],
            "checkpoint": {"storage": {"claimName": "models"}},
        },
    })
}

/// A flaw, and what the refusal must say.
type Flaw = (&'static str, fn(&mut Value), &'static str);

const FLAWS: [Flaw; 6] = [
    (
        "no reward",
        |job| job["spec"]["rewards"] = json!([]),
        "grpo needs at least one reward",
    ),
    (
        "two algorithms",
        |job| job["spec"]["algorithm"]["sft"] = json!({"steps": 1}),
        "algorithm takes exactly one of grpo and sft",
    ),
    (
        "random weights",
        |job| job["spec"]["model"]["randomSeed"] = json!(1),
        "grpo needs trained weights",
    ),
    (
        "a name that pods cannot bear",
        |job| job["metadata"]["name"] = json!("a".repeat(60)),
        "at most 52 characters",
    ),
    (
        "a guard of no set",
        |job| {
            job["spec"]["evaluation"] =
                json!({"sets": [{"name": "a", "datasetRef": {"name": "d"}}], "guard": {"set": "b", "maxDrop": 0.1}});
        },
        "evaluation.guard.set must be the name of one of evaluation.sets",
    ),
    (
        "a word for a number",
        |job| job["spec"]["seed"] = json!("one"),
        "spec.seed",
    ),
];

/// Each flaw is refused with 422 and its own words; an unknown field under strict validation with 400 and its name.
pub async fn invalid_input(fleet: &Fleet) -> anyhow::Result<()> {
    let client = fleet.client().await?;
    let jobs: Api<TrainingJob> = Api::default_namespaced(client.clone());
    let kind = kube::api::ApiResource::erase::<TrainingJob>(&());
    let untyped: Api<kube::core::DynamicObject> = Api::default_namespaced_with(client, &kind);
    let params = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    untyped
        .create(&params, &serde_json::from_value(job())?)
        .await
        .context("the job without a flaw")?;
    for (what, flaw, words) in FLAWS {
        let mut job = job();
        flaw(&mut job);
        let refusal = untyped.create(&params, &serde_json::from_value(job)?).await;
        let Err(kube::Error::Api(status)) = refusal else {
            anyhow::bail!("{what} was not refused: {refusal:?}");
        };
        assert_eq!((status.code, status.reason.as_str()), (422, "Invalid"), "{what}");
        assert!(status.message.contains(words), "{what}: {}", status.message);
    }

    let mut unknown = job();
    unknown["spec"]["sed"] = json!(1);
    let strict = PatchParams::apply("story").validation_strict();
    let refusal = untyped
        .patch("invalid", &strict, &kube::api::Patch::Apply(&unknown))
        .await;
    let Err(kube::Error::Api(status)) = refusal else {
        anyhow::bail!("an unknown field was not refused: {refusal:?}");
    };
    assert!(status.message.contains(".spec.sed"), "{}", status.message);
    assert!(jobs.get_opt("invalid").await?.is_none(), "nothing was stored");
    Ok(())
}
