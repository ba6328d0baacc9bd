//! Label and field selectors.

use anyhow::ensure;
use serde_json::{Value, json};

use crate::conformance::{
    check::checks,
    ground::{Ground, pod},
};

checks![
    labels_are_selected_by_equality,
    labels_are_selected_by_sets,
    labels_are_selected_by_presence,
    a_label_selector_that_is_none_is_refused,
    fields_are_selected_by_name_and_namespace,
    declared_fields_of_a_custom_resource_are_selectable,
    an_undeclared_field_is_refused,
    pods_are_selected_by_node_and_phase,
    secrets_are_selected_by_type,
    a_selector_and_a_collection_deletion_agree,
];

async fn selected(at: &Ground, query: &str) -> anyhow::Result<Vec<String>> {
    let list = at.get(query).await?.ok()?;
    let items = list["items"].as_array().cloned().unwrap_or_default();
    let name = |item: &Value| item["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    Ok(items.iter().map(name).collect())
}

async fn labelled(at: &Ground) -> anyhow::Result<()> {
    for (name, labels) in [
        ("a", json!({"x": "1", "y": "1"})),
        ("b", json!({"x": "2"})),
        ("c", json!({})),
        ("d", json!({"x": ""})),
    ] {
        let mut widget = at.widget(name, &json!({"size": 1}));
        widget["metadata"]["labels"] = labels;
        at.post("widgets", &widget).await?.created()?;
    }
    Ok(())
}

async fn labels_are_selected_by_equality(at: &Ground) -> anyhow::Result<()> {
    labelled(at).await?;
    ensure!(selected(at, "widgets?labelSelector=x%3D1").await? == ["a"]);
    ensure!(selected(at, "widgets?labelSelector=x%3D%3D1,y%3D1").await? == ["a"]);
    ensure!(selected(at, "widgets?labelSelector=x!%3D1").await? == ["b", "c", "d"]);
    ensure!(selected(at, "widgets?labelSelector=x%3D").await? == ["d"]);
    Ok(())
}

async fn labels_are_selected_by_sets(at: &Ground) -> anyhow::Result<()> {
    labelled(at).await?;
    ensure!(selected(at, "widgets?labelSelector=x%20in%20(1,2)").await? == ["a", "b"]);
    ensure!(selected(at, "widgets?labelSelector=x%20notin%20(1)").await? == ["b", "c", "d"]);
    Ok(())
}

async fn labels_are_selected_by_presence(at: &Ground) -> anyhow::Result<()> {
    labelled(at).await?;
    ensure!(selected(at, "widgets?labelSelector=x").await? == ["a", "b", "d"]);
    ensure!(selected(at, "widgets?labelSelector=!x").await? == ["c"]);
    ensure!(selected(at, "widgets?labelSelector=").await?.len() == 4);
    Ok(())
}

async fn a_label_selector_that_is_none_is_refused(at: &Ground) -> anyhow::Result<()> {
    at.get("widgets?labelSelector=x%20in%20(")
        .await?
        .refused(400, "BadRequest")?
        .mentions("unable to parse requirement")?;
    at.get("configmaps?labelSelector=-x%3D1")
        .await?
        .refused(400, "BadRequest")?
        .mentions("unable to parse requirement")?;
    Ok(())
}

async fn fields_are_selected_by_name_and_namespace(at: &Ground) -> anyhow::Result<()> {
    labelled(at).await?;
    ensure!(selected(at, "widgets?fieldSelector=metadata.name%3Da").await? == ["a"]);
    ensure!(selected(at, "widgets?fieldSelector=metadata.name!%3Da").await? == ["b", "c", "d"]);
    let path = format!(
        "/apis/{}/v1/widgets?fieldSelector=metadata.namespace%3D{},metadata.name%3Db",
        at.server.group, at.namespace
    );
    ensure!(selected(at, &path).await? == ["b"]);
    Ok(())
}

async fn declared_fields_of_a_custom_resource_are_selectable(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1, "mode": "a"})).await?;
    at.new_widget("b", &json!({"size": 1, "mode": "b"})).await?;
    at.new_widget("c", &json!({"size": 1})).await?;
    ensure!(selected(at, "widgets?fieldSelector=spec.mode%3Db").await? == ["b"]);
    ensure!(selected(at, "widgets?fieldSelector=spec.mode!%3Db").await? == ["a", "c"]);
    ensure!(selected(at, "widgets?fieldSelector=spec.mode%3D").await? == ["c"]);
    Ok(())
}

async fn an_undeclared_field_is_refused(at: &Ground) -> anyhow::Result<()> {
    at.get("widgets?fieldSelector=spec.size%3D1")
        .await?
        .refused(400, "BadRequest")?
        .mentions("field label not supported: spec.size")?;
    at.get("configmaps?fieldSelector=data.k%3D1")
        .await?
        .refused(400, "BadRequest")?
        .says("\"data.k\" is not a known field selector: only \"metadata.name\", \"metadata.namespace\"")?;
    at.get("pods?fieldSelector=spec.x%3D1")
        .await?
        .refused(400, "BadRequest")?
        .mentions("field label not supported: spec.x")?;
    Ok(())
}

async fn pods_are_selected_by_node_and_phase(at: &Ground) -> anyhow::Result<()> {
    at.takes_pods().await?;
    let mut bound = pod("a");
    bound["spec"]["nodeName"] = json!("nowhere");
    at.post("pods", &bound).await?.created()?;
    let mut gated = pod("b");
    gated["spec"]["schedulingGates"] = json!([{"name": "example.dev/wait"}]);
    at.post("pods", &gated).await?.created()?;
    ensure!(selected(at, "pods?fieldSelector=spec.nodeName%3Dnowhere").await? == ["a"]);
    ensure!(selected(at, "pods?fieldSelector=spec.nodeName%3D").await? == ["b"]);
    ensure!(selected(at, "pods?fieldSelector=status.phase%3DPending").await? == ["a", "b"]);
    ensure!(
        selected(at, "pods?fieldSelector=spec.restartPolicy%3DNever")
            .await?
            .is_empty()
    );
    Ok(())
}

async fn secrets_are_selected_by_type(at: &Ground) -> anyhow::Result<()> {
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a"}, "type": "example.dev/x"});
    at.post("secrets", &secret).await?.created()?;
    ensure!(selected(at, "secrets?fieldSelector=type%3Dexample.dev/x").await? == ["a"]);
    ensure!(selected(at, "secrets?fieldSelector=type%3DOpaque").await?.is_empty());
    Ok(())
}

async fn a_selector_and_a_collection_deletion_agree(at: &Ground) -> anyhow::Result<()> {
    labelled(at).await?;
    let deleted = at.delete("widgets?labelSelector=x").await?.ok()?;
    ensure!(deleted["kind"] == "WidgetList", "{deleted}");
    ensure!(deleted["items"].as_array().is_some_and(|items| items.len() == 3));
    ensure!(selected(at, "widgets").await? == ["c"]);
    Ok(())
}
