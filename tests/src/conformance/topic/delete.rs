//! DELETE, its preconditions, and finalizers.

use anyhow::ensure;
use serde_json::json;

use crate::conformance::{
    check::checks,
    ground::{Ground, config_map},
};

checks![
    a_deletion_names_what_it_deleted,
    a_deletion_of_nothing_is_not_found,
    a_precondition_on_the_uid_holds,
    a_precondition_on_the_version_holds,
    an_unknown_policy_is_refused,
    a_collection_is_deleted,
    finalizers_keep_an_object_until_the_last_is_gone,
    no_finalizer_is_added_to_what_is_being_deleted,
    a_second_deletion_changes_nothing,
    a_deletion_cannot_be_taken_back,
    what_is_being_deleted_can_still_change,
    a_finalizer_without_a_domain_is_refused_or_warned_of,
    an_update_can_remove_the_last_finalizer,
    an_owner_needs_a_uid,
    two_controllers_are_refused,
];

async fn a_deletion_names_what_it_deleted(at: &Ground) -> anyhow::Result<()> {
    let map = at.map("a", &json!({})).await?;
    let done = at.delete("configmaps/a").await?.ok()?;
    ensure!(done["kind"] == "Status" && done["status"] == "Success" && done["apiVersion"] == "v1");
    ensure!(
        done["details"] == json!({"name": "a", "kind": "configmaps", "uid": map["metadata"]["uid"]}),
        "{done}"
    );
    let widget = at.new_widget("a", &json!({"size": 1})).await?;
    let done = at.delete("widgets/a").await?.ok()?;
    ensure!(
        done["details"]
            == json!({"name": "a", "group": at.server.group, "kind": "widgets", "uid": widget["metadata"]["uid"]}),
        "{done}"
    );
    ensure!(at.get("widgets/a").await?.code == 404);
    Ok(())
}

async fn a_deletion_of_nothing_is_not_found(at: &Ground) -> anyhow::Result<()> {
    at.delete("configmaps/a")
        .await?
        .refused(404, "NotFound")?
        .says("configmaps \"a\" not found")?
        .about("", "configmaps", "a")?;
    Ok(())
}

async fn a_precondition_on_the_uid_holds(at: &Ground) -> anyhow::Result<()> {
    let made = at.map("a", &json!({})).await?;
    let uid = made["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
    at.delete_with("configmaps/a", &json!({"preconditions": {"uid": "other"}}))
        .await?
        .refused(409, "Conflict")?
        .says(&format!(
            "Operation cannot be fulfilled on ConfigMap \"a\": the UID in the precondition (other) does not match the UID \
             in record ({uid}). The object might have been deleted and then recreated"
        ))?;
    at.delete_with("configmaps/a", &json!({"preconditions": {"uid": uid}}))
        .await?
        .ok()?;
    Ok(())
}

async fn a_precondition_on_the_version_holds(at: &Ground) -> anyhow::Result<()> {
    let made = at.new_widget("a", &json!({"size": 1})).await?;
    let after = at.merge("widgets/a", &json!({"spec": {"size": 2}})).await?.ok()?;
    let wanted = |object: &serde_json::Value| json!({"preconditions": {"resourceVersion": object["metadata"]["resourceVersion"]}});
    at.delete_with("widgets/a", &wanted(&made))
        .await?
        .refused(409, "Conflict")?
        .mentions("the ResourceVersion in the precondition (")?
        .mentions("). The object might have been modified")?;
    at.delete_with("widgets/a", &wanted(&after)).await?.ok()?;
    Ok(())
}

async fn an_unknown_policy_is_refused(at: &Ground) -> anyhow::Result<()> {
    at.map("a", &json!({})).await?;
    at.delete_with("configmaps/a", &json!({"propagationPolicy": "Some"}))
        .await?
        .refused(422, "Invalid")?
        .says(
            "DeleteOptions.meta.k8s.io \"\" is invalid: propagationPolicy: Unsupported value: \"Some\": supported values: \
             \"Foreground\", \"Background\", \"Orphan\", \"nil\"",
        )?;
    at.delete_with(
        "configmaps/a",
        &json!({"propagationPolicy": "Orphan", "orphanDependents": true}),
    )
    .await?
    .refused(422, "Invalid")?
    .mentions("orphanDependents and deletionPropagation cannot be both set")?;
    Ok(())
}

async fn a_collection_is_deleted(at: &Ground) -> anyhow::Result<()> {
    for name in ["a", "b"] {
        at.new_widget(name, &json!({"size": 1})).await?;
    }
    let mut held = at.widget("c", &json!({"size": 1}));
    held["metadata"]["finalizers"] = json!(["example.dev/x"]);
    at.post("widgets", &held).await?.created()?;
    at.delete("widgets").await?.ok()?;
    let left = at.get("widgets").await?.ok()?;
    ensure!(left["items"].as_array().is_some_and(|items| items.len() == 1));
    ensure!(left["items"][0]["metadata"]["deletionTimestamp"].is_string());
    at.merge("widgets/c", &json!({"metadata": {"finalizers": null}}))
        .await?
        .ok()?;
    Ok(())
}

async fn held(at: &Ground) -> anyhow::Result<()> {
    let mut held = config_map("a", &json!({"k": "1"}));
    held["metadata"]["finalizers"] = json!(["example.dev/x", "example.dev/y"]);
    at.post("configmaps", &held).await?.created()?;
    Ok(())
}

async fn release(at: &Ground) -> anyhow::Result<()> {
    at.merge("configmaps/a", &json!({"metadata": {"finalizers": null}}))
        .await?
        .ok()?;
    ensure!(at.get("configmaps/a").await?.code == 404);
    Ok(())
}

async fn finalizers_keep_an_object_until_the_last_is_gone(at: &Ground) -> anyhow::Result<()> {
    held(at).await?;
    let marked = at.delete("configmaps/a").await?.ok()?;
    ensure!(
        marked["kind"] == "ConfigMap" && marked["metadata"]["deletionTimestamp"].is_string(),
        "{marked}"
    );
    ensure!(marked["metadata"]["deletionGracePeriodSeconds"] == 0);
    at.merge("configmaps/a", &json!({"metadata": {"finalizers": ["example.dev/y"]}}))
        .await?
        .ok()?;
    ensure!(at.get("configmaps/a").await?.code == 200);
    release(at).await
}

async fn no_finalizer_is_added_to_what_is_being_deleted(at: &Ground) -> anyhow::Result<()> {
    held(at).await?;
    at.delete("configmaps/a").await?.ok()?;
    let more = json!({"metadata": {"finalizers": ["example.dev/x", "example.dev/z"]}});
    at.merge("configmaps/a", &more).await?.refused(422, "Invalid")?.says(
        "ConfigMap \"a\" is invalid: metadata.finalizers: Forbidden: no new finalizers can be added if the object is \
             being deleted, found new finalizers []string{\"example.dev/z\"}",
    )?;
    release(at).await
}

async fn a_second_deletion_changes_nothing(at: &Ground) -> anyhow::Result<()> {
    held(at).await?;
    let first = at.delete("configmaps/a").await?.ok()?;
    let second = at.delete("configmaps/a").await?.ok()?;
    ensure!(first["metadata"] == second["metadata"]);
    release(at).await
}

async fn a_deletion_cannot_be_taken_back(at: &Ground) -> anyhow::Result<()> {
    held(at).await?;
    let marked = at.delete("configmaps/a").await?.ok()?;
    let mut plain = marked.clone();
    if let Some(metadata) = plain["metadata"].as_object_mut() {
        metadata.remove("deletionTimestamp");
        metadata.remove("deletionGracePeriodSeconds");
    }
    let after = at.put("configmaps/a", &plain).await?.ok()?;
    ensure!(after["metadata"]["deletionTimestamp"] == marked["metadata"]["deletionTimestamp"]);
    release(at).await
}

async fn what_is_being_deleted_can_still_change(at: &Ground) -> anyhow::Result<()> {
    held(at).await?;
    at.delete("configmaps/a").await?.ok()?;
    let after = at.merge("configmaps/a", &json!({"data": {"k": "2"}})).await?.ok()?;
    ensure!(after["data"]["k"] == "2");
    release(at).await
}

async fn a_finalizer_without_a_domain_is_refused_or_warned_of(at: &Ground) -> anyhow::Result<()> {
    let mut map = config_map("a", &json!({}));
    map["metadata"]["finalizers"] = json!(["x"]);
    at.post("configmaps", &map)
        .await?
        .refused(422, "Invalid")?
        .mentions("metadata.finalizers[0]: Invalid value: \"x\": name is neither a standard finalizer name nor is it fully qualified")?;
    let mut widget = at.widget("a", &json!({"size": 1}));
    widget["metadata"]["finalizers"] = json!(["x"]);
    let answer = at.post("widgets", &widget).await?;
    ensure!(
        answer.warnings.iter().any(|warning| warning.contains(
            "metadata.finalizers: \\\"x\\\": prefer a domain-qualified finalizer name"
        )),
        "{:?}",
        answer.warnings
    );
    answer.created()?;
    at.merge("widgets/a", &json!({"metadata": {"finalizers": null}}))
        .await?
        .ok()?;
    Ok(())
}

async fn an_update_can_remove_the_last_finalizer(at: &Ground) -> anyhow::Result<()> {
    held(at).await?;
    let mut marked = at.delete("configmaps/a").await?.ok()?;
    marked["metadata"]["finalizers"] = json!([]);
    let gone = at.put("configmaps/a", &marked).await?;
    ensure!(gone.code == 200, "{}", gone.text);
    ensure!(at.get("configmaps/a").await?.code == 404);
    Ok(())
}

async fn an_owner_needs_a_uid(at: &Ground) -> anyhow::Result<()> {
    let mut map = config_map("a", &json!({}));
    map["metadata"]["ownerReferences"] = json!([{"apiVersion": "v1", "kind": "ConfigMap", "name": "o"}]);
    at.post("configmaps", &map)
        .await?
        .refused(422, "Invalid")?
        .mentions("metadata.ownerReferences[0].uid: Required value: must not be empty")?;
    Ok(())
}

async fn two_controllers_are_refused(at: &Ground) -> anyhow::Result<()> {
    let mut map = config_map("a", &json!({}));
    let owner = |name: &str| {
        json!({"apiVersion": "v1", "kind": "ConfigMap", "name": name,
        "uid": format!("0000-{name}"), "controller": true})
    };
    map["metadata"]["ownerReferences"] = json!([owner("o"), owner("p")]);
    at.post("configmaps", &map)
        .await?
        .refused(422, "Invalid")?
        .mentions("metadata.ownerReferences: Invalid value: ")?
        .mentions("Only one reference can have Controller set to true. Found \"true\" in references for")?;
    Ok(())
}
