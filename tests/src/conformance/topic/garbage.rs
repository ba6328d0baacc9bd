//! Garbage collection by owner references.

use anyhow::ensure;
use serde_json::{Value, json};

use crate::conformance::{
    check::checks,
    ground::{Ground, config_map},
};

checks![
    background_takes_dependents_after_their_owner,
    foreground_takes_dependents_before_their_owner,
    foreground_waits_for_dependents_that_block,
    orphans_stay_and_forget_their_owner,
    a_dependent_of_nothing_is_collected,
    a_dependent_stays_while_one_owner_is_left,
    garbage_is_collected_level_by_level,
    a_custom_owner_takes_built_in_dependents_along,
];

fn owned(name: &str, owners: &[&Value]) -> Value {
    let mut map = config_map(name, &json!({}));
    let reference = |owner: &&Value| {
        json!({"apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"], "blockOwnerDeletion": true})
    };
    map["metadata"]["ownerReferences"] = owners.iter().map(reference).collect();
    map
}

async fn background_takes_dependents_after_their_owner(at: &Ground) -> anyhow::Result<()> {
    let owner = at.map("owner", &json!({})).await?;
    at.post("configmaps", &owned("a", &[&owner])).await?.created()?;
    at.delete_with("configmaps/owner", &json!({"propagationPolicy": "Background"}))
        .await?
        .ok()?;
    ensure!(at.get("configmaps/owner").await?.code == 404);
    at.is_gone("configmaps/a").await
}

async fn foreground_takes_dependents_before_their_owner(at: &Ground) -> anyhow::Result<()> {
    let owner = at.map("owner", &json!({})).await?;
    at.post("configmaps", &owned("a", &[&owner])).await?.created()?;
    let marked = at
        .delete_with("configmaps/owner", &json!({"propagationPolicy": "Foreground"}))
        .await?
        .ok()?;
    ensure!(marked["metadata"]["finalizers"] == json!(["foregroundDeletion"]));
    at.is_gone("configmaps/owner").await?;
    ensure!(at.get("configmaps/a").await?.code == 404);
    Ok(())
}

async fn foreground_waits_for_dependents_that_block(at: &Ground) -> anyhow::Result<()> {
    let owner = at.map("owner", &json!({})).await?;
    let mut held = owned("a", &[&owner]);
    held["metadata"]["finalizers"] = json!(["example.dev/x"]);
    at.post("configmaps", &held).await?.created()?;
    at.delete_with("configmaps/owner", &json!({"propagationPolicy": "Foreground"}))
        .await?
        .ok()?;
    at.until("configmaps/a", |map| map["metadata"]["deletionTimestamp"].is_string())
        .await?;
    ensure!(at.get("configmaps/owner").await?.code == 200);
    at.merge("configmaps/a", &json!({"metadata": {"finalizers": null}}))
        .await?
        .ok()?;
    at.is_gone("configmaps/owner").await
}

async fn orphans_stay_and_forget_their_owner(at: &Ground) -> anyhow::Result<()> {
    let owner = at.map("owner", &json!({})).await?;
    at.post("configmaps", &owned("a", &[&owner])).await?.created()?;
    at.delete_with("configmaps/owner", &json!({"propagationPolicy": "Orphan"}))
        .await?
        .ok()?;
    at.is_gone("configmaps/owner").await?;
    ensure!(at.get("configmaps/a").await?.ok()?["metadata"]["ownerReferences"].is_null());
    Ok(())
}

async fn a_dependent_of_nothing_is_collected(at: &Ground) -> anyhow::Result<()> {
    let mut owner = config_map("never", &json!({}));
    owner["metadata"]["uid"] = json!("00000000-0000-0000-0000-000000000000");
    at.post("configmaps", &owned("a", &[&owner])).await?.created()?;
    at.is_gone("configmaps/a").await
}

async fn a_dependent_stays_while_one_owner_is_left(at: &Ground) -> anyhow::Result<()> {
    let (one, two) = (at.map("one", &json!({})).await?, at.map("two", &json!({})).await?);
    at.post("configmaps", &owned("a", &[&one, &two])).await?.created()?;
    at.delete("configmaps/one").await?.ok()?;
    let left = at
        .until("configmaps/a", |map| {
            map["metadata"]["ownerReferences"]
                .as_array()
                .is_some_and(|owners| owners.len() == 1)
        })
        .await?;
    ensure!(left["metadata"]["ownerReferences"][0]["name"] == "two");
    at.delete("configmaps/two").await?.ok()?;
    at.is_gone("configmaps/a").await
}

async fn garbage_is_collected_level_by_level(at: &Ground) -> anyhow::Result<()> {
    let owner = at.map("owner", &json!({})).await?;
    let child = at.post("configmaps", &owned("a", &[&owner])).await?.created()?;
    at.post("configmaps", &owned("b", &[&child])).await?.created()?;
    at.delete("configmaps/owner").await?.ok()?;
    at.is_gone("configmaps/b").await
}

async fn a_custom_owner_takes_built_in_dependents_along(at: &Ground) -> anyhow::Result<()> {
    let owner = at.new_widget("owner", &json!({"size": 1})).await?;
    at.post("configmaps", &owned("a", &[&owner])).await?.created()?;
    at.delete("widgets/owner").await?.ok()?;
    at.is_gone("configmaps/a").await
}
