//! Server-side apply: owners, conflicts, and what goes when it is no longer applied.

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::conformance::{
    check::checks,
    ground::{Ground, PatchKind, config_map},
};

checks![
    an_apply_makes_the_object_and_notes_its_manager,
    an_apply_of_the_same_writes_nothing,
    an_apply_over_another_manager_conflicts,
    several_conflicts_are_listed_by_manager,
    a_forced_apply_takes_the_field,
    an_equal_value_is_owned_together,
    a_field_that_is_no_longer_applied_goes,
    a_field_that_another_owns_too_stays,
    an_update_takes_the_fields_it_changes,
    a_conflict_with_an_update_names_its_version,
    entries_of_a_keyed_list_have_owners_of_their_own,
    members_of_a_set_have_owners_of_their_own,
    an_atomic_list_has_one_owner,
    defaults_belong_to_no_applier,
    a_status_is_applied_by_its_subresource,
    an_apply_without_a_manager_is_refused,
    an_apply_with_managed_fields_is_refused,
    an_apply_of_an_unknown_field_is_refused,
    an_apply_with_two_entries_of_a_key_is_refused,
    an_apply_of_a_stale_version_conflicts,
    an_apply_of_a_subresource_of_nothing_is_not_found,
    an_apply_of_an_empty_map_owns_it,
    a_built_in_kind_is_applied,
];

fn owners<'a>(object: &'a Value, manager: &str) -> anyhow::Result<&'a Value> {
    let entries = object["metadata"]["managedFields"].as_array();
    let entries = entries.context("managed fields")?;
    let entry = entries.iter().find(|entry| entry["manager"] == manager);
    Ok(&entry.with_context(|| format!("no entry of {manager} in {entries:?}"))?["fieldsV1"])
}

async fn an_apply_makes_the_object_and_notes_its_manager(at: &Ground) -> anyhow::Result<()> {
    let config = at.widget("a", &json!({"size": 1}));
    let made = at.apply("one", "widgets/a", &config).await?.created()?;
    let entry = &made["metadata"]["managedFields"][0];
    ensure!(entry["manager"] == "one" && entry["operation"] == "Apply" && entry["fieldsType"] == "FieldsV1");
    ensure!(entry["apiVersion"] == format!("{}/v1", at.server.group) && entry["time"].is_string());
    ensure!(entry["fieldsV1"] == json!({"f:spec": {"f:size": {}}}));
    ensure!(made["metadata"]["generation"] == 1);
    Ok(())
}

async fn an_apply_of_the_same_writes_nothing(at: &Ground) -> anyhow::Result<()> {
    let config = at.widget("a", &json!({"size": 1, "labels": {"x": "y"}}));
    let made = at.apply("one", "widgets/a", &config).await?.created()?;
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let again = at.apply("one", "widgets/a", &config).await?;
    ensure!(again.code == 200);
    ensure!(again.ok()?["metadata"] == made["metadata"]);
    Ok(())
}

async fn an_apply_over_another_manager_conflicts(at: &Ground) -> anyhow::Result<()> {
    at.apply("one", "widgets/a", &at.widget("a", &json!({"size": 1})))
        .await?
        .created()?;
    at.apply("two", "widgets/a", &at.widget("a", &json!({"size": 2})))
        .await?
        .refused(409, "Conflict")?
        .says("Apply failed with 1 conflict: conflict with \"one\": .spec.size")?
        .cause(".spec.size", "FieldManagerConflict", "conflict with \"one\"")?;
    Ok(())
}

async fn several_conflicts_are_listed_by_manager(at: &Ground) -> anyhow::Result<()> {
    at.apply("one", "widgets/a", &at.widget("a", &json!({"size": 2, "mode": "a"})))
        .await?
        .created()?;
    let two = at.widget("a", &json!({"size": 3, "mode": "b"}));
    at.apply("two", "widgets/a", &two)
        .await?
        .refused(409, "Conflict")?
        .says("Apply failed with 2 conflicts: conflicts with \"one\":\n- .spec.mode\n- .spec.size")?;
    Ok(())
}

async fn a_forced_apply_takes_the_field(at: &Ground) -> anyhow::Result<()> {
    let config = at.widget("a", &json!({"size": 1, "mode": "a"}));
    at.apply("one", "widgets/a", &config).await?.created()?;
    let config = at.widget("a", &json!({"size": 2}));
    let after = at.apply("two", "widgets/a?force=true", &config).await?.ok()?;
    ensure!(after["spec"]["size"] == 2 && after["spec"]["mode"] == "a");
    ensure!(owners(&after, "one")? == &json!({"f:spec": {"f:mode": {}}}));
    ensure!(owners(&after, "two")? == &json!({"f:spec": {"f:size": {}}}));
    Ok(())
}

async fn an_equal_value_is_owned_together(at: &Ground) -> anyhow::Result<()> {
    let config = at.widget("a", &json!({"size": 1}));
    at.apply("one", "widgets/a", &config).await?.created()?;
    let after = at.apply("two", "widgets/a", &config).await?.ok()?;
    ensure!(owners(&after, "one")? == owners(&after, "two")?);
    Ok(())
}

async fn a_field_that_is_no_longer_applied_goes(at: &Ground) -> anyhow::Result<()> {
    let config = at.widget("a", &json!({"size": 1, "mode": "a", "labels": {"x": "1", "y": "2"}}));
    at.apply("one", "widgets/a", &config).await?.created()?;
    let config = at.widget("a", &json!({"size": 1, "labels": {"y": "2"}}));
    let after = at.apply("one", "widgets/a", &config).await?.ok()?;
    ensure!(after["spec"]["mode"].is_null() && after["spec"]["labels"] == json!({"y": "2"}));
    Ok(())
}

async fn a_field_that_another_owns_too_stays(at: &Ground) -> anyhow::Result<()> {
    let both = at.widget("a", &json!({"size": 1, "mode": "a"}));
    at.apply("one", "widgets/a", &both).await?.created()?;
    at.apply("two", "widgets/a", &both).await?.ok()?;
    let config = at.widget("a", &json!({"size": 1}));
    let after = at.apply("one", "widgets/a", &config).await?.ok()?;
    ensure!(after["spec"]["mode"] == "a");
    let after = at.apply("two", "widgets/a", &config).await?.ok()?;
    ensure!(after["spec"]["mode"].is_null());
    Ok(())
}

async fn an_update_takes_the_fields_it_changes(at: &Ground) -> anyhow::Result<()> {
    let config = at.widget("a", &json!({"size": 1, "mode": "a"}));
    at.apply("one", "widgets/a", &config).await?.created()?;
    let after = at
        .merge("widgets/a?fieldManager=editor", &json!({"spec": {"mode": "b"}}))
        .await?
        .ok()?;
    ensure!(owners(&after, "one")? == &json!({"f:spec": {"f:size": {}}}));
    ensure!(owners(&after, "editor")? == &json!({"f:spec": {"f:mode": {}}}));
    Ok(())
}

async fn a_conflict_with_an_update_names_its_version(at: &Ground) -> anyhow::Result<()> {
    at.post("configmaps?fieldManager=editor", &config_map("a", &json!({"k": "1"})))
        .await?
        .created()?;
    at.apply("one", "configmaps/a", &config_map("a", &json!({"k": "2"})))
        .await?
        .refused(409, "Conflict")?
        .says("Apply failed with 1 conflict: conflict with \"editor\" using v1: .data.k")?
        .cause(".data.k", "FieldManagerConflict", "conflict with \"editor\" using v1")?;
    Ok(())
}

async fn entries_of_a_keyed_list_have_owners_of_their_own(at: &Ground) -> anyhow::Result<()> {
    let ports = |ports: Value| at.widget("a", &json!({"size": 1, "ports": ports}));
    at.apply("one", "widgets/a", &ports(json!([{"name": "x", "port": 1}])))
        .await?
        .created()?;
    let after = at
        .apply("two", "widgets/a", &ports(json!([{"name": "y", "port": 2}])))
        .await?
        .ok()?;
    let names: Vec<_> = after["spec"]["ports"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|port| port["name"].clone())
        .collect();
    ensure!(names.len() == 2 && names.contains(&json!("x")) && names.contains(&json!("y")));
    ensure!(
        owners(&after, "two")?["f:spec"]["f:ports"]
            == json!({"k:{\"name\":\"y\"}": {".": {}, "f:name": {}, "f:port": {}}})
    );
    let after = at.apply("one", "widgets/a", &ports(json!([]))).await?.ok()?;
    ensure!(after["spec"]["ports"] == json!([{"name": "y", "port": 2, "protocol": "TCP"}]));
    Ok(())
}

async fn members_of_a_set_have_owners_of_their_own(at: &Ground) -> anyhow::Result<()> {
    let tags = |tags: Value| at.widget("a", &json!({"size": 1, "tags": tags}));
    at.apply("one", "widgets/a", &tags(json!(["x", "y"])))
        .await?
        .created()?;
    let after = at.apply("two", "widgets/a", &tags(json!(["y", "z"]))).await?.ok()?;
    ensure!(owners(&after, "two")?["f:spec"]["f:tags"] == json!({"v:\"y\"": {}, "v:\"z\"": {}}));
    let after = at.apply("one", "widgets/a", &tags(json!([]))).await?.ok()?;
    ensure!(after["spec"]["tags"] == json!(["y", "z"]));
    Ok(())
}

async fn an_atomic_list_has_one_owner(at: &Ground) -> anyhow::Result<()> {
    let words = |words: Value| at.widget("a", &json!({"size": 1, "words": words}));
    at.apply("one", "widgets/a", &words(json!(["x"]))).await?.created()?;
    at.apply("two", "widgets/a", &words(json!(["x", "y"])))
        .await?
        .refused(409, "Conflict")?
        .cause(".spec.words", "FieldManagerConflict", "conflict with \"one\"")?;
    Ok(())
}

async fn defaults_belong_to_no_applier(at: &Ground) -> anyhow::Result<()> {
    let config = at.widget("a", &json!({"size": 1, "ports": [{"name": "x"}]}));
    let made = at.apply("one", "widgets/a", &config).await?.created()?;
    ensure!(made["spec"]["replicas"] == 1 && made["spec"]["ports"][0]["protocol"] == "TCP");
    let owned = owners(&made, "one")?;
    ensure!(owned["f:spec"]["f:replicas"].is_null() && owned["f:spec"]["f:nested"].is_null());
    ensure!(owned["f:spec"]["f:ports"] == json!({"k:{\"name\":\"x\"}": {".": {}, "f:name": {}}}));
    Ok(())
}

async fn a_status_is_applied_by_its_subresource(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    let mut config = at.widget("a", &json!({"size": 5}));
    config["status"] = json!({"phase": "Ready"});
    let after = at.apply("one", "widgets/a/status", &config).await?.ok()?;
    ensure!(after["spec"]["size"] == 1 && after["status"]["phase"] == "Ready");
    let entries = after["metadata"]["managedFields"]
        .as_array()
        .context("managed fields")?;
    let entry = entries.iter().find(|entry| entry["manager"] == "one").context("one")?;
    ensure!(entry["subresource"] == "status" && entry["fieldsV1"] == json!({"f:status": {"f:phase": {}}}));
    Ok(())
}

async fn an_apply_without_a_manager_is_refused(at: &Ground) -> anyhow::Result<()> {
    at.patch(PatchKind::Apply, "widgets/a", &at.widget("a", &json!({"size": 1})))
        .await?
        .refused(422, "Invalid")?
        .says("PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch")?;
    Ok(())
}

async fn an_apply_with_managed_fields_is_refused(at: &Ground) -> anyhow::Result<()> {
    let mut config = at.widget("a", &json!({"size": 1}));
    config["metadata"]["managedFields"] = json!([{"manager": "x", "operation": "Apply"}]);
    at.apply("one", "widgets/a", &config)
        .await?
        .refused(400, "BadRequest")?
        .says("metadata.managedFields must be nil")?;
    Ok(())
}

async fn an_apply_of_an_unknown_field_is_refused(at: &Ground) -> anyhow::Result<()> {
    let config = at.widget("a", &json!({"size": 1, "odd": 2}));
    let answer = at.apply("one", "widgets/a", &config).await?;
    ensure!(answer.code == 500, "{}", answer.text);
    let message = answer.body["message"].as_str().unwrap_or_default();
    let expected = format!(
        "failed to create typed patch object (/a; {}/v1, Kind=Widget): .spec.odd: field not declared in schema",
        at.server.group
    );
    ensure!(message == expected, "{message}");
    Ok(())
}

async fn an_apply_with_two_entries_of_a_key_is_refused(at: &Ground) -> anyhow::Result<()> {
    let config = at.widget("a", &json!({"size": 1, "ports": [{"name": "x"}, {"name": "x"}]}));
    let answer = at.apply("one", "widgets/a", &config).await?;
    ensure!(answer.code == 500, "{}", answer.text);
    ensure!(
        answer.text.contains("duplicate entries for key [name=\\\"x\\\"]"),
        "{}",
        answer.text
    );
    Ok(())
}

async fn an_apply_of_a_stale_version_conflicts(at: &Ground) -> anyhow::Result<()> {
    let made = at.new_widget("a", &json!({"size": 1})).await?;
    at.merge("widgets/a", &json!({"spec": {"size": 2}})).await?.ok()?;
    let mut config = at.widget("a", &json!({"mode": "a", "size": 2}));
    config["metadata"]["resourceVersion"] = made["metadata"]["resourceVersion"].clone();
    at.apply("one", "widgets/a", &config)
        .await?
        .refused(409, "Conflict")?
        .mentions("the object has been modified")?;
    Ok(())
}

async fn an_apply_of_a_subresource_of_nothing_is_not_found(at: &Ground) -> anyhow::Result<()> {
    let config = json!({"apiVersion": format!("{}/v1", at.server.group), "kind": "Widget",
        "metadata": {"name": "a"}, "status": {"phase": "x"}});
    at.apply("one", "widgets/a/status", &config)
        .await?
        .refused(404, "NotFound")?;
    Ok(())
}

async fn an_apply_of_an_empty_map_owns_it(at: &Ground) -> anyhow::Result<()> {
    let config = at.widget("a", &json!({"size": 1, "free": {}, "labels": {}}));
    let made = at.apply("one", "widgets/a", &config).await?.created()?;
    ensure!(owners(&made, "one")? == &json!({"f:spec": {"f:size": {}, "f:free": {}, "f:labels": {}}}));
    Ok(())
}

async fn a_built_in_kind_is_applied(at: &Ground) -> anyhow::Result<()> {
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a", "labels": {"x": "y"}},
        "spec": {"selector": {"app": "a"}, "clusterIP": "None", "ports": [{"name": "http", "port": 80}]}});
    let made = at.apply("one", "services/a", &service).await?.created()?;
    ensure!(
        owners(&made, "one")?
            == &json!({"f:metadata": {"f:labels": {"f:x": {}}}, "f:spec": {"f:clusterIP": {}, "f:selector": {},
                "f:ports": {"k:{\"port\":80,\"protocol\":\"TCP\"}": {".": {}, "f:name": {}, "f:port": {}}}}})
    );
    ensure!(made["spec"]["ports"][0]["targetPort"] == 80 && made["spec"]["type"] == "ClusterIP");
    Ok(())
}
