//! `fieldValidation`: what becomes of fields that nobody knows or that stand twice.

use anyhow::ensure;
use serde_json::json;

use crate::conformance::{
    check::checks,
    ground::{Ground, PatchKind, config_map},
};

checks![
    strict_refuses_an_unknown_field,
    strict_names_all_unknown_fields,
    strict_refuses_an_unknown_field_of_a_built_in_kind,
    strict_refuses_a_field_that_stands_twice,
    a_warning_names_an_unknown_field,
    ignore_says_nothing,
    strict_holds_for_patches,
    strict_holds_for_applies,
    an_unknown_level_of_validation_is_refused,
    a_value_of_another_type_in_a_built_in_kind_is_refused,
];

async fn strict_refuses_an_unknown_field(at: &Ground) -> anyhow::Result<()> {
    at.post(
        "widgets?fieldValidation=Strict",
        &at.widget("a", &json!({"size": 1, "odd": 1})),
    )
    .await?
    .refused(400, "BadRequest")?
    .says(
        "Widget in version \"v1\" cannot be handled as a Widget: strict decoding error: unknown field \"spec.odd\"",
    )?;
    Ok(())
}

async fn strict_names_all_unknown_fields(at: &Ground) -> anyhow::Result<()> {
    let spec = json!({"size": 1, "odd": 1, "ports": [{"name": "x", "other": 1}]});
    at.post("widgets?fieldValidation=Strict", &at.widget("a", &spec))
        .await?
        .refused(400, "BadRequest")?
        .mentions("strict decoding error: unknown field \"spec.odd\", unknown field \"spec.ports[0].other\"")?;
    Ok(())
}

async fn strict_refuses_an_unknown_field_of_a_built_in_kind(at: &Ground) -> anyhow::Result<()> {
    let mut body = config_map("a", &json!({}));
    body["odd"] = json!(1);
    at.post("configmaps?fieldValidation=Strict", &body)
        .await?
        .refused(400, "BadRequest")?
        .says(
            "ConfigMap in version \"v1\" cannot be handled as a ConfigMap: strict decoding error: unknown field \"odd\"",
        )?;
    Ok(())
}

async fn strict_refuses_a_field_that_stands_twice(at: &Ground) -> anyhow::Result<()> {
    let headers = [("content-type", "application/json"), ("accept", "application/json")];
    let text = format!(
        r#"{{"apiVersion":"{}/v1","kind":"Widget","metadata":{{"name":"a"}},"spec":{{"size":1,"size":2}}}}"#,
        at.server.group
    );
    at.send(
        "POST",
        "widgets?fieldValidation=Strict",
        &headers,
        Some(text.clone().into()),
    )
    .await?
    .refused(400, "BadRequest")?
    .mentions("strict decoding error: duplicate field \"spec.size\"")?;
    let made = at.send("POST", "widgets", &headers, Some(text.into())).await?;
    ensure!(
        made.warnings == ["299 - \"duplicate field \\\"spec.size\\\"\""],
        "{:?}",
        made.warnings
    );
    ensure!(made.created()?["spec"]["size"] == 2);
    let text = r#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"a"},"data":{"k":"1"},"data":{"k":"2"}}"#;
    at.send("POST", "configmaps?fieldValidation=Strict", &headers, Some(text.into()))
        .await?
        .refused(400, "BadRequest")?
        .mentions("strict decoding error: duplicate field \"data\"")?;
    Ok(())
}

async fn a_warning_names_an_unknown_field(at: &Ground) -> anyhow::Result<()> {
    for path in ["widgets", "widgets?fieldValidation=Warn&dryRun=All"] {
        let made = at
            .post(
                path,
                &at.widget(&format!("a{}", path.len()), &json!({"size": 1, "odd": 1})),
            )
            .await?;
        ensure!(
            made.warnings == ["299 - \"unknown field \\\"spec.odd\\\"\""],
            "{:?}",
            made.warnings
        );
        made.created()?;
    }
    let mut body = config_map("a", &json!({}));
    body["odd"] = json!(1);
    let made = at.post("configmaps", &body).await?;
    ensure!(
        made.warnings == ["299 - \"unknown field \\\"odd\\\"\""],
        "{:?}",
        made.warnings
    );
    Ok(())
}

async fn ignore_says_nothing(at: &Ground) -> anyhow::Result<()> {
    let made = at
        .post(
            "widgets?fieldValidation=Ignore",
            &at.widget("a", &json!({"size": 1, "odd": 1})),
        )
        .await?;
    ensure!(made.warnings.is_empty());
    ensure!(made.created()?["spec"]["odd"].is_null());
    Ok(())
}

async fn strict_holds_for_patches(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    at.merge("widgets/a?fieldValidation=Strict", &json!({"spec": {"odd": 1}}))
        .await?
        .refused(422, "Invalid")?
        .mentions("strict decoding error: unknown field \"spec.odd\"")?;
    at.map("a", &json!({})).await?;
    at.patch(
        PatchKind::Strategic,
        "configmaps/a?fieldValidation=Strict",
        &json!({"odd": 1}),
    )
    .await?
    .refused(422, "Invalid")?
    .mentions("unknown field \"odd\"")?;
    Ok(())
}

async fn strict_holds_for_applies(at: &Ground) -> anyhow::Result<()> {
    let headers = [
        ("content-type", "application/apply-patch+yaml"),
        ("accept", "application/json"),
    ];
    let text = format!(
        "apiVersion: {}/v1\nkind: Widget\nmetadata: {{name: a}}\nspec:\n  size: 1\n  size: 2\n",
        at.server.group
    );
    at.send(
        "PATCH",
        "widgets/a?fieldManager=one&fieldValidation=Strict",
        &headers,
        Some(text.into()),
    )
    .await?
    .refused(400, "BadRequest")?;
    Ok(())
}

async fn an_unknown_level_of_validation_is_refused(at: &Ground) -> anyhow::Result<()> {
    at.post("configmaps?fieldValidation=Some", &config_map("a", &json!({})))
        .await?
        .refused(422, "Invalid")?
        .mentions("fieldValidation: Unsupported value: \"Some\": supported values: ")?;
    Ok(())
}

async fn a_value_of_another_type_in_a_built_in_kind_is_refused(at: &Ground) -> anyhow::Result<()> {
    at.post("configmaps", &config_map("a", &json!({"k": 1})))
        .await?
        .refused(400, "BadRequest")?
        .mentions(
            "ConfigMap in version \"v1\" cannot be handled as a ConfigMap: json: cannot unmarshal number into Go struct \
             field ConfigMap.data",
        )?;
    at.post("configmaps", &config_map("a", &json!("text")))
        .await?
        .refused(400, "BadRequest")?
        .mentions("json: cannot unmarshal string into Go struct field ConfigMap.data of type map[string]string")?;
    Ok(())
}
