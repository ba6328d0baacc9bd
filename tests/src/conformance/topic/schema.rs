//! Structural schemas of custom resources: pruning, defaults, and how what is wrong is told.

use anyhow::ensure;
use serde_json::{Value, json};

use crate::conformance::{answer::Refusal, check::checks, ground::Ground};

checks![
    unknown_fields_are_pruned,
    fields_of_an_open_object_are_kept,
    unknown_metadata_is_dropped,
    absent_fields_get_their_defaults,
    defaults_reach_into_defaulted_objects_and_lists,
    a_null_gets_the_default,
    a_null_where_none_may_be_is_pruned,
    a_nullable_null_stays,
    defaults_are_seen_in_objects_that_a_patch_makes,
    a_value_of_another_type_is_refused,
    a_number_out_of_bounds_is_refused,
    a_value_that_is_no_choice_is_refused,
    a_text_of_the_wrong_shape_is_refused,
    a_missing_field_is_refused,
    an_unparsable_time_is_refused,
    a_second_entry_of_a_key_is_refused,
    a_second_member_of_a_set_is_refused,
    a_list_that_is_too_long_is_refused,
    two_choices_of_one_are_refused,
    an_int_or_string_takes_both_and_nothing_else,
    all_that_is_wrong_is_told_at_once,
    a_missing_spec_is_told_by_its_name,
];

async fn refused(at: &Ground, spec: &Value) -> anyhow::Result<Refusal> {
    at.post("widgets", &at.widget("a", spec))
        .await?
        .refused(422, "Invalid")?
        .about(&at.server.group, "Widget", "a")
}

/// The message of a refusal with one cause.
fn message(at: &Ground, what: &str) -> String {
    format!("Widget.{} \"a\" is invalid: {what}", at.server.group)
}

async fn unknown_fields_are_pruned(at: &Ground) -> anyhow::Result<()> {
    let spec = json!({"size": 1, "odd": 1, "nested": {"odd": 2}, "ports": [{"name": "x", "odd": 3}]});
    let made = at.new_widget("a", &spec).await?;
    ensure!(
        made["spec"]
            == json!({"size": 1, "replicas": 1, "nested": {"depth": 3}, "ports": [{"name": "x", "protocol": "TCP"}]})
    );
    Ok(())
}

async fn fields_of_an_open_object_are_kept(at: &Ground) -> anyhow::Result<()> {
    let free = json!({"anything": {"goes": [1, "two", null, {"three": 3.5}]}});
    let made = at.new_widget("a", &json!({"size": 1, "free": free})).await?;
    ensure!(made["spec"]["free"] == free);
    Ok(())
}

async fn unknown_metadata_is_dropped(at: &Ground) -> anyhow::Result<()> {
    let mut widget = at.widget("a", &json!({"size": 1}));
    widget["metadata"]["odd"] = json!(1);
    let made = at.post("widgets", &widget).await?.created()?;
    ensure!(made["metadata"]["odd"].is_null());
    widget["metadata"] = json!({"name": "b", "labels": {"x": 1}});
    at.post("widgets", &widget)
        .await?
        .refused(400, "BadRequest")?
        .mentions("json: cannot unmarshal number into Go struct field ObjectMeta")?;
    Ok(())
}

async fn absent_fields_get_their_defaults(at: &Ground) -> anyhow::Result<()> {
    let made = at.new_widget("a", &json!({"size": 1})).await?;
    ensure!(made["spec"] == json!({"size": 1, "replicas": 1, "nested": {"depth": 3}}));
    Ok(())
}

async fn defaults_reach_into_defaulted_objects_and_lists(at: &Ground) -> anyhow::Result<()> {
    let spec =
        json!({"size": 1, "replicas": 0, "nested": {}, "ports": [{"name": "x"}, {"name": "y", "protocol": "UDP"}]});
    let made = at.new_widget("a", &spec).await?;
    ensure!(made["spec"]["replicas"] == 0 && made["spec"]["nested"] == json!({"depth": 3}));
    ensure!(made["spec"]["ports"] == json!([{"name": "x", "protocol": "TCP"}, {"name": "y", "protocol": "UDP"}]));
    Ok(())
}

async fn a_null_gets_the_default(at: &Ground) -> anyhow::Result<()> {
    let spec = json!({"size": 1, "replicas": null, "nested": null});
    let made = at.new_widget("a", &spec).await?;
    ensure!(made["spec"] == json!({"size": 1, "replicas": 1, "nested": {"depth": 3}}));
    Ok(())
}

async fn a_null_where_none_may_be_is_pruned(at: &Ground) -> anyhow::Result<()> {
    let made = at.new_widget("a", &json!({"size": 1, "mode": null})).await?;
    ensure!(made["spec"] == json!({"size": 1, "replicas": 1, "nested": {"depth": 3}}));
    Ok(())
}

async fn a_nullable_null_stays(at: &Ground) -> anyhow::Result<()> {
    let made = at
        .new_widget("a", &json!({"size": 1, "nested": {"empty": null}}))
        .await?;
    ensure!(made["spec"]["nested"] == json!({"depth": 3, "empty": null}));
    Ok(())
}

async fn defaults_are_seen_in_objects_that_a_patch_makes(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1, "replicas": 0})).await?;
    let after = at
        .merge(
            "widgets/a",
            &json!({"spec": {"replicas": null, "ports": [{"name": "x"}]}}),
        )
        .await?
        .ok()?;
    ensure!(after["spec"]["replicas"] == 1 && after["spec"]["ports"][0]["protocol"] == "TCP");
    Ok(())
}

async fn a_value_of_another_type_is_refused(at: &Ground) -> anyhow::Result<()> {
    let detail = "Invalid value: \"string\": spec.size in body must be of type integer: \"string\"";
    refused(at, &json!({"size": "large"}))
        .await?
        .mentions(&format!("spec.size: {detail}"))?
        .cause("spec.size", "FieldValueTypeInvalid", detail)?;
    refused(at, &json!({"size": 1.5}))
        .await?
        .mentions("spec.size: Invalid value: \"number\": spec.size in body must be of type integer: \"number\"")?;
    refused(at, &json!({"size": 1, "ports": {"x": 1}}))
        .await?
        .mentions("spec.ports: Invalid value: \"object\": spec.ports in body must be of type array: \"object\"")?;
    refused(at, &json!({"size": 1, "labels": {"x": true}}))
        .await?
        .mentions(
            "spec.labels.x: Invalid value: \"boolean\": spec.labels.x in body must be of type string: \"boolean\"",
        )?;
    Ok(())
}

async fn a_number_out_of_bounds_is_refused(at: &Ground) -> anyhow::Result<()> {
    let detail = "Invalid value: 0: spec.size in body should be greater than or equal to 1";
    refused(at, &json!({"size": 0, "replicas": 0}))
        .await?
        .mentions(&format!("spec.size: {detail}"))?
        .cause("spec.size", "FieldValueInvalid", detail)?;
    refused(at, &json!({"size": 101}))
        .await?
        .mentions("spec.size: Invalid value: 101: spec.size in body should be less than or equal to 100")?;
    Ok(())
}

async fn a_value_that_is_no_choice_is_refused(at: &Ground) -> anyhow::Result<()> {
    let detail = "Unsupported value: \"c\": supported values: \"a\", \"b\"";
    refused(at, &json!({"size": 1, "mode": "c"}))
        .await?
        .mentions(&format!("spec.mode: {detail}"))?
        .cause("spec.mode", "FieldValueNotSupported", detail)?;
    Ok(())
}

async fn a_text_of_the_wrong_shape_is_refused(at: &Ground) -> anyhow::Result<()> {
    refused(at, &json!({"size": 1, "name": "a"}))
        .await?
        .mentions("spec.name: Invalid value: \"a\": spec.name in body should be at least 2 chars long")?;
    refused(at, &json!({"size": 1, "name": "abcdefghi"}))
        .await?
        .mentions("spec.name: Too long: may not be more than 8 bytes")?;
    refused(at, &json!({"size": 1, "name": "A1"}))
        .await?
        .mentions("spec.name: Invalid value: \"A1\": spec.name in body should match '^[a-z]+$'")?;
    Ok(())
}

async fn a_missing_field_is_refused(at: &Ground) -> anyhow::Result<()> {
    refused(at, &json!({}))
        .await?
        .mentions("spec.size: Required value")?
        .cause("spec.size", "FieldValueRequired", "Required value")?;
    refused(at, &json!({"size": 1, "ports": [{"port": 1}]}))
        .await?
        .mentions("spec.ports[0].name: Required value")?;
    Ok(())
}

async fn an_unparsable_time_is_refused(at: &Ground) -> anyhow::Result<()> {
    refused(at, &json!({"size": 1, "when": "soon"}))
        .await?
        .mentions("spec.when: Invalid value: \"soon\": spec.when in body must be of type date-time: \"soon\"")?;
    at.new_widget("a", &json!({"size": 1, "when": "2026-01-02T03:04:05.678+02:00"}))
        .await?;
    Ok(())
}

async fn a_second_entry_of_a_key_is_refused(at: &Ground) -> anyhow::Result<()> {
    let detail = "Duplicate value: {\"name\":\"x\"}";
    refused(at, &json!({"size": 1, "ports": [{"name": "x"}, {"name": "x"}]}))
        .await?
        .says(&message(at, &format!("spec.ports[1]: {detail}")))?
        .cause("spec.ports[1]", "FieldValueDuplicate", detail)?;
    Ok(())
}

async fn a_second_member_of_a_set_is_refused(at: &Ground) -> anyhow::Result<()> {
    refused(at, &json!({"size": 1, "tags": ["x", "y", "x"]}))
        .await?
        .says(&message(at, "spec.tags[2]: Duplicate value: \"x\""))?;
    Ok(())
}

async fn a_list_that_is_too_long_is_refused(at: &Ground) -> anyhow::Result<()> {
    let ports: Vec<Value> = (0..6).map(|index| json!({"name": format!("p{index}")})).collect();
    refused(at, &json!({"size": 1, "ports": ports}))
        .await?
        .mentions("spec.ports: Too many: 6: must have at most 5 items")?;
    Ok(())
}

async fn two_choices_of_one_are_refused(at: &Ground) -> anyhow::Result<()> {
    refused(at, &json!({"size": 1, "one": {"left": "x", "right": "y"}}))
        .await?
        .mentions("\"spec.one\" must validate one and only one schema (oneOf). Found 2 valid alternatives")?;
    refused(at, &json!({"size": 1, "one": {}}))
        .await?
        .mentions("\"spec.one\" must validate one and only one schema (oneOf). Found none valid")?;
    Ok(())
}

async fn an_int_or_string_takes_both_and_nothing_else(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1, "limit": 3})).await?;
    at.new_widget("b", &json!({"size": 1, "limit": "50%"})).await?;
    refused(at, &json!({"size": 1, "limit": true})).await?.mentions(
        "spec.limit: Invalid value: \"boolean\": spec.limit in body must be of type integer,string: \"boolean\"",
    )?;
    Ok(())
}

async fn all_that_is_wrong_is_told_at_once(at: &Ground) -> anyhow::Result<()> {
    let refusal = refused(at, &json!({"mode": "c", "name": "A1"})).await?;
    let causes = refusal.status["details"]["causes"].as_array().map(Vec::len);
    ensure!(causes == Some(4), "{}", refusal.status);
    refusal
        .mentions("spec.mode: Unsupported value")?
        .mentions("spec.name: Invalid value")?
        .mentions("spec.size: Required value")?
        .mentions(
            "<nil>: Invalid value: null: some validation rules were not checked because the object was invalid; \
             correct the existing errors to complete validation",
        )?;
    Ok(())
}

async fn a_missing_spec_is_told_by_its_name(at: &Ground) -> anyhow::Result<()> {
    let mut widget = at.widget("a", &json!({}));
    widget.as_object_mut().map(|widget| widget.remove("spec"));
    at.post("widgets", &widget)
        .await?
        .refused(422, "Invalid")?
        .mentions("spec: Required value")?;
    Ok(())
}
