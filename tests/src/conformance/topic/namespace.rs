//! Namespaces: what is made with them, what they refuse, and how they end.

use anyhow::ensure;
use serde_json::{Value, json};

use crate::conformance::{
    check::checks,
    ground::{Ground, config_map, pod},
};

checks![
    a_namespace_is_active_and_named_by_a_label,
    a_namespace_gets_a_service_account_and_the_certificates,
    a_namespace_that_is_missing_takes_nothing,
    a_namespace_that_ends_takes_nothing_new,
    a_namespace_that_ends_takes_everything_along,
    a_namespace_waits_for_finalizers_and_says_so,
    the_default_namespace_cannot_be_deleted,
    a_collection_of_namespaces_cannot_be_deleted,
    a_name_that_is_no_label_is_refused,
    a_list_in_a_missing_namespace_is_empty,
];

fn namespace(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
}

/// Another namespace of the check, and the path of its ConfigMaps.
async fn extra(at: &Ground) -> anyhow::Result<(String, String)> {
    let name = at.unique("extra");
    at.post("namespaces", &namespace(&name)).await?.created()?;
    Ok((
        format!("namespaces/{name}"),
        format!("/api/v1/namespaces/{name}/configmaps"),
    ))
}

async fn a_namespace_is_active_and_named_by_a_label(at: &Ground) -> anyhow::Result<()> {
    let own = at.get(&format!("namespaces/{}", at.namespace)).await?.ok()?;
    ensure!(own["metadata"]["labels"]["kubernetes.io/metadata.name"] == at.namespace.as_str());
    ensure!(own["status"]["phase"] == "Active" && own["spec"]["finalizers"] == json!(["kubernetes"]));
    Ok(())
}

async fn a_namespace_gets_a_service_account_and_the_certificates(at: &Ground) -> anyhow::Result<()> {
    at.until("serviceaccounts/default", |_| true).await?;
    let roots = at.until("configmaps/kube-root-ca.crt", |_| true).await?;
    ensure!(
        roots["data"]["ca.crt"]
            .as_str()
            .is_some_and(|text| text.starts_with("-----BEGIN CERTIFICATE-----"))
    );
    Ok(())
}

async fn a_namespace_that_is_missing_takes_nothing(at: &Ground) -> anyhow::Result<()> {
    let missing = at.unique("missing");
    at.post(
        &format!("/api/v1/namespaces/{missing}/configmaps"),
        &config_map("a", &json!({})),
    )
    .await?
    .refused(404, "NotFound")?
    .says(&format!("namespaces \"{missing}\" not found"))?
    .about("", "namespaces", &missing)?;
    let path = format!("/apis/{}/v1/namespaces/{missing}/widgets", at.server.group);
    at.post(&path, &at.widget("a", &json!({"size": 1})))
        .await?
        .refused(404, "NotFound")?
        .says(&format!("namespaces \"{missing}\" not found"))?;
    Ok(())
}

async fn a_namespace_that_ends_takes_nothing_new(at: &Ground) -> anyhow::Result<()> {
    let (own, maps) = extra(at).await?;
    let mut held = config_map("held", &json!({}));
    held["metadata"]["finalizers"] = json!(["example.dev/x"]);
    at.post(&maps, &held).await?.created()?;
    let ending = at.delete(&own).await?.ok()?;
    ensure!(
        ending["kind"] == "Namespace" && ending["status"]["phase"] == "Terminating",
        "{ending}"
    );
    let name = own.trim_start_matches("namespaces/");
    at.post(&maps, &config_map("b", &json!({})))
        .await?
        .refused(403, "Forbidden")?
        .says(&format!(
            "configmaps \"b\" is forbidden: unable to create new content in namespace {name} because it is being terminated"
        ))?
        .cause(
            "metadata.namespace",
            "NamespaceTerminating",
            &format!("namespace {name} is being terminated"),
        )?;
    at.merge(&format!("{maps}/held"), &json!({"metadata": {"finalizers": null}}))
        .await?
        .ok()?;
    at.is_gone(&own).await
}

async fn a_namespace_that_ends_takes_everything_along(at: &Ground) -> anyhow::Result<()> {
    let (own, maps) = extra(at).await?;
    at.post(&maps, &config_map("a", &json!({}))).await?.created()?;
    let name = own.trim_start_matches("namespaces/");
    let widgets = format!("/apis/{}/v1/namespaces/{name}/widgets", at.server.group);
    at.post(&widgets, &at.widget("a", &json!({"size": 1})))
        .await?
        .created()?;
    at.until(&format!("/api/v1/namespaces/{name}/serviceaccounts/default"), |_| true)
        .await?;
    let mut gated = pod("a");
    gated["spec"]["schedulingGates"] = json!([{"name": "example.dev/wait"}]);
    at.post(&format!("/api/v1/namespaces/{name}/pods"), &gated)
        .await?
        .created()?;
    at.delete(&own).await?.ok()?;
    at.is_gone(&own).await?;
    let left = at.get(&widgets).await?.ok()?;
    ensure!(left["items"] == json!([]));
    Ok(())
}

async fn a_namespace_waits_for_finalizers_and_says_so(at: &Ground) -> anyhow::Result<()> {
    let (own, maps) = extra(at).await?;
    let mut held = config_map("held", &json!({}));
    held["metadata"]["finalizers"] = json!(["example.dev/x"]);
    at.post(&maps, &held).await?.created()?;
    at.delete(&own).await?.ok()?;
    let condition = |namespace: &Value, kind: &str| {
        let conditions = namespace["status"]["conditions"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        conditions.into_iter().find(|condition| condition["type"] == kind)
    };
    let waiting = at
        .until(&own, |namespace| {
            condition(namespace, "NamespaceFinalizersRemaining").is_some_and(|found| found["status"] == "True")
        })
        .await?;
    let found = condition(&waiting, "NamespaceFinalizersRemaining").unwrap_or_default();
    ensure!(
        found["message"]
            == "Some content in the namespace has finalizers remaining: example.dev/x in 1 resource instances"
    );
    let found = condition(&waiting, "NamespaceContentRemaining").unwrap_or_default();
    ensure!(
        found["message"] == "Some resources are remaining: configmaps. has 1 resource instances",
        "{found}"
    );
    at.merge(&format!("{maps}/held"), &json!({"metadata": {"finalizers": null}}))
        .await?
        .ok()?;
    at.is_gone(&own).await
}

async fn the_default_namespace_cannot_be_deleted(at: &Ground) -> anyhow::Result<()> {
    at.delete("namespaces/default")
        .await?
        .refused(403, "Forbidden")?
        .says("namespaces \"default\" is forbidden: this namespace may not be deleted")?;
    Ok(())
}

async fn a_collection_of_namespaces_cannot_be_deleted(at: &Ground) -> anyhow::Result<()> {
    at.delete("namespaces?labelSelector=no%3Dnamespace")
        .await?
        .refused(405, "MethodNotAllowed")?;
    Ok(())
}

async fn a_name_that_is_no_label_is_refused(at: &Ground) -> anyhow::Result<()> {
    at.post("namespaces", &namespace("a.b"))
        .await?
        .refused(422, "Invalid")?
        .mentions("metadata.name: Invalid value: \"a.b\": must not contain dots")?;
    Ok(())
}

async fn a_list_in_a_missing_namespace_is_empty(at: &Ground) -> anyhow::Result<()> {
    let path = format!("/api/v1/namespaces/{}/configmaps", at.unique("missing"));
    ensure!(at.get(&path).await?.ok()?["items"] == json!([]));
    at.get(&format!("{path}/a")).await?.refused(404, "NotFound")?;
    Ok(())
}
