//! Other forms of an answer: tables, metadata alone, YAML.

use anyhow::ensure;
use serde_json::{Value, json};

use crate::conformance::{
    check::checks,
    ground::{Ground, pod},
};

checks![
    a_table_has_the_columns_of_the_definition,
    a_table_of_one_object_has_one_row,
    a_table_of_a_kind_without_columns_has_an_age,
    a_table_of_nothing_has_columns,
    a_row_carries_metadata_the_object_or_nothing,
    a_table_of_pods_is_as_kubectl_shows_it,
    a_table_of_config_maps_counts_their_data,
    metadata_alone_has_no_spec,
    metadata_alone_is_patched,
    a_form_that_is_not_offered_is_not_acceptable,
    an_answer_may_be_yaml,
];

const TABLE: &str = "application/json;as=Table;g=meta.k8s.io;v=v1";

fn columns(table: &Value) -> Vec<(&str, i64)> {
    let columns = table["columnDefinitions"].as_array().into_iter().flatten();
    columns
        .map(|column| {
            (
                column["name"].as_str().unwrap_or_default(),
                column["priority"].as_i64().unwrap_or(-1),
            )
        })
        .collect()
}

async fn a_table_has_the_columns_of_the_definition(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 3, "mode": "b"})).await?;
    at.new_widget("b", &json!({"size": 4})).await?;
    let table = at.get_as("widgets", TABLE).await?.ok()?;
    ensure!(table["kind"] == "Table" && table["apiVersion"] == "meta.k8s.io/v1");
    ensure!(columns(&table) == [("Name", 0), ("Size", 0), ("Mode", 1), ("Age", 0)]);
    let cells = |row: usize| table["rows"][row]["cells"].clone();
    ensure!(cells(0)[0] == "a" && cells(0)[1] == 3 && cells(0)[2] == "b");
    ensure!(cells(1)[1] == 4 && cells(1)[2].is_null());
    ensure!(
        cells(0)[3].as_str().is_some_and(|age| age.ends_with('s')),
        "{}",
        cells(0)
    );
    ensure!(table["metadata"]["resourceVersion"].is_string());
    Ok(())
}

async fn a_table_of_one_object_has_one_row(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 3})).await?;
    let table = at.get_as("widgets/a", TABLE).await?.ok()?;
    ensure!(table["rows"].as_array().is_some_and(|rows| rows.len() == 1));
    Ok(())
}

async fn a_table_of_a_kind_without_columns_has_an_age(at: &Ground) -> anyhow::Result<()> {
    let table = at.get_as("gadgets?limit=1", TABLE).await?.ok()?;
    ensure!(columns(&table) == [("Name", 0), ("Age", 0)]);
    Ok(())
}

async fn a_table_of_nothing_has_columns(at: &Ground) -> anyhow::Result<()> {
    let table = at.get_as("secrets", TABLE).await?.ok()?;
    ensure!(columns(&table) == [("Name", 0), ("Type", 0), ("Data", 0), ("Age", 0)]);
    ensure!(table["rows"] == json!([]));
    Ok(())
}

async fn a_row_carries_metadata_the_object_or_nothing(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 3})).await?;
    for (include, kind) in [
        ("Metadata", json!("PartialObjectMetadata")),
        ("Object", json!("Widget")),
        ("None", Value::Null),
    ] {
        let table = at
            .get_as(&format!("widgets?includeObject={include}"), TABLE)
            .await?
            .ok()?;
        ensure!(
            table["rows"][0]["object"]["kind"] == kind,
            "{include}: {}",
            table["rows"][0]
        );
    }
    Ok(())
}

async fn a_table_of_pods_is_as_kubectl_shows_it(at: &Ground) -> anyhow::Result<()> {
    at.takes_pods().await?;
    let mut gated = pod("a");
    gated["spec"]["schedulingGates"] = json!([{"name": "example.dev/wait"}]);
    at.post("pods", &gated).await?.created()?;
    let table = at.get_as("pods", TABLE).await?.ok()?;
    ensure!(
        columns(&table)
            == [
                ("Name", 0),
                ("Ready", 0),
                ("Status", 0),
                ("Restarts", 0),
                ("Age", 0),
                ("IP", 1),
                ("Node", 1),
                ("Nominated Node", 1),
                ("Readiness Gates", 1)
            ],
        "{:?}",
        columns(&table)
    );
    let cells = table["rows"][0]["cells"].as_array().cloned().unwrap_or_default();
    ensure!(
        cells[..4] == [json!("a"), json!("0/1"), json!("SchedulingGated"), json!("0")],
        "{cells:?}"
    );
    ensure!(
        cells[5..] == [json!("<none>"), json!("<none>"), json!("<none>"), json!("<none>")],
        "{cells:?}"
    );
    Ok(())
}

async fn a_table_of_config_maps_counts_their_data(at: &Ground) -> anyhow::Result<()> {
    at.map("a", &json!({"x": "1", "y": "2"})).await?;
    let table = at.get_as("configmaps/a", TABLE).await?.ok()?;
    ensure!(columns(&table) == [("Name", 0), ("Data", 0), ("Age", 0)]);
    ensure!(table["rows"][0]["cells"][1] == 2);
    Ok(())
}

async fn metadata_alone_has_no_spec(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 3})).await?;
    let accept = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";
    let list = at.get_as("widgets", accept).await?.ok()?;
    ensure!(list["kind"] == "PartialObjectMetadataList" && list["apiVersion"] == "meta.k8s.io/v1");
    ensure!(list["items"][0]["metadata"]["name"] == "a" && list["items"][0]["spec"].is_null());
    let accept = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";
    let one = at.get_as("widgets/a", accept).await?.ok()?;
    ensure!(one["kind"] == "PartialObjectMetadata" && one["metadata"]["uid"].is_string() && one["spec"].is_null());
    Ok(())
}

async fn metadata_alone_is_patched(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 3})).await?;
    let headers = [
        ("content-type", "application/merge-patch+json"),
        ("accept", "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"),
    ];
    let body = json!({"metadata": {"labels": {"x": "y"}}}).to_string();
    let after = at.send("PATCH", "widgets/a", &headers, Some(body.into())).await?.ok()?;
    ensure!(after["kind"] == "PartialObjectMetadata" && after["metadata"]["labels"] == json!({"x": "y"}));
    Ok(())
}

async fn a_form_that_is_not_offered_is_not_acceptable(at: &Ground) -> anyhow::Result<()> {
    for accept in ["text/csv", "application/json;as=Nothing;g=meta.k8s.io;v=v1"] {
        at.get_as("widgets", accept)
            .await?
            .refused(406, "NotAcceptable")?
            .mentions("only the following media types are accepted: application/json")?;
    }
    Ok(())
}

async fn an_answer_may_be_yaml(at: &Ground) -> anyhow::Result<()> {
    at.map("a", &json!({"k": "v"})).await?;
    let answer = at.get_as("configmaps/a", "application/yaml").await?;
    ensure!(
        answer.media == "application/yaml"
            && answer
                .text
                .starts_with("apiVersion: v1\ndata:\n  k: v\nkind: ConfigMap\n"),
        "{} {}",
        answer.media,
        answer.text
    );
    Ok(())
}
