//! Discovery, versions, health and OpenAPI.

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::conformance::{check::checks, ground::Ground};

checks![
    the_core_group_has_a_version,
    groups_tell_their_versions,
    resources_tell_their_names_and_verbs,
    a_custom_resource_is_discovered,
    aggregated_discovery_has_groups_versions_and_resources,
    a_group_that_is_not_there_is_not_found,
    a_path_that_is_not_there_is_not_found,
    the_version_is_told,
    health_is_told,
    openapi_lists_a_document_for_each_version,
    openapi_describes_custom_resources,
    openapi_describes_built_in_kinds,
];

fn resource<'a>(list: &'a Value, name: &str) -> anyhow::Result<&'a Value> {
    let resources = list["resources"].as_array().context("resources")?;
    let found = resources.iter().find(|resource| resource["name"] == name);
    found.with_context(|| format!("no {name}"))
}

async fn the_core_group_has_a_version(at: &Ground) -> anyhow::Result<()> {
    let versions = at.get("/api").await?.ok()?;
    ensure!(versions["kind"] == "APIVersions" && versions["versions"] == json!(["v1"]));
    Ok(())
}

async fn groups_tell_their_versions(at: &Ground) -> anyhow::Result<()> {
    let groups = at.get("/apis").await?.ok()?;
    ensure!(groups["kind"] == "APIGroupList");
    let all = groups["groups"].as_array().context("groups")?;
    let own = all.iter().find(|group| group["name"] == at.server.group.as_str());
    let own = own.context("the group of the suite")?;
    ensure!(own["preferredVersion"]["version"] == "v1" && own["versions"][1]["version"] == "v1alpha1");
    for name in ["apiextensions.k8s.io", "coordination.k8s.io", "events.k8s.io", "policy"] {
        ensure!(all.iter().any(|group| group["name"] == name), "{name}");
    }
    let group = at.get(&format!("/apis/{}", at.server.group)).await?.ok()?;
    ensure!(group["kind"] == "APIGroup" && group["name"] == at.server.group.as_str());
    Ok(())
}

async fn resources_tell_their_names_and_verbs(at: &Ground) -> anyhow::Result<()> {
    let list = at.get("/api/v1").await?.ok()?;
    ensure!(list["kind"] == "APIResourceList" && list["groupVersion"] == "v1");
    let pods = resource(&list, "pods")?;
    ensure!(pods["kind"] == "Pod" && pods["singularName"] == "pod" && pods["namespaced"] == true);
    ensure!(pods["shortNames"] == json!(["po"]) && pods["categories"] == json!(["all"]));
    ensure!(
        pods["verbs"]
            == json!([
                "create",
                "delete",
                "deletecollection",
                "get",
                "list",
                "patch",
                "update",
                "watch"
            ])
    );
    ensure!(resource(&list, "pods/status")?["verbs"] == json!(["get", "patch", "update"]));
    let eviction = resource(&list, "pods/eviction")?;
    ensure!(eviction["kind"] == "Eviction" && eviction["group"] == "policy" && eviction["version"] == "v1");
    ensure!(resource(&list, "pods/binding")?["kind"] == "Binding");
    ensure!(resource(&list, "namespaces")?["namespaced"] == false);
    Ok(())
}

async fn a_custom_resource_is_discovered(at: &Ground) -> anyhow::Result<()> {
    let list = at.get(&format!("/apis/{}/v1", at.server.group)).await?.ok()?;
    let widgets = resource(&list, "widgets")?;
    ensure!(widgets["kind"] == "Widget" && widgets["singularName"] == "widget" && widgets["namespaced"] == true);
    ensure!(widgets["shortNames"] == json!(["wdg"]) && widgets["categories"] == json!(["conformance"]));
    ensure!(
        widgets["verbs"]
            == json!([
                "delete",
                "deletecollection",
                "get",
                "list",
                "patch",
                "create",
                "update",
                "watch"
            ])
    );
    ensure!(resource(&list, "widgets/status")?["kind"] == "Widget");
    let scale = resource(&list, "widgets/scale")?;
    ensure!(scale["kind"] == "Scale" && scale["group"] == "autoscaling" && scale["version"] == "v1");
    ensure!(resource(&list, "gadgets")?["namespaced"] == false && resource(&list, "gadgets/status").is_err());
    Ok(())
}

async fn aggregated_discovery_has_groups_versions_and_resources(at: &Ground) -> anyhow::Result<()> {
    let accept = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
    for path in ["/api", "/apis"] {
        let answer = at.get_as(path, accept).await?;
        ensure!(answer.media.contains("as=APIGroupDiscoveryList"), "{}", answer.media);
        let list = answer.ok()?;
        ensure!(list["kind"] == "APIGroupDiscoveryList" && list["apiVersion"] == "apidiscovery.k8s.io/v2");
    }
    let list = at.get_as("/apis", accept).await?.ok()?;
    let groups = list["items"].as_array().context("groups")?;
    let own = groups
        .iter()
        .find(|group| group["metadata"]["name"] == at.server.group.as_str());
    let version = &own.context("the group of the suite")?["versions"][0];
    ensure!(version["version"] == "v1");
    let resources = version["resources"].as_array().context("resources")?;
    let widgets = resources.iter().find(|resource| resource["resource"] == "widgets");
    let widgets = widgets.context("widgets")?;
    ensure!(widgets["scope"] == "Namespaced" && widgets["responseKind"]["kind"] == "Widget");
    ensure!(widgets["singularResource"] == "widget" && widgets["shortNames"] == json!(["wdg"]));
    let subresources = widgets["subresources"].as_array().context("subresources")?;
    ensure!(subresources.iter().any(|sub| sub["subresource"] == "status"));
    ensure!(
        subresources
            .iter()
            .any(|sub| sub["subresource"] == "scale" && sub["responseKind"]["kind"] == "Scale")
    );
    Ok(())
}

async fn a_group_that_is_not_there_is_not_found(at: &Ground) -> anyhow::Result<()> {
    for path in [
        "/apis/nothing.dev",
        "/apis/nothing.dev/v1",
        "/apis/nothing.dev/v1/things",
    ] {
        let answer = at.get(path).await?;
        ensure!(answer.code == 404, "{path}: {}", answer.text);
    }
    let path = format!("/apis/{}/v2/widgets", at.server.group);
    let answer = at.get(&path).await?;
    ensure!(answer.code == 404, "{path}: {}", answer.text);
    Ok(())
}

async fn a_path_that_is_not_there_is_not_found(at: &Ground) -> anyhow::Result<()> {
    at.get(&format!("/api/v1/namespaces/{}/things", at.namespace))
        .await?
        .refused(404, "NotFound")?
        .says("the server could not find the requested resource")?;
    ensure!(at.get("/nothing/here").await?.code == 404);
    Ok(())
}

async fn the_version_is_told(at: &Ground) -> anyhow::Result<()> {
    let version = at.get("/version").await?.ok()?;
    ensure!(
        version["major"] == "1"
            && version["gitVersion"]
                .as_str()
                .is_some_and(|text| text.starts_with("v1."))
    );
    ensure!(version["minor"].is_string() && version["platform"].is_string());
    Ok(())
}

async fn health_is_told(at: &Ground) -> anyhow::Result<()> {
    for path in ["/healthz", "/livez", "/readyz"] {
        let answer = at.get(path).await?;
        ensure!(
            answer.code == 200 && answer.text == "ok",
            "{path}: {} {}",
            answer.code,
            answer.text
        );
    }
    Ok(())
}

async fn openapi_lists_a_document_for_each_version(at: &Ground) -> anyhow::Result<()> {
    let index = at.get("/openapi/v3").await?.ok()?;
    for path in [
        "api/v1",
        "apis/apiextensions.k8s.io/v1",
        &format!("apis/{}/v1", at.server.group),
    ] {
        let url = index["paths"][path]["serverRelativeURL"].as_str();
        let url = url.with_context(|| path.to_owned())?;
        ensure!(url.starts_with(&format!("/openapi/v3/{path}?hash=")), "{url}");
        ensure!(at.get(url).await?.ok()?["openapi"] == "3.0.0");
    }
    Ok(())
}

/// The schema of a kind in a document.
fn schema<'a>(document: &'a Value, group: &str, kind: &str) -> anyhow::Result<&'a Value> {
    let schemas = document["components"]["schemas"].as_object().context("schemas")?;
    let found = schemas.values().find(|schema| {
        let kinds = schema["x-kubernetes-group-version-kind"].as_array();
        kinds.is_some_and(|kinds| kinds.iter().any(|gvk| gvk["group"] == group && gvk["kind"] == kind))
    });
    found.with_context(|| format!("no schema of {kind}"))
}

async fn openapi_describes_custom_resources(at: &Ground) -> anyhow::Result<()> {
    let group = &at.server.group;
    let document = at.get(&format!("/openapi/v3/apis/{group}/v1")).await?.ok()?;
    let widget = schema(&document, group, "Widget")?;
    ensure!(widget["description"] == "A thing to check with.");
    let spec = &widget["properties"]["spec"];
    ensure!(spec["properties"]["size"]["description"] == "How large it is." && spec["required"] == json!(["size"]));
    ensure!(spec["properties"]["replicas"]["default"] == 1);
    let path = format!("/apis/{group}/v1/namespaces/{{namespace}}/widgets/{{name}}");
    let patch = &document["paths"][&path]["patch"];
    ensure!(patch["x-kubernetes-group-version-kind"]["kind"] == "Widget", "{patch}");
    Ok(())
}

async fn openapi_describes_built_in_kinds(at: &Ground) -> anyhow::Result<()> {
    let document = at.get("/openapi/v3/api/v1").await?.ok()?;
    let pod = schema(&document, "", "Pod")?;
    ensure!(
        pod["description"]
            .as_str()
            .is_some_and(|text| text.starts_with("Pod is a collection of containers"))
    );
    let containers = &document["components"]["schemas"]["io.k8s.api.core.v1.PodSpec"]["properties"]["containers"];
    ensure!(containers["x-kubernetes-patch-merge-key"] == "name" && containers["x-kubernetes-list-type"] == "map");
    Ok(())
}
