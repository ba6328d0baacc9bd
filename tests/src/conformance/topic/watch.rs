//! Watches.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::json;

use crate::conformance::{
    check::checks,
    ground::{Ground, pod},
};

checks![
    a_watch_shows_what_happens_after_its_version,
    a_watch_from_zero_begins_with_what_is_there,
    a_watch_without_a_version_begins_with_what_is_there,
    a_streamed_list_ends_with_a_marked_bookmark,
    a_streamed_list_of_nothing_is_a_bookmark,
    a_streamed_list_has_to_say_how_its_version_is_meant,
    a_bookmark_comes_before_a_watch_ends,
    no_bookmark_comes_unasked,
    an_object_enters_and_leaves_a_selection_by_labels,
    an_object_enters_and_leaves_a_selection_by_fields,
    a_pod_enters_and_leaves_a_selection_by_phase,
    a_watch_ends_after_its_time,
    a_watch_from_a_forgotten_version_is_gone,
    a_watch_of_one_object_sees_no_other,
    a_deletion_shows_the_last_state_at_its_own_version,
    a_removed_finalizer_shows_as_a_deletion,
    a_watch_of_metadata_has_only_metadata,
    a_watch_of_a_table_has_the_columns_once,
    a_watch_by_path_works_as_the_parameter_does,
    a_watch_from_what_is_no_number_is_refused,
];

async fn a_watch_shows_what_happens_after_its_version(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("before", &json!({"size": 1})).await?;
    let version = at.version("widgets").await?;
    at.new_widget("a", &json!({"size": 1})).await?;
    let mut watch = at.watch(&format!("widgets?resourceVersion={version}")).await?;
    watch.expect("ADDED", "a").await?;
    at.merge("widgets/a", &json!({"spec": {"size": 2}})).await?.ok()?;
    let modified = watch.expect("MODIFIED", "a").await?;
    ensure!(modified["spec"]["size"] == 2 && modified["kind"] == "Widget");
    at.delete("widgets/a").await?.ok()?;
    watch.expect("DELETED", "a").await?;
    Ok(())
}

async fn a_watch_from_zero_begins_with_what_is_there(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    at.new_widget("b", &json!({"size": 1})).await?;
    // The real server may answer from a cache that lags.
    at.version("widgets?resourceVersion=0").await?;
    let mut watch = at.watch("widgets?resourceVersion=0").await?;
    watch.expect("ADDED", "a").await?;
    watch.expect("ADDED", "b").await?;
    at.new_widget("c", &json!({"size": 1})).await?;
    watch.expect("ADDED", "c").await?;
    Ok(())
}

async fn a_watch_without_a_version_begins_with_what_is_there(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    let mut watch = at.watch("widgets").await?;
    watch.expect("ADDED", "a").await?;
    at.new_widget("b", &json!({"size": 1})).await?;
    watch.expect("ADDED", "b").await?;
    Ok(())
}

const STREAMED: &str = "sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";

async fn a_streamed_list_ends_with_a_marked_bookmark(at: &Ground) -> anyhow::Result<()> {
    let made = at.new_widget("a", &json!({"size": 1})).await?;
    let mut watch = at.watch(&format!("widgets?{STREAMED}")).await?;
    watch.expect("ADDED", "a").await?;
    let end = watch.expect("BOOKMARK", "").await?;
    ensure!(end["metadata"]["annotations"] == json!({"k8s.io/initial-events-end": "true"}));
    ensure!(end["kind"] == "Widget" && end["spec"].is_null());
    let number = |object: &serde_json::Value| -> u64 {
        let text = object["metadata"]["resourceVersion"].as_str();
        text.and_then(|text| text.parse().ok()).unwrap_or_default()
    };
    ensure!(number(&end) >= number(&made));
    at.new_widget("b", &json!({"size": 1})).await?;
    watch.expect("ADDED", "b").await?;
    Ok(())
}

async fn a_streamed_list_of_nothing_is_a_bookmark(at: &Ground) -> anyhow::Result<()> {
    let mut watch = at.watch(&format!("secrets?{STREAMED}")).await?;
    let end = watch.expect("BOOKMARK", "").await?;
    ensure!(end["metadata"]["annotations"] == json!({"k8s.io/initial-events-end": "true"}));
    Ok(())
}

async fn a_streamed_list_has_to_say_how_its_version_is_meant(at: &Ground) -> anyhow::Result<()> {
    at.get("widgets?watch=true&sendInitialEvents=true&allowWatchBookmarks=true")
        .await?
        .refused(422, "Invalid")?
        .says(
            "ListOptions.meta.k8s.io \"\" is invalid: resourceVersionMatch: Forbidden: sendInitialEvents requires \
             setting resourceVersionMatch to NotOlderThan",
        )?;
    at.get("widgets?sendInitialEvents=true&resourceVersionMatch=NotOlderThan")
        .await?
        .refused(422, "Invalid")?
        .mentions("sendInitialEvents: Forbidden: sendInitialEvents is forbidden for list")?;
    Ok(())
}

async fn a_bookmark_comes_before_a_watch_ends(at: &Ground) -> anyhow::Result<()> {
    let version = at.version("widgets").await?;
    let path = format!("widgets?resourceVersion={version}&allowWatchBookmarks=true&timeoutSeconds=5");
    let mut watch = at.watch(&path).await?;
    let bookmark = watch.expect("BOOKMARK", "").await?;
    ensure!(bookmark["metadata"]["resourceVersion"].is_string() && bookmark["metadata"]["annotations"].is_null());
    Ok(())
}

async fn no_bookmark_comes_unasked(at: &Ground) -> anyhow::Result<()> {
    let version = at.version("widgets").await?;
    let mut watch = at
        .watch(&format!("widgets?resourceVersion={version}&timeoutSeconds=4"))
        .await?;
    let event = watch.next_or_end().await?;
    ensure!(event.is_none(), "{event:?}");
    Ok(())
}

async fn an_object_enters_and_leaves_a_selection_by_labels(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    let version = at.version("widgets").await?;
    let mut watch = at
        .watch(&format!("widgets?resourceVersion={version}&labelSelector=x%3D1"))
        .await?;
    let label = |value: &str| json!({"metadata": {"labels": {"x": value}}});
    at.merge("widgets/a", &label("1")).await?.ok()?;
    watch.expect("ADDED", "a").await?;
    at.merge("widgets/a", &json!({"spec": {"size": 2}})).await?.ok()?;
    watch.expect("MODIFIED", "a").await?;
    let left = at.merge("widgets/a", &label("2")).await?.ok()?;
    let gone = watch.expect("DELETED", "a").await?;
    // What leaves is seen as it was, at the version of the change.
    ensure!(gone["metadata"]["labels"] == json!({"x": "1"}));
    ensure!(gone["metadata"]["resourceVersion"] == left["metadata"]["resourceVersion"]);
    at.merge("widgets/a", &json!({"spec": {"size": 3}})).await?.ok()?;
    at.merge("widgets/a", &label("1")).await?.ok()?;
    watch.expect("ADDED", "a").await?;
    Ok(())
}

async fn an_object_enters_and_leaves_a_selection_by_fields(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1, "mode": "a"})).await?;
    let version = at.version("widgets").await?;
    let path = format!("widgets?resourceVersion={version}&fieldSelector=spec.mode%3Db");
    let mut watch = at.watch(&path).await?;
    at.merge("widgets/a", &json!({"spec": {"mode": "b"}})).await?.ok()?;
    watch.expect("ADDED", "a").await?;
    at.merge("widgets/a", &json!({"spec": {"mode": "a"}})).await?.ok()?;
    let gone = watch.expect("DELETED", "a").await?;
    ensure!(gone["spec"]["mode"] == "b");
    Ok(())
}

async fn a_pod_enters_and_leaves_a_selection_by_phase(at: &Ground) -> anyhow::Result<()> {
    at.takes_pods().await?;
    let mut gated = pod("a");
    gated["spec"]["schedulingGates"] = json!([{"name": "example.dev/wait"}]);
    at.post("pods", &gated).await?.created()?;
    let version = at.version("pods").await?;
    let path = format!("pods?resourceVersion={version}&fieldSelector=status.phase%3DRunning");
    let mut watch = at.watch(&path).await?;
    for phase in ["Running", "Succeeded"] {
        at.merge("pods/a/status", &json!({"status": {"phase": phase}}))
            .await?
            .ok()?;
    }
    watch.expect("ADDED", "a").await?;
    watch.expect("DELETED", "a").await?;
    Ok(())
}

async fn a_watch_ends_after_its_time(at: &Ground) -> anyhow::Result<()> {
    let version = at.version("widgets").await?;
    let begun = Instant::now();
    let mut watch = at
        .watch(&format!("widgets?resourceVersion={version}&timeoutSeconds=1"))
        .await?;
    ensure!(watch.next_or_end().await?.is_none() && begun.elapsed() >= Duration::from_millis(900));
    Ok(())
}

async fn a_watch_from_a_forgotten_version_is_gone(at: &Ground) -> anyhow::Result<()> {
    // Older than the definition of the kind, so that no server can have its history.
    let mut watch = at.watch("widgets?resourceVersion=1").await?;
    let event = watch.next().await?;
    ensure!(event.kind == "ERROR", "{event:?}");
    ensure!(event.object["kind"] == "Status" && event.object["code"] == 410 && event.object["reason"] == "Expired");
    let message = event.object["message"].as_str().context("a message")?;
    ensure!(message.starts_with("too old resource version: 1 ("), "{message}");
    Ok(())
}

async fn a_watch_of_one_object_sees_no_other(at: &Ground) -> anyhow::Result<()> {
    let version = at.version("widgets").await?;
    let path = format!("widgets?resourceVersion={version}&fieldSelector=metadata.name%3Db");
    let mut watch = at.watch(&path).await?;
    at.new_widget("a", &json!({"size": 1})).await?;
    at.new_widget("b", &json!({"size": 1})).await?;
    watch.expect("ADDED", "b").await?;
    Ok(())
}

async fn a_deletion_shows_the_last_state_at_its_own_version(at: &Ground) -> anyhow::Result<()> {
    let made = at.new_widget("a", &json!({"size": 1})).await?;
    let version = at.version("widgets").await?;
    let mut watch = at.watch(&format!("widgets?resourceVersion={version}")).await?;
    at.delete("widgets/a").await?.ok()?;
    let gone = watch.expect("DELETED", "a").await?;
    ensure!(gone["spec"] == made["spec"] && gone["metadata"]["uid"] == made["metadata"]["uid"]);
    ensure!(gone["metadata"]["resourceVersion"] != made["metadata"]["resourceVersion"]);
    Ok(())
}

async fn a_removed_finalizer_shows_as_a_deletion(at: &Ground) -> anyhow::Result<()> {
    let mut held = at.widget("a", &json!({"size": 1}));
    held["metadata"]["finalizers"] = json!(["example.dev/x"]);
    at.post("widgets", &held).await?.created()?;
    let version = at.version("widgets").await?;
    let mut watch = at.watch(&format!("widgets?resourceVersion={version}")).await?;
    at.delete("widgets/a").await?.ok()?;
    let marked = watch.expect("MODIFIED", "a").await?;
    ensure!(marked["metadata"]["deletionTimestamp"].is_string());
    at.merge("widgets/a", &json!({"metadata": {"finalizers": null}}))
        .await?
        .ok()?;
    watch.expect("DELETED", "a").await?;
    Ok(())
}

async fn a_watch_of_metadata_has_only_metadata(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    let accept = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";
    let mut watch = at.watch_as("widgets", accept).await?;
    let seen = watch.expect("ADDED", "a").await?;
    ensure!(seen["kind"] == "PartialObjectMetadata" && seen["apiVersion"] == "meta.k8s.io/v1");
    ensure!(seen["spec"].is_null() && seen["metadata"]["uid"].is_string());
    Ok(())
}

async fn a_watch_of_a_table_has_the_columns_once(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    let accept = "application/json;as=Table;g=meta.k8s.io;v=v1";
    let mut watch = at.watch_as("widgets", accept).await?;
    let first = watch.next().await?.object;
    ensure!(first["kind"] == "Table" && first["columnDefinitions"][0]["name"] == "Name");
    ensure!(first["rows"][0]["cells"][0] == "a" && first["rows"][0]["object"]["kind"] == "PartialObjectMetadata");
    at.new_widget("b", &json!({"size": 1})).await?;
    let second = watch.next().await?.object;
    ensure!(second["columnDefinitions"].as_array().is_none_or(Vec::is_empty));
    ensure!(second["rows"][0]["cells"][0] == "b");
    Ok(())
}

async fn a_watch_by_path_works_as_the_parameter_does(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    let path = format!(
        "/apis/{}/v1/watch/namespaces/{}/widgets?timeoutSeconds=1",
        at.server.group, at.namespace
    );
    let answer = at.get(&path).await?;
    ensure!(
        answer.code == 200 && answer.text.contains("\"ADDED\""),
        "{}",
        answer.text
    );
    Ok(())
}

async fn a_watch_from_what_is_no_number_is_refused(at: &Ground) -> anyhow::Result<()> {
    let why = "resourceVersion: Invalid value: \"x\": strconv.ParseUint: parsing \"x\": invalid syntax";
    at.get("widgets?watch=true&resourceVersion=x")
        .await?
        .refused(500, "")?
        .says(why)?;
    at.get("widgets?resourceVersion=x")
        .await?
        .refused(400, "BadRequest")?
        .says(&format!("invalid resource version: {why}"))?;
    Ok(())
}
