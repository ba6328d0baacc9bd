//! `dryRun=All`: everything happens but the write.

use anyhow::ensure;
use serde_json::json;

use crate::conformance::{
    check::checks,
    ground::{Ground, config_map},
};

checks![
    a_dry_create_shows_the_object_and_keeps_nothing,
    a_dry_create_is_validated,
    a_dry_create_of_a_taken_name_already_exists,
    a_dry_update_shows_the_change_and_keeps_nothing,
    a_dry_apply_shows_owners_and_conflicts,
    a_dry_deletion_deletes_nothing,
    an_unknown_dry_run_is_refused,
];

async fn a_dry_create_shows_the_object_and_keeps_nothing(at: &Ground) -> anyhow::Result<()> {
    let made = at
        .post("widgets?dryRun=All", &at.widget("a", &json!({"size": 1})))
        .await?
        .created()?;
    ensure!(made["spec"]["replicas"] == 1 && made["metadata"]["uid"].is_string());
    ensure!(made["metadata"]["resourceVersion"].is_null() && made["metadata"]["managedFields"].is_array());
    ensure!(at.get("widgets/a").await?.code == 404);
    Ok(())
}

async fn a_dry_create_is_validated(at: &Ground) -> anyhow::Result<()> {
    at.post("widgets?dryRun=All", &at.widget("a", &json!({"size": 11})))
        .await?
        .refused(422, "Invalid")?
        .mentions("a widget has at most ten")?;
    Ok(())
}

async fn a_dry_create_of_a_taken_name_already_exists(at: &Ground) -> anyhow::Result<()> {
    at.map("a", &json!({})).await?;
    at.post("configmaps?dryRun=All", &config_map("a", &json!({})))
        .await?
        .refused(409, "AlreadyExists")?;
    Ok(())
}

async fn a_dry_update_shows_the_change_and_keeps_nothing(at: &Ground) -> anyhow::Result<()> {
    let made = at.new_widget("a", &json!({"size": 1})).await?;
    let after = at
        .merge("widgets/a?dryRun=All", &json!({"spec": {"size": 2}}))
        .await?
        .ok()?;
    ensure!(after["spec"]["size"] == 2 && after["metadata"]["generation"] == 2);
    ensure!(after["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]);
    ensure!(at.get("widgets/a").await?.ok()? == made);
    Ok(())
}

async fn a_dry_apply_shows_owners_and_conflicts(at: &Ground) -> anyhow::Result<()> {
    let one = at.widget("a", &json!({"size": 1}));
    at.apply("one", "widgets/a?dryRun=All", &one).await?.created()?;
    ensure!(at.get("widgets/a").await?.code == 404);
    at.apply("one", "widgets/a", &one).await?.created()?;
    at.apply("two", "widgets/a?dryRun=All", &at.widget("a", &json!({"size": 2})))
        .await?
        .refused(409, "Conflict")?;
    Ok(())
}

async fn a_dry_deletion_deletes_nothing(at: &Ground) -> anyhow::Result<()> {
    at.map("a", &json!({})).await?;
    at.delete_with("configmaps/a", &json!({"dryRun": ["All"]}))
        .await?
        .ok()?;
    at.delete("configmaps/a?dryRun=All").await?.ok()?;
    ensure!(at.get("configmaps/a").await?.code == 200);
    Ok(())
}

async fn an_unknown_dry_run_is_refused(at: &Ground) -> anyhow::Result<()> {
    at.post("configmaps?dryRun=Some", &config_map("a", &json!({})))
        .await?
        .refused(422, "Invalid")?
        .says(
            "CreateOptions.meta.k8s.io \"\" is invalid: dryRun: Unsupported value: [\"Some\"]: supported values: \"All\"",
        )?;
    Ok(())
}
