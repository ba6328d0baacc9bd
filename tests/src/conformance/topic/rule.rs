//! CEL rules: those of the test kind, and those of Flotilla's own kinds.

use anyhow::ensure;
use serde_json::{Value, json};

use crate::conformance::{answer::Refusal, check::checks, ground::Ground};

checks![
    a_broken_rule_tells_its_message,
    a_rule_may_word_its_message_by_an_expression,
    a_rule_may_name_a_field_and_a_reason,
    a_rule_without_message_is_told_itself,
    all_broken_rules_are_told,
    a_transition_rule_looks_at_updates_only,
    an_immutable_field_may_be_set_once,
    rules_see_defaults,
    rules_hold_for_applies_and_patches,
    the_status_is_not_held_to_rules_of_the_spec,
    a_training_job_takes_one_algorithm,
    a_training_job_keeps_what_is_immutable,
    a_training_job_needs_rewards_for_grpo,
    a_training_job_gets_its_defaults,
    a_name_that_is_too_long_for_pods_is_refused,
    a_dataset_takes_one_format,
];

async fn refused(at: &Ground, spec: &Value) -> anyhow::Result<Refusal> {
    at.post("widgets", &at.widget("a", spec)).await?.refused(422, "Invalid")
}

async fn a_broken_rule_tells_its_message(at: &Ground) -> anyhow::Result<()> {
    let refusal = refused(at, &json!({"size": 11})).await?;
    let start = format!("Widget.{} \"a\" is invalid: spec: Invalid value: ", at.server.group);
    ensure!(refusal.message().starts_with(&start), "{}", refusal.message());
    ensure!(
        refusal.message().ends_with(": a widget has at most ten"),
        "{}",
        refusal.message()
    );
    let causes = &refusal.status["details"]["causes"];
    ensure!(causes.as_array().is_some_and(|causes| causes.len() == 1));
    ensure!(causes[0]["field"] == "spec" && causes[0]["reason"] == "FieldValueInvalid");
    Ok(())
}

async fn a_rule_may_word_its_message_by_an_expression(at: &Ground) -> anyhow::Result<()> {
    refused(at, &json!({"size": 7})).await?.mentions("seven is unlucky")?;
    Ok(())
}

async fn a_rule_may_name_a_field_and_a_reason(at: &Ground) -> anyhow::Result<()> {
    refused(at, &json!({"size": 7}))
        .await?
        .says(&format!(
            "Widget.{} \"a\" is invalid: spec.size: Forbidden: seven is unlucky",
            at.server.group
        ))?
        .cause("spec.size", "FieldValueForbidden", "Forbidden: seven is unlucky")?;
    Ok(())
}

async fn a_rule_without_message_is_told_itself(at: &Ground) -> anyhow::Result<()> {
    refused(at, &json!({"size": 1, "replicas": 2}))
        .await?
        .mentions("failed rule: !has(self.replicas) || self.replicas <= self.size")?;
    Ok(())
}

async fn all_broken_rules_are_told(at: &Ground) -> anyhow::Result<()> {
    refused(at, &json!({"size": 11, "replicas": 12}))
        .await?
        .mentions("a widget has at most ten")?
        .mentions("failed rule: ")?;
    Ok(())
}

async fn a_transition_rule_looks_at_updates_only(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 5})).await?;
    at.merge("widgets/a", &json!({"spec": {"size": 6}})).await?.ok()?;
    at.merge("widgets/a", &json!({"spec": {"size": 4}}))
        .await?
        .refused(422, "Invalid")?
        .mentions("a widget does not shrink")?;
    Ok(())
}

async fn an_immutable_field_may_be_set_once(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 5})).await?;
    at.merge("widgets/a", &json!({"spec": {"once": "x"}})).await?.ok()?;
    at.merge("widgets/a", &json!({"spec": {"once": "y"}}))
        .await?
        .refused(422, "Invalid")?
        .says(&format!(
            "Widget.{} \"a\" is invalid: spec.once: Invalid value: \"y\": once is immutable",
            at.server.group
        ))?
        .cause(
            "spec.once",
            "FieldValueInvalid",
            "Invalid value: \"y\": once is immutable",
        )?;
    Ok(())
}

async fn rules_see_defaults(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    at.patch(
        crate::conformance::ground::PatchKind::Json,
        "widgets/a",
        &json!([{"op": "replace", "path": "/spec/replicas", "value": 2}]),
    )
    .await?
    .refused(422, "Invalid")?
    .mentions("failed rule")?;
    Ok(())
}

async fn rules_hold_for_applies_and_patches(at: &Ground) -> anyhow::Result<()> {
    at.apply("one", "widgets/a", &at.widget("a", &json!({"size": 11})))
        .await?
        .refused(422, "Invalid")?
        .mentions("a widget has at most ten")?;
    at.new_widget("a", &json!({"size": 1})).await?;
    at.merge("widgets/a", &json!({"spec": {"size": 11}}))
        .await?
        .refused(422, "Invalid")?
        .mentions("a widget has at most ten")?;
    Ok(())
}

async fn the_status_is_not_held_to_rules_of_the_spec(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    let after = at
        .merge(
            "widgets/a/status",
            &json!({"spec": {"size": 11}, "status": {"phase": "x"}}),
        )
        .await?
        .ok()?;
    ensure!(after["spec"]["size"] == 1 && after["status"]["phase"] == "x");
    Ok(())
}

fn job(at: &Ground, name: &str) -> Value {
    json!({"apiVersion": format!("{}/v1alpha1", at.server.group), "kind": "TrainingJob", "metadata": {"name": name},
        "spec": {"model": {"uri": "pvc://data/base"}, "datasets": [{"datasetRef": {"name": "d"}}],
            "algorithm": {"sft": {"steps": 1}}, "checkpoint": {"storage": {"claimName": "data"}}}})
}

async fn a_training_job_takes_one_algorithm(at: &Ground) -> anyhow::Result<()> {
    let mut job = job(at, "a");
    job["spec"]["algorithm"] = json!({"sft": {"steps": 1}, "grpo": {"steps": 1}});
    at.post("trainingjobs", &job)
        .await?
        .refused(422, "Invalid")?
        .mentions("spec.algorithm: Invalid value: ")?
        .mentions("algorithm takes exactly one of grpo and sft")?;
    Ok(())
}

async fn a_training_job_keeps_what_is_immutable(at: &Ground) -> anyhow::Result<()> {
    at.post("trainingjobs", &job(at, "a")).await?.created()?;
    at.merge("trainingjobs/a", &json!({"spec": {"suspend": true}}))
        .await?
        .ok()?;
    at.merge(
        "trainingjobs/a",
        &json!({"spec": {"model": {"uri": "pvc://data/other"}}}),
    )
    .await?
    .refused(422, "Invalid")?
    .mentions("model is immutable")?;
    Ok(())
}

async fn a_training_job_needs_rewards_for_grpo(at: &Ground) -> anyhow::Result<()> {
    let mut job = job(at, "a");
    job["spec"]["algorithm"] = json!({"grpo": {"steps": 1}});
    at.post("trainingjobs", &job)
        .await?
        .refused(422, "Invalid")?
        .mentions("grpo needs at least one reward")?;
    Ok(())
}

async fn a_training_job_gets_its_defaults(at: &Ground) -> anyhow::Result<()> {
    let made = at.post("trainingjobs", &job(at, "a")).await?.created()?;
    ensure!(made["spec"]["suspend"] == false && made["metadata"]["generation"] == 1);
    ensure!(
        made["spec"]["algorithm"]["sft"]
            .as_object()
            .is_some_and(|sft| !sft.is_empty())
    );
    Ok(())
}

async fn a_name_that_is_too_long_for_pods_is_refused(at: &Ground) -> anyhow::Result<()> {
    at.post("trainingjobs", &job(at, &"a".repeat(53)))
        .await?
        .refused(422, "Invalid")?
        .mentions("<nil>: Invalid value: ")?
        .mentions("the name may have at most 52 characters: pods and checkpoints are named after it")?;
    Ok(())
}

async fn a_dataset_takes_one_format(at: &Ground) -> anyhow::Result<()> {
    let dataset = json!({"apiVersion": format!("{}/v1alpha1", at.server.group), "kind": "Dataset",
        "metadata": {"name": "a"}, "spec": {"source": {"uri": "pvc://data/d"}, "storage": {"claimName": "data"},
            "conversion": {"format": {"preference": {}, "instruction": {}}}}});
    at.post("datasets", &dataset)
        .await?
        .refused(422, "Invalid")?
        .mentions("format takes exactly one of preference, exactMatch and instruction")?;
    Ok(())
}
