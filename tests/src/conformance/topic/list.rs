//! Lists, in pages and of one version.

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::conformance::{check::checks, ground::Ground};

checks![
    a_list_is_ordered_by_name_and_has_a_version,
    items_of_a_built_in_list_have_no_kind,
    an_empty_list_is_a_list,
    pages_continue_where_the_last_ended,
    pages_show_one_version,
    pages_with_a_selector_do_not_count_the_rest,
    a_token_that_is_none_is_refused,
    a_token_and_a_version_exclude_each_other,
    an_exact_version_shows_the_past,
    a_version_that_is_the_least_shows_what_was_written_by_then,
    an_exact_version_needs_a_version,
    a_version_match_without_a_version_is_refused,
    a_list_from_the_future_times_out,
    a_get_from_the_future_times_out,
    a_list_over_all_namespaces_has_the_objects_of_each,
    a_negative_limit_is_all,
];

fn names(list: &Value) -> Vec<&str> {
    let items = list["items"].as_array().into_iter().flatten();
    items.filter_map(|item| item["metadata"]["name"].as_str()).collect()
}

async fn five(at: &Ground) -> anyhow::Result<()> {
    for index in [3, 1, 4, 0, 2] {
        at.new_widget(&format!("w{index}"), &json!({"size": 1})).await?;
    }
    Ok(())
}

async fn a_list_is_ordered_by_name_and_has_a_version(at: &Ground) -> anyhow::Result<()> {
    five(at).await?;
    let list = at.get("widgets").await?.ok()?;
    ensure!(names(&list) == ["w0", "w1", "w2", "w3", "w4"]);
    ensure!(list["kind"] == "WidgetList" && list["apiVersion"] == format!("{}/v1", at.server.group));
    ensure!(list["items"][0]["kind"] == "Widget" && list["metadata"]["continue"] == "");
    ensure!(
        list["metadata"]["resourceVersion"]
            .as_str()
            .is_some_and(|version| !version.is_empty())
    );
    Ok(())
}

async fn items_of_a_built_in_list_have_no_kind(at: &Ground) -> anyhow::Result<()> {
    at.map("a", &json!({})).await?;
    let list = at.get("configmaps?fieldSelector=metadata.name%3Da").await?.ok()?;
    ensure!(list["kind"] == "ConfigMapList" && list["apiVersion"] == "v1");
    ensure!(list["items"][0]["kind"].is_null() && list["items"][0]["apiVersion"].is_null());
    Ok(())
}

async fn an_empty_list_is_a_list(at: &Ground) -> anyhow::Result<()> {
    for path in ["widgets", "secrets"] {
        let list = at.get(path).await?.ok()?;
        ensure!(list["items"] == json!([]), "{list}");
    }
    Ok(())
}

async fn pages_continue_where_the_last_ended(at: &Ground) -> anyhow::Result<()> {
    five(at).await?;
    let first = at.get("widgets?limit=2").await?.ok()?;
    ensure!(names(&first) == ["w0", "w1"] && first["metadata"]["remainingItemCount"] == 3);
    let token = first["metadata"]["continue"].as_str().context("a token")?;
    let second = at.get(&format!("widgets?limit=2&continue={token}")).await?.ok()?;
    ensure!(names(&second) == ["w2", "w3"] && second["metadata"]["remainingItemCount"] == 1);
    let token = second["metadata"]["continue"].as_str().context("a token")?;
    let third = at.get(&format!("widgets?limit=2&continue={token}")).await?.ok()?;
    ensure!(names(&third) == ["w4"] && third["metadata"]["continue"].as_str().is_none_or(str::is_empty));
    ensure!(third["metadata"]["remainingItemCount"].is_null());
    Ok(())
}

async fn pages_show_one_version(at: &Ground) -> anyhow::Result<()> {
    five(at).await?;
    let first = at.get("widgets?limit=2").await?.ok()?;
    at.delete("widgets/w4").await?.ok()?;
    at.new_widget("w5", &json!({"size": 1})).await?;
    let token = first["metadata"]["continue"].as_str().context("a token")?;
    let rest = at.get(&format!("widgets?continue={token}")).await?.ok()?;
    ensure!(names(&rest) == ["w2", "w3", "w4"], "{:?}", names(&rest));
    ensure!(rest["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]);
    Ok(())
}

async fn pages_with_a_selector_do_not_count_the_rest(at: &Ground) -> anyhow::Result<()> {
    five(at).await?;
    let first = at.get("widgets?limit=2&labelSelector=!x").await?.ok()?;
    ensure!(names(&first).len() == 2 && first["metadata"]["remainingItemCount"].is_null());
    ensure!(
        first["metadata"]["continue"]
            .as_str()
            .is_some_and(|token| !token.is_empty())
    );
    Ok(())
}

async fn a_token_that_is_none_is_refused(at: &Ground) -> anyhow::Result<()> {
    at.get("widgets?limit=2&continue=nonsense")
        .await?
        .refused(400, "BadRequest")?
        .mentions("continue key is not valid")?;
    Ok(())
}

async fn a_token_and_a_version_exclude_each_other(at: &Ground) -> anyhow::Result<()> {
    five(at).await?;
    let first = at.get("widgets?limit=2").await?.ok()?;
    let token = first["metadata"]["continue"].as_str().context("a token")?;
    at.get(&format!("widgets?limit=2&continue={token}&resourceVersion=5"))
        .await?
        .refused(400, "BadRequest")?
        .says("specifying resource version is not allowed when using continue")?;
    Ok(())
}

async fn an_exact_version_shows_the_past(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    let version = at.version("widgets").await?;
    at.new_widget("b", &json!({"size": 1})).await?;
    at.merge("widgets/a", &json!({"spec": {"size": 2}})).await?.ok()?;
    let path = format!("widgets?resourceVersion={version}&resourceVersionMatch=Exact");
    let list = at.get(&path).await?.ok()?;
    ensure!(names(&list) == ["a"] && list["items"][0]["spec"]["size"] == 1);
    ensure!(list["metadata"]["resourceVersion"] == version.as_str());
    Ok(())
}

/// Not older than the last write: older than that, any state between is an answer too.
async fn a_version_that_is_the_least_shows_what_was_written_by_then(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    let last = at.new_widget("b", &json!({"size": 1})).await?;
    let version = last["metadata"]["resourceVersion"].as_str().context("a version")?;
    let path = format!("widgets?resourceVersion={version}&resourceVersionMatch=NotOlderThan");
    ensure!(names(&at.get(&path).await?.ok()?) == ["a", "b"]);
    Ok(())
}

async fn an_exact_version_needs_a_version(at: &Ground) -> anyhow::Result<()> {
    at.get("widgets?resourceVersion=0&resourceVersionMatch=Exact")
        .await?
        .refused(422, "Invalid")?
        .says(
            "ListOptions.meta.k8s.io \"\" is invalid: resourceVersionMatch: Forbidden: resourceVersionMatch \"exact\" \
             is forbidden for resourceVersion \"0\"",
        )?;
    Ok(())
}

async fn a_version_match_without_a_version_is_refused(at: &Ground) -> anyhow::Result<()> {
    at.get("widgets?resourceVersionMatch=NotOlderThan")
        .await?
        .refused(422, "Invalid")?
        .mentions(
            "resourceVersionMatch: Forbidden: resourceVersionMatch is forbidden unless resourceVersion is provided",
        )?;
    at.get("widgets?resourceVersion=5&resourceVersionMatch=Some")
        .await?
        .refused(422, "Invalid")?
        .mentions("resourceVersionMatch: Unsupported value: \"Some\": supported values: \"Exact\", \"NotOlderThan\"")?;
    Ok(())
}

async fn a_list_from_the_future_times_out(at: &Ground) -> anyhow::Result<()> {
    let refusal = at
        .get("widgets?resourceVersion=999999999")
        .await?
        .refused(504, "Timeout")?
        .mentions("Timeout: Too large resource version: 999999999, current: ")?;
    ensure!(refusal.status["details"]["retryAfterSeconds"] == 1);
    ensure!(refusal.status["details"]["causes"][0]["reason"] == "ResourceVersionTooLarge");
    Ok(())
}

async fn a_get_from_the_future_times_out(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    at.get("widgets/a?resourceVersion=999999999")
        .await?
        .refused(504, "Timeout")?
        .mentions("Too large resource version: 999999999, current: ")?;
    Ok(())
}

async fn a_list_over_all_namespaces_has_the_objects_of_each(at: &Ground) -> anyhow::Result<()> {
    let mut widget = at.widget("a", &json!({"size": 1}));
    widget["metadata"]["labels"] = json!({"run": at.namespace});
    at.post("widgets", &widget).await?.created()?;
    let path = format!(
        "/apis/{}/v1/widgets?labelSelector=run%3D{}",
        at.server.group, at.namespace
    );
    let list = at.get(&path).await?.ok()?;
    ensure!(names(&list) == ["a"] && list["items"][0]["metadata"]["namespace"] == at.namespace.as_str());
    ensure!(at.post(&path, &widget).await?.code == 404);
    at.post(
        "/api/v1/configmaps",
        &crate::conformance::ground::config_map("a", &json!({})),
    )
    .await?
    .refused(405, "MethodNotAllowed")?;
    Ok(())
}

async fn a_negative_limit_is_all(at: &Ground) -> anyhow::Result<()> {
    five(at).await?;
    let all = at.get("widgets?limit=0").await?.ok()?;
    ensure!(names(&all).len() == 5);
    Ok(())
}
