//! JSON, merge and strategic merge patches.

use anyhow::ensure;
use serde_json::json;

use crate::conformance::{
    check::checks,
    ground::{Ground, PatchKind, pod},
};

checks![
    a_json_patch_is_applied_in_order,
    a_json_patch_whose_test_fails_changes_nothing,
    a_json_patch_of_a_missing_path_is_refused,
    a_json_patch_that_is_none_is_refused,
    a_merge_patch_sets_and_deletes,
    a_merge_patch_replaces_lists,
    a_merge_patch_that_is_no_object_is_refused,
    a_strategic_patch_merges_lists_by_key,
    a_strategic_patch_deletes_by_directive,
    a_strategic_patch_replaces_by_directive,
    a_strategic_patch_of_a_custom_resource_is_refused,
    an_unknown_kind_of_patch_is_refused,
    a_patch_of_a_stale_version_conflicts,
    a_patch_of_another_uid_is_refused,
    a_patch_cannot_rename,
    a_patch_of_nothing_is_not_found,
    a_patch_that_changes_nothing_writes_nothing,
];

async fn a_json_patch_is_applied_in_order(at: &Ground) -> anyhow::Result<()> {
    at.map("a", &json!({"x": "1", "y": "2"})).await?;
    let patch = json!([{"op": "test", "path": "/data/x", "value": "1"}, {"op": "add", "path": "/data/z", "value": "3"},
        {"op": "move", "from": "/data/y", "path": "/data/w"}, {"op": "replace", "path": "/data/x", "value": "9"},
        {"op": "copy", "from": "/data/x", "path": "/data/v"}, {"op": "remove", "path": "/data/z"}]);
    let after = at.patch(PatchKind::Json, "configmaps/a", &patch).await?.ok()?;
    ensure!(after["data"] == json!({"x": "9", "w": "2", "v": "9"}));
    Ok(())
}

async fn a_json_patch_whose_test_fails_changes_nothing(at: &Ground) -> anyhow::Result<()> {
    let before = at.map("a", &json!({"x": "1"})).await?;
    let patch =
        json!([{"op": "add", "path": "/data/y", "value": "1"}, {"op": "test", "path": "/data/x", "value": "2"}]);
    at.patch(PatchKind::Json, "configmaps/a", &patch)
        .await?
        .refused(422, "Invalid")?
        .says("the server rejected our request due to an error in our request")?;
    ensure!(at.get("configmaps/a").await?.ok()? == before);
    Ok(())
}

async fn a_json_patch_of_a_missing_path_is_refused(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    for operation in [
        json!({"op": "remove", "path": "/spec/nothing"}),
        json!({"op": "add", "path": "/nothing/here", "value": 1}),
    ] {
        at.patch(PatchKind::Json, "widgets/a", &json!([operation]))
            .await?
            .refused(422, "Invalid")?;
    }
    Ok(())
}

async fn a_json_patch_that_is_none_is_refused(at: &Ground) -> anyhow::Result<()> {
    at.map("a", &json!({})).await?;
    at.patch(PatchKind::Json, "configmaps/a", &json!({"data": {}}))
        .await?
        .refused(400, "BadRequest")?
        .mentions("error decoding patch")?;
    Ok(())
}

async fn a_merge_patch_sets_and_deletes(at: &Ground) -> anyhow::Result<()> {
    at.map("a", &json!({"x": "1", "y": "2"})).await?;
    let after = at
        .merge("configmaps/a", &json!({"data": {"x": null, "z": "3"}}))
        .await?
        .ok()?;
    ensure!(after["data"] == json!({"y": "2", "z": "3"}));
    Ok(())
}

async fn a_merge_patch_replaces_lists(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1, "ports": [{"name": "x"}, {"name": "y"}]}))
        .await?;
    let after = at
        .merge("widgets/a", &json!({"spec": {"ports": [{"name": "z", "port": 1}]}}))
        .await?
        .ok()?;
    ensure!(after["spec"]["ports"] == json!([{"name": "z", "port": 1, "protocol": "TCP"}]));
    Ok(())
}

async fn a_merge_patch_that_is_no_object_is_refused(at: &Ground) -> anyhow::Result<()> {
    at.map("a", &json!({})).await?;
    at.merge("configmaps/a", &json!([1]))
        .await?
        .refused(400, "BadRequest")?;
    Ok(())
}

async fn a_strategic_patch_merges_lists_by_key(at: &Ground) -> anyhow::Result<()> {
    at.takes_pods().await?;
    let mut two = pod("a");
    two["spec"]["containers"] = json!([{"name": "c", "image": "i:1"}, {"name": "d", "image": "i:1"}]);
    at.post("pods", &two).await?.created()?;
    let patch = json!({"spec": {"containers": [{"name": "d", "image": "i:2"}]}});
    let after = at.patch(PatchKind::Strategic, "pods/a", &patch).await?.ok()?;
    let images: Vec<_> = after["spec"]["containers"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|container| json!([container["name"], container["image"]]))
        .collect();
    ensure!(images == [json!(["c", "i:1"]), json!(["d", "i:2"])]);
    Ok(())
}

async fn a_strategic_patch_deletes_by_directive(at: &Ground) -> anyhow::Result<()> {
    let body = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "a"},
        "secrets": [{"name": "x"}, {"name": "y"}]});
    at.post("serviceaccounts", &body).await?.created()?;
    let patch = json!({"secrets": [{"$patch": "delete", "name": "x"}, {"name": "z"}]});
    let after = at
        .patch(PatchKind::Strategic, "serviceaccounts/a", &patch)
        .await?
        .ok()?;
    ensure!(
        after["secrets"] == json!([{"name": "z"}, {"name": "y"}])
            || after["secrets"] == json!([{"name": "y"}, {"name": "z"}])
    );
    Ok(())
}

async fn a_strategic_patch_replaces_by_directive(at: &Ground) -> anyhow::Result<()> {
    at.map("a", &json!({"x": "1", "y": "2"})).await?;
    let patch = json!({"data": {"$patch": "replace", "z": "3"}});
    let after = at.patch(PatchKind::Strategic, "configmaps/a", &patch).await?.ok()?;
    ensure!(after["data"] == json!({"z": "3"}));
    Ok(())
}

async fn a_strategic_patch_of_a_custom_resource_is_refused(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    at.patch(PatchKind::Strategic, "widgets/a", &json!({"spec": {"size": 2}}))
        .await?
        .refused(415, "UnsupportedMediaType")?
        .mentions(
            "the body of the request was in an unknown format - accepted media types include: \
             application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml",
        )?;
    Ok(())
}

async fn an_unknown_kind_of_patch_is_refused(at: &Ground) -> anyhow::Result<()> {
    at.map("a", &json!({})).await?;
    at.send(
        "PATCH",
        "configmaps/a",
        &[("content-type", "application/json")],
        Some(b"{}".to_vec()),
    )
    .await?
    .refused(415, "UnsupportedMediaType")?;
    Ok(())
}

async fn a_patch_of_a_stale_version_conflicts(at: &Ground) -> anyhow::Result<()> {
    let first = at.map("a", &json!({"k": "1"})).await?;
    at.merge("configmaps/a", &json!({"data": {"k": "2"}})).await?.ok()?;
    let version = &first["metadata"]["resourceVersion"];
    at.merge(
        "configmaps/a",
        &json!({"metadata": {"resourceVersion": version}, "data": {"k": "3"}}),
    )
    .await?
    .refused(409, "Conflict")?
    .mentions("the object has been modified")?;
    Ok(())
}

async fn a_patch_of_another_uid_is_refused(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    at.merge("widgets/a", &json!({"metadata": {"uid": "other"}, "spec": {"size": 2}}))
        .await?
        .refused(422, "Invalid")?
        .mentions("metadata.uid: Invalid value: \"other\": field is immutable")?;
    Ok(())
}

async fn a_patch_cannot_rename(at: &Ground) -> anyhow::Result<()> {
    at.map("a", &json!({})).await?;
    at.merge("configmaps/a", &json!({"metadata": {"name": "b"}}))
        .await?
        .refused(400, "BadRequest")?
        .says("the name of the object (b) does not match the name on the URL (a)")?;
    Ok(())
}

async fn a_patch_of_nothing_is_not_found(at: &Ground) -> anyhow::Result<()> {
    at.merge("widgets/a", &json!({"spec": {"size": 2}}))
        .await?
        .refused(404, "NotFound")?
        .says(&format!("widgets.{} \"a\" not found", at.server.group))?;
    Ok(())
}

async fn a_patch_that_changes_nothing_writes_nothing(at: &Ground) -> anyhow::Result<()> {
    let first = at.new_widget("a", &json!({"size": 1})).await?;
    let same = at.merge("widgets/a", &json!({"spec": {"size": 1}})).await?.ok()?;
    ensure!(same["metadata"] == first["metadata"]);
    Ok(())
}
