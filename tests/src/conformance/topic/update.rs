//! PUT and the rules of resourceVersion.

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::conformance::{
    check::checks,
    ground::{Ground, config_map},
};

checks![
    an_update_of_a_built_in_kind_needs_no_version,
    an_update_of_a_custom_resource_needs_a_version,
    an_update_from_a_stale_version_conflicts,
    an_update_that_changes_nothing_writes_nothing,
    each_write_has_a_greater_version,
    an_update_of_nothing_is_not_found,
    an_update_may_make_a_lease,
    an_update_under_another_name_is_refused,
    an_update_of_another_uid_conflicts,
    an_update_cannot_move_the_creation,
    an_update_keeps_what_only_the_server_sets,
    a_version_that_is_no_number_is_refused,
    an_empty_list_of_managed_fields_resets_them,
    an_update_cannot_delete,
];

async fn an_update_of_a_built_in_kind_needs_no_version(at: &Ground) -> anyhow::Result<()> {
    at.map("a", &json!({"k": "1"})).await?;
    let new = at
        .put("configmaps/a", &config_map("a", &json!({"k": "2"})))
        .await?
        .ok()?;
    ensure!(new["data"]["k"] == "2");
    Ok(())
}

async fn an_update_of_a_custom_resource_needs_a_version(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    at.put("widgets/a", &at.widget("a", &json!({"size": 2})))
        .await?
        .refused(422, "Invalid")?
        .says(&format!(
            "widgets.{} \"a\" is invalid: metadata.resourceVersion: Invalid value: 0: must be specified for an update",
            at.server.group
        ))?;
    Ok(())
}

async fn an_update_from_a_stale_version_conflicts(at: &Ground) -> anyhow::Result<()> {
    let mut first = at.map("a", &json!({"k": "1"})).await?;
    at.merge("configmaps/a", &json!({"data": {"k": "2"}})).await?.ok()?;
    first["data"]["k"] = json!("3");
    at.put("configmaps/a", &first)
        .await?
        .refused(409, "Conflict")?
        .says(
            "Operation cannot be fulfilled on configmaps \"a\": the object has been modified; please apply your \
             changes to the latest version and try again",
        )?
        .about("", "configmaps", "a")?;
    Ok(())
}

async fn an_update_that_changes_nothing_writes_nothing(at: &Ground) -> anyhow::Result<()> {
    let first = at.map("a", &json!({"k": "1"})).await?;
    let same = at.put("configmaps/a", &first).await?.ok()?;
    ensure!(same["metadata"] == first["metadata"]);
    let first = at.new_widget("a", &json!({"size": 1})).await?;
    let same = at.put("widgets/a", &first).await?.ok()?;
    ensure!(same["metadata"] == first["metadata"]);
    Ok(())
}

async fn each_write_has_a_greater_version(at: &Ground) -> anyhow::Result<()> {
    let number = |object: &Value| {
        let text = object["metadata"]["resourceVersion"].as_str();
        text.and_then(|text| text.parse::<u64>().ok()).context("a version")
    };
    let first = number(&at.map("a", &json!({"k": "1"})).await?)?;
    let other = number(&at.map("b", &json!({})).await?)?;
    let second = number(&at.merge("configmaps/a", &json!({"data": {"k": "2"}})).await?.ok()?)?;
    ensure!(first < other && other < second);
    ensure!(number(&at.get("configmaps/a").await?.ok()?)? == second);
    Ok(())
}

async fn an_update_of_nothing_is_not_found(at: &Ground) -> anyhow::Result<()> {
    at.put("configmaps/a", &config_map("a", &json!({})))
        .await?
        .refused(404, "NotFound")?
        .says("configmaps \"a\" not found")?;
    let mut widget = at.widget("a", &json!({"size": 1}));
    widget["metadata"]["resourceVersion"] = json!("1");
    at.put("widgets/a", &widget).await?.refused(404, "NotFound")?;
    Ok(())
}

async fn an_update_may_make_a_lease(at: &Ground) -> anyhow::Result<()> {
    let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "a"},
        "spec": {"holderIdentity": "me"}});
    let made = at.put("leases/a", &lease).await?.created()?;
    ensure!(made["spec"]["holderIdentity"] == "me");
    Ok(())
}

async fn an_update_under_another_name_is_refused(at: &Ground) -> anyhow::Result<()> {
    at.map("a", &json!({})).await?;
    at.put("configmaps/a", &config_map("b", &json!({})))
        .await?
        .refused(400, "BadRequest")?
        .says("the name of the object (b) does not match the name on the URL (a)")?;
    Ok(())
}

async fn an_update_of_another_uid_conflicts(at: &Ground) -> anyhow::Result<()> {
    let mut made = at.map("a", &json!({})).await?;
    let uid = made["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
    made["metadata"]["uid"] = json!("other");
    at.put("configmaps/a", &made)
        .await?
        .refused(409, "Conflict")?
        .mentions(&format!(
            "Precondition failed: UID in precondition: other, UID in object meta: {uid}"
        ))?;
    Ok(())
}

async fn an_update_cannot_move_the_creation(at: &Ground) -> anyhow::Result<()> {
    let mut made = at.map("a", &json!({})).await?;
    let time = made["metadata"]["creationTimestamp"].clone();
    made["metadata"]["creationTimestamp"] = json!("2001-01-01T00:00:00Z");
    let after = at.put("configmaps/a", &made).await?.ok()?;
    ensure!(after["metadata"]["creationTimestamp"] == time);
    Ok(())
}

async fn an_update_keeps_what_only_the_server_sets(at: &Ground) -> anyhow::Result<()> {
    let made = at.new_widget("a", &json!({"size": 1})).await?;
    let mut bare = at.widget("a", &json!({"size": 2}));
    bare["metadata"]["resourceVersion"] = made["metadata"]["resourceVersion"].clone();
    let after = at.put("widgets/a", &bare).await?.ok()?;
    for field in ["uid", "creationTimestamp", "namespace"] {
        ensure!(after["metadata"][field] == made["metadata"][field], "{field}");
    }
    ensure!(after["metadata"]["deletionTimestamp"].is_null() && after["metadata"]["generation"] == 2);
    Ok(())
}

async fn a_version_that_is_no_number_is_refused(at: &Ground) -> anyhow::Result<()> {
    let mut made = at.map("a", &json!({})).await?;
    made["metadata"]["resourceVersion"] = json!("new");
    at.put("configmaps/a", &made)
        .await?
        .refused(500, "")?
        .says("strconv.ParseUint: parsing \"new\": invalid syntax")?;
    Ok(())
}

async fn an_update_cannot_delete(at: &Ground) -> anyhow::Result<()> {
    let mut made = at.new_widget("a", &json!({"size": 1})).await?;
    made["metadata"]["deletionTimestamp"] = json!("2001-01-01T00:00:00Z");
    at.put("widgets/a", &made)
        .await?
        .refused(422, "Invalid")?
        .mentions("metadata.deletionTimestamp: Invalid value: \"2001-01-01T00:00:00Z\": field is immutable")?;
    Ok(())
}

async fn an_empty_list_of_managed_fields_resets_them(at: &Ground) -> anyhow::Result<()> {
    let mut made = at.map("a", &json!({"k": "v"})).await?;
    made["metadata"]["managedFields"] = json!([{}]);
    let after = at.put("configmaps/a", &made).await?.ok()?;
    ensure!(after["metadata"]["managedFields"].is_null());
    Ok(())
}
