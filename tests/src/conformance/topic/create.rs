//! POST.

use anyhow::{Context, ensure};
use serde_json::json;

use crate::conformance::{
    check::checks,
    ground::{Ground, config_map},
};

checks![
    a_new_object_has_a_uid_a_version_and_a_time,
    a_create_without_a_name_is_refused,
    a_name_that_is_taken_already_exists,
    a_generated_name_has_its_prefix_and_five_safe_characters,
    a_name_that_is_no_dns_name_is_refused,
    a_body_of_another_namespace_is_refused,
    a_body_of_another_kind_is_refused,
    a_body_that_is_no_json_is_refused,
    a_body_without_kind_and_version_is_taken_for_a_built_in_kind,
    a_body_without_kind_is_refused_for_a_custom_kind,
    a_create_with_a_resource_version_is_refused,
    what_the_server_sets_cannot_be_given,
    a_label_that_is_no_label_is_refused,
    an_annotation_key_that_is_no_key_is_refused,
    an_unknown_media_type_is_refused,
    a_yaml_body_is_read,
    a_post_to_an_object_is_not_allowed,
    the_status_of_a_create_is_dropped,
];

async fn a_new_object_has_a_uid_a_version_and_a_time(at: &Ground) -> anyhow::Result<()> {
    let made = at.map("a", &json!({"k": "v"})).await?;
    let metadata = &made["metadata"];
    ensure!(metadata["uid"].as_str().is_some_and(|uid| uid.len() == 36));
    ensure!(
        metadata["resourceVersion"]
            .as_str()
            .is_some_and(|v| v.parse::<u64>().is_ok())
    );
    ensure!(
        metadata["creationTimestamp"]
            .as_str()
            .is_some_and(|time| time.ends_with('Z') && time.len() == 20)
    );
    ensure!(metadata["namespace"] == at.namespace.as_str());
    ensure!(made["kind"] == "ConfigMap" && made["apiVersion"] == "v1");
    ensure!(metadata["managedFields"][0]["manager"] == "conformance");
    ensure!(metadata["managedFields"][0]["operation"] == "Update");
    ensure!(metadata["managedFields"][0]["fieldsV1"] == json!({"f:data": {".": {}, "f:k": {}}}));
    Ok(())
}

async fn a_create_without_a_name_is_refused(at: &Ground) -> anyhow::Result<()> {
    let nameless = json!({"apiVersion": "v1", "kind": "ConfigMap"});
    at.post("configmaps", &nameless)
        .await?
        .refused(422, "Invalid")?
        .says("ConfigMap \"\" is invalid: metadata.name: Required value: name or generateName is required")?
        .cause(
            "metadata.name",
            "FieldValueRequired",
            "Required value: name or generateName is required",
        )?;
    Ok(())
}

async fn a_name_that_is_taken_already_exists(at: &Ground) -> anyhow::Result<()> {
    at.map("a", &json!({})).await?;
    at.post("configmaps", &config_map("a", &json!({})))
        .await?
        .refused(409, "AlreadyExists")?
        .says("configmaps \"a\" already exists")?
        .about("", "configmaps", "a")?;
    Ok(())
}

async fn a_generated_name_has_its_prefix_and_five_safe_characters(at: &Ground) -> anyhow::Result<()> {
    let body = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"generateName": "g-"}});
    let made = at.post("configmaps", &body).await?.created()?;
    let name = made["metadata"]["name"].as_str().unwrap_or_default();
    let random = name.strip_prefix("g-").context("the prefix")?;
    ensure!(
        random.len() == 5
            && random
                .chars()
                .all(|letter| "bcdfghjklmnpqrstvwxz2456789".contains(letter)),
        "{name}"
    );
    ensure!(made["metadata"]["generateName"] == "g-");
    Ok(())
}

async fn a_name_that_is_no_dns_name_is_refused(at: &Ground) -> anyhow::Result<()> {
    let detail = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and \
                  must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation \
                  is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
    at.post("configmaps", &config_map("A_b", &json!({})))
        .await?
        .refused(422, "Invalid")?
        .says(&format!(
            "ConfigMap \"A_b\" is invalid: metadata.name: Invalid value: \"A_b\": {detail}"
        ))?;
    at.post("widgets", &at.widget("A_b", &json!({"size": 1})))
        .await?
        .refused(422, "Invalid")?
        .mentions(&format!("metadata.name: Invalid value: \"A_b\": {detail}"))?;
    Ok(())
}

async fn a_body_of_another_namespace_is_refused(at: &Ground) -> anyhow::Result<()> {
    let mut body = config_map("a", &json!({}));
    body["metadata"]["namespace"] = json!("elsewhere");
    at.post("configmaps", &body)
        .await?
        .refused(400, "BadRequest")?
        .says("the namespace of the provided object does not match the namespace sent on the request")?;
    Ok(())
}

async fn a_body_of_another_kind_is_refused(at: &Ground) -> anyhow::Result<()> {
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a"}});
    at.post("configmaps", &secret)
        .await?
        .refused(400, "BadRequest")?
        .mentions("Secret in version \"v1\" cannot be handled as a ConfigMap")?;
    let mut gadget = at.widget("a", &json!({"size": 1}));
    gadget["kind"] = json!("Gadget");
    at.post("widgets", &gadget)
        .await?
        .refused(422, "Invalid")?
        .mentions("kind: Invalid value: \"Gadget\": must be Widget")?;
    Ok(())
}

async fn a_body_that_is_no_json_is_refused(at: &Ground) -> anyhow::Result<()> {
    let headers = [("content-type", "application/json")];
    at.send("POST", "configmaps", &headers, Some(b"{no".to_vec()))
        .await?
        .refused(400, "BadRequest")?;
    at.send("POST", "widgets", &headers, Some(b"{no".to_vec()))
        .await?
        .refused(400, "BadRequest")?;
    Ok(())
}

async fn a_body_without_kind_and_version_is_taken_for_a_built_in_kind(at: &Ground) -> anyhow::Result<()> {
    let made = at
        .post("configmaps", &json!({"metadata": {"name": "a"}}))
        .await?
        .created()?;
    ensure!(made["kind"] == "ConfigMap");
    Ok(())
}

async fn a_body_without_kind_is_refused_for_a_custom_kind(at: &Ground) -> anyhow::Result<()> {
    at.post("widgets", &json!({"metadata": {"name": "a"}, "spec": {"size": 1}}))
        .await?
        .refused(400, "BadRequest")?
        .mentions("Object 'Kind' is missing")?;
    Ok(())
}

async fn a_create_with_a_resource_version_is_refused(at: &Ground) -> anyhow::Result<()> {
    let mut body = config_map("a", &json!({}));
    body["metadata"]["resourceVersion"] = json!("1");
    at.post("configmaps", &body)
        .await?
        .refused(500, "")?
        .says("resourceVersion should not be set on objects to be created")?;
    Ok(())
}

async fn what_the_server_sets_cannot_be_given(at: &Ground) -> anyhow::Result<()> {
    let mut body = config_map("a", &json!({}));
    body["metadata"]["uid"] = json!("mine");
    body["metadata"]["creationTimestamp"] = json!("2001-01-01T00:00:00Z");
    body["metadata"]["generation"] = json!(7);
    body["metadata"]["selfLink"] = json!("/mine");
    body["metadata"]["deletionTimestamp"] = json!("2001-01-01T00:00:00Z");
    let made = at.post("configmaps", &body).await?.created()?;
    let metadata = &made["metadata"];
    ensure!(metadata["uid"] != "mine" && metadata["creationTimestamp"] != "2001-01-01T00:00:00Z");
    ensure!(metadata["selfLink"].is_null() && metadata["deletionTimestamp"].is_null());
    let mut widget = at.widget("a", &json!({"size": 1}));
    widget["metadata"]["generation"] = json!(7);
    let made = at.post("widgets", &widget).await?.created()?;
    ensure!(made["metadata"]["generation"] == 1);
    Ok(())
}

async fn a_label_that_is_no_label_is_refused(at: &Ground) -> anyhow::Result<()> {
    let mut body = config_map("a", &json!({}));
    body["metadata"]["labels"] = json!({"a": "no label"});
    at.post("configmaps", &body).await?.refused(422, "Invalid")?.mentions(
        "metadata.labels: Invalid value: \"no label\": a valid label must be an empty string or consist of",
    )?;
    body["metadata"]["labels"] = json!({"a/b/c": "x"});
    at.post("configmaps", &body)
        .await?
        .refused(422, "Invalid")?
        .mentions("metadata.labels: Invalid value: \"a/b/c\": ")?;
    Ok(())
}

async fn an_annotation_key_that_is_no_key_is_refused(at: &Ground) -> anyhow::Result<()> {
    let mut body = at.widget("a", &json!({"size": 1}));
    body["metadata"]["annotations"] = json!({"-x": "1"});
    at.post("widgets", &body)
        .await?
        .refused(422, "Invalid")?
        .mentions("metadata.annotations: Invalid value: \"-x\": ")?;
    Ok(())
}

async fn an_unknown_media_type_is_refused(at: &Ground) -> anyhow::Result<()> {
    at.send(
        "POST",
        "configmaps",
        &[("content-type", "text/csv")],
        Some(b"a,b".to_vec()),
    )
    .await?
    .refused(415, "UnsupportedMediaType")?
    .mentions("the body of the request was in an unknown format - accepted media types include: application/json")?;
    Ok(())
}

async fn a_yaml_body_is_read(at: &Ground) -> anyhow::Result<()> {
    let body = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {k: v}\n";
    let made = at
        .send(
            "POST",
            "configmaps",
            &[("content-type", "application/yaml"), ("accept", "application/json")],
            Some(body.into()),
        )
        .await?
        .created()?;
    ensure!(made["data"] == json!({"k": "v"}));
    Ok(())
}

async fn a_post_to_an_object_is_not_allowed(at: &Ground) -> anyhow::Result<()> {
    at.post("configmaps/a", &config_map("a", &json!({})))
        .await?
        .refused(405, "MethodNotAllowed")?
        .says("the server does not allow this method on the requested resource")?;
    Ok(())
}

async fn the_status_of_a_create_is_dropped(at: &Ground) -> anyhow::Result<()> {
    let mut widget = at.widget("a", &json!({"size": 1}));
    widget["status"] = json!({"phase": "x"});
    let made = at.post("widgets", &widget).await?.created()?;
    ensure!(made["status"].is_null());
    Ok(())
}
