//! `/status` and `/scale`, and what counts as a new generation.

use anyhow::ensure;
use serde_json::json;

use crate::conformance::{
    check::checks,
    definition,
    ground::{Ground, PatchKind, pod},
};

checks![
    a_write_of_the_object_leaves_the_status,
    a_write_of_the_status_leaves_the_object,
    a_write_of_the_status_leaves_the_labels,
    the_generation_counts_changes_of_the_spec,
    without_a_status_subresource_the_generation_counts_every_change,
    a_deletion_that_waits_is_a_new_generation,
    a_stale_status_conflicts,
    a_status_of_the_wrong_shape_is_refused,
    a_subresource_that_is_not_there_is_not_found,
    the_status_is_read_by_its_own_path,
    a_scale_shows_replicas_and_selector,
    a_scale_is_written,
    a_scale_below_zero_is_refused,
    a_scale_of_a_stale_version_conflicts,
    a_scale_obeys_the_schema,
    the_status_of_a_pod_is_patched_by_type_of_condition,
];

async fn a_write_of_the_object_leaves_the_status(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    at.merge("widgets/a/status", &json!({"status": {"phase": "x"}}))
        .await?
        .ok()?;
    let after = at
        .merge("widgets/a", &json!({"spec": {"size": 2}, "status": {"phase": "y"}}))
        .await?
        .ok()?;
    ensure!(after["spec"]["size"] == 2 && after["status"] == json!({"phase": "x"}));
    Ok(())
}

async fn a_write_of_the_status_leaves_the_object(at: &Ground) -> anyhow::Result<()> {
    let mut widget = at.new_widget("a", &json!({"size": 1})).await?;
    widget["spec"]["size"] = json!(9);
    widget["status"] = json!({"phase": "x", "odd": 1});
    let after = at.put("widgets/a/status", &widget).await?.ok()?;
    ensure!(after["spec"]["size"] == 1 && after["status"] == json!({"phase": "x"}));
    Ok(())
}

async fn a_write_of_the_status_leaves_the_labels(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    let patch = json!({"metadata": {"labels": {"x": "y"}, "annotations": {"x": "y"}}, "status": {"phase": "x"}});
    let after = at.merge("widgets/a/status", &patch).await?.ok()?;
    ensure!(after["metadata"]["labels"].is_null() && after["metadata"]["annotations"].is_null());
    Ok(())
}

async fn the_generation_counts_changes_of_the_spec(at: &Ground) -> anyhow::Result<()> {
    let made = at.new_widget("a", &json!({"size": 1})).await?;
    ensure!(made["metadata"]["generation"] == 1);
    let after = at.merge("widgets/a", &json!({"spec": {"size": 2}})).await?.ok()?;
    ensure!(after["metadata"]["generation"] == 2);
    let patch = json!({"metadata": {"labels": {"x": "y"}}});
    let after = at.merge("widgets/a", &patch).await?.ok()?;
    ensure!(after["metadata"]["generation"] == 2);
    let after = at
        .merge("widgets/a/status", &json!({"status": {"phase": "x"}}))
        .await?
        .ok()?;
    ensure!(after["metadata"]["generation"] == 2);
    Ok(())
}

async fn without_a_status_subresource_the_generation_counts_every_change(at: &Ground) -> anyhow::Result<()> {
    let name = at.unique("a");
    let path = format!("gadgets/{name}");
    let gadget = definition::gadget(&at.server.group, &name, &json!({"x": 1}));
    at.post("gadgets", &gadget).await?.created()?;
    let after = at.merge(&path, &json!({"status": {"phase": "x"}})).await?.ok()?;
    ensure!(after["status"]["phase"] == "x" && after["metadata"]["generation"] == 2);
    let after = at
        .merge(&path, &json!({"metadata": {"labels": {"x": "y"}}}))
        .await?
        .ok()?;
    ensure!(after["metadata"]["generation"] == 2);
    at.delete(&path).await?.ok()?;
    Ok(())
}

async fn a_deletion_that_waits_is_a_new_generation(at: &Ground) -> anyhow::Result<()> {
    let mut widget = at.widget("a", &json!({"size": 1}));
    widget["metadata"]["finalizers"] = json!(["example.dev/x"]);
    at.post("widgets", &widget).await?.created()?;
    let marked = at.delete("widgets/a").await?.ok()?;
    ensure!(marked["metadata"]["generation"] == 2 && marked["metadata"]["deletionGracePeriodSeconds"] == 0);
    at.merge("widgets/a", &json!({"metadata": {"finalizers": null}}))
        .await?
        .ok()?;
    Ok(())
}

async fn a_stale_status_conflicts(at: &Ground) -> anyhow::Result<()> {
    let mut widget = at.new_widget("a", &json!({"size": 1})).await?;
    at.merge("widgets/a", &json!({"spec": {"size": 2}})).await?.ok()?;
    widget["status"] = json!({"phase": "x"});
    at.put("widgets/a/status", &widget)
        .await?
        .refused(409, "Conflict")?
        .mentions("the object has been modified")?;
    Ok(())
}

async fn a_status_of_the_wrong_shape_is_refused(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    at.merge("widgets/a/status", &json!({"status": {"phase": 1}}))
        .await?
        .refused(422, "Invalid")?
        .mentions("status.phase: Invalid value: \"integer\": ")?
        .mentions("phase in body must be of type string: \"integer\"")?;
    Ok(())
}

async fn a_subresource_that_is_not_there_is_not_found(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    let name = at.unique("a");
    let gadget = definition::gadget(&at.server.group, &name, &json!({}));
    at.post("gadgets", &gadget).await?.created()?;
    for path in ["widgets/a/nothing", &format!("gadgets/{name}/status")] {
        let answer = at.get(path).await?;
        ensure!(answer.code == 404, "{path}: {}", answer.text);
    }
    at.delete(&format!("gadgets/{name}")).await?.ok()?;
    Ok(())
}

async fn the_status_is_read_by_its_own_path(at: &Ground) -> anyhow::Result<()> {
    let made = at.new_widget("a", &json!({"size": 1})).await?;
    ensure!(at.get("widgets/a/status").await?.ok()? == made);
    Ok(())
}

async fn a_scale_shows_replicas_and_selector(at: &Ground) -> anyhow::Result<()> {
    let made = at.new_widget("a", &json!({"size": 5, "replicas": 3})).await?;
    let status = json!({"status": {"replicas": 2, "selector": "app=a"}});
    let made = at.merge("widgets/a/status", &status).await?.ok().and(Ok(made))?;
    let scale = at.get("widgets/a/scale").await?.ok()?;
    ensure!(scale["kind"] == "Scale" && scale["apiVersion"] == "autoscaling/v1");
    ensure!(scale["spec"] == json!({"replicas": 3}) && scale["status"] == json!({"replicas": 2, "selector": "app=a"}));
    ensure!(scale["metadata"]["uid"] == made["metadata"]["uid"] && scale["metadata"]["name"] == "a");
    Ok(())
}

async fn a_scale_is_written(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 5})).await?;
    let mut scale = at.get("widgets/a/scale").await?.ok()?;
    scale["spec"]["replicas"] = json!(2);
    ensure!(at.put("widgets/a/scale", &scale).await?.ok()?["spec"]["replicas"] == 2);
    let scale = at
        .merge("widgets/a/scale", &json!({"spec": {"replicas": 4}}))
        .await?
        .ok()?;
    ensure!(scale["spec"]["replicas"] == 4);
    let widget = at.get("widgets/a").await?.ok()?;
    ensure!(widget["spec"]["replicas"] == 4 && widget["metadata"]["generation"] == 3);
    Ok(())
}

async fn a_scale_below_zero_is_refused(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 5})).await?;
    at.merge("widgets/a/scale", &json!({"spec": {"replicas": -1}}))
        .await?
        .refused(422, "Invalid")?
        .mentions("spec.replicas: Invalid value: -1: should be a non-negative integer")?;
    Ok(())
}

async fn a_scale_of_a_stale_version_conflicts(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 5})).await?;
    let mut scale = at.get("widgets/a/scale").await?.ok()?;
    at.merge("widgets/a", &json!({"spec": {"size": 6}})).await?.ok()?;
    scale["spec"]["replicas"] = json!(2);
    at.put("widgets/a/scale", &scale).await?.refused(409, "Conflict")?;
    Ok(())
}

async fn a_scale_obeys_the_schema(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 5})).await?;
    at.merge("widgets/a/scale", &json!({"spec": {"replicas": 6}}))
        .await?
        .refused(422, "Invalid")?
        .mentions("failed rule: !has(self.replicas) || self.replicas <= self.size")?;
    Ok(())
}

async fn the_status_of_a_pod_is_patched_by_type_of_condition(at: &Ground) -> anyhow::Result<()> {
    at.takes_pods().await?;
    let mut ungated = pod("a");
    ungated["spec"]["schedulingGates"] = json!([{"name": "example.dev/wait"}]);
    at.post("pods", &ungated).await?.created()?;
    for (kind, state) in [("One", "True"), ("Two", "False"), ("One", "False")] {
        let patch = json!({"status": {"conditions": [{"type": kind, "status": state}]}});
        at.patch(PatchKind::Strategic, "pods/a/status", &patch).await?.ok()?;
    }
    let after = at.get("pods/a").await?.ok()?;
    let conditions = after["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let state = |kind: &str| {
        let mut of_kind = conditions.iter().filter(|condition| condition["type"] == kind);
        (of_kind.next().map(|found| found["status"].clone()), of_kind.count())
    };
    ensure!(state("One") == (Some(json!("False")), 0) && state("Two") == (Some(json!("False")), 0));
    Ok(())
}
