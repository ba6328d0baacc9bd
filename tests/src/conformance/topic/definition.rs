//! CustomResourceDefinitions themselves.

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::conformance::{check::checks, ground::Ground};

checks![
    a_definition_is_established_and_completed,
    a_definition_is_named_by_plural_and_group,
    a_definition_needs_a_structural_schema,
    a_definition_has_one_storage_version,
    a_default_has_to_fit_its_schema,
    a_rule_that_does_not_compile_is_refused,
    a_rule_of_an_unknown_field_is_refused differs "CEL is parsed, not type-checked, when a definition is applied",
    a_group_and_a_scope_cannot_change,
    a_changed_schema_is_obeyed,
    what_was_valid_before_a_change_stays_unless_touched,
    a_definition_takes_its_objects_with_it,
    a_second_definition_of_the_names_waits,
    versions_share_their_objects,
];

fn definition(group: &str, plural: &str, schema: &Value) -> Value {
    let kind = format!("{}{}", plural[..1].to_uppercase(), &plural[1..]);
    json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.{group}")},
        "spec": {"group": group, "scope": "Namespaced", "names": {"plural": plural, "kind": kind},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": schema}}]}})
}

fn schema(spec: &Value) -> Value {
    json!({"type": "object", "properties": {"spec": spec}})
}

/// A group of the check's own.
fn group(at: &Ground) -> String {
    format!("{}.conformance.flotilla.dev", at.namespace)
}

fn has_condition(definition: &Value, kind: &str, state: &str) -> bool {
    let conditions = definition["status"]["conditions"].as_array();
    conditions.is_some_and(|all| {
        all.iter()
            .any(|found| found["type"] == kind && found["status"] == state)
    })
}

/// Makes the definition and waits until it is served; returns the path of its objects.
async fn define(at: &Ground, definition: &Value) -> anyhow::Result<String> {
    at.post("customresourcedefinitions", definition).await?.created()?;
    let (group, plural) = (&definition["spec"]["group"], &definition["spec"]["names"]["plural"]);
    let objects = format!(
        "/apis/{}/v1/namespaces/{}/{}",
        group.as_str().context("a group")?,
        at.namespace,
        plural.as_str().context("a plural")?
    );
    at.until(&objects, |_| true).await?;
    Ok(objects)
}

async fn undefine(at: &Ground, definition: &Value) -> anyhow::Result<()> {
    let name = definition["metadata"]["name"].as_str().context("a name")?;
    at.delete(&format!("customresourcedefinitions/{name}")).await?.ok()?;
    Ok(())
}

async fn refused(at: &Ground, definition: &Value) -> anyhow::Result<crate::conformance::answer::Refusal> {
    at.post("customresourcedefinitions", definition)
        .await?
        .refused(422, "Invalid")
}

async fn a_definition_is_established_and_completed(at: &Ground) -> anyhow::Result<()> {
    let definition = definition(&group(at), "things", &schema(&json!({"type": "object"})));
    define(at, &definition).await?;
    let path = format!("customresourcedefinitions/things.{}", group(at));
    let read = at
        .until(&path, |read| has_condition(read, "Established", "True"))
        .await?;
    ensure!(has_condition(&read, "NamesAccepted", "True"));
    ensure!(
        read["spec"]["names"]
            == json!({"plural": "things", "singular": "things", "kind": "Things", "listKind": "ThingsList"})
    );
    ensure!(
        read["status"]["acceptedNames"] == read["spec"]["names"] && read["status"]["storedVersions"] == json!(["v1"])
    );
    ensure!(read["spec"]["conversion"] == json!({"strategy": "None"}));
    undefine(at, &definition).await
}

async fn a_definition_is_named_by_plural_and_group(at: &Ground) -> anyhow::Result<()> {
    let mut definition = definition(&group(at), "things", &schema(&json!({"type": "object"})));
    definition["metadata"]["name"] = json!("other.example.dev");
    refused(at, &definition).await?.mentions(&format!(
        "metadata.name: Invalid value: \"other.example.dev\": must be spec.names.plural+\".\"+spec.group"
    ))?;
    Ok(())
}

async fn a_definition_needs_a_structural_schema(at: &Ground) -> anyhow::Result<()> {
    let untyped = schema(&json!({"properties": {"x": {"type": "string"}}}));
    refused(at, &definition(&group(at), "things", &untyped))
        .await?
        .mentions(
            "spec.validation.openAPIV3Schema.properties[spec].type: Required value: must not be empty for specified object fields",
        )
        .or_else(|_| anyhow::bail!("no mention of the missing type"))?;
    let mut without = definition(&group(at), "things", &json!({}));
    without["spec"]["versions"][0]
        .as_object_mut()
        .map(|version| version.remove("schema"));
    refused(at, &without)
        .await?
        .mentions("spec.versions[0].schema.openAPIV3Schema: Required value")?;
    Ok(())
}

async fn a_definition_has_one_storage_version(at: &Ground) -> anyhow::Result<()> {
    let mut definition = definition(&group(at), "things", &schema(&json!({"type": "object"})));
    definition["spec"]["versions"][0]["storage"] = json!(false);
    refused(at, &definition)
        .await?
        .mentions("must have exactly one version marked as storage version")?;
    Ok(())
}

async fn a_default_has_to_fit_its_schema(at: &Ground) -> anyhow::Result<()> {
    let wrong = json!({"type": "object", "properties": {"x": {"type": "integer", "default": "one"}}});
    refused(at, &definition(&group(at), "things", &schema(&wrong)))
        .await?
        .mentions(".properties[x].default: Invalid value: ")?
        .mentions("must be of type integer")?;
    Ok(())
}

async fn a_rule_that_does_not_compile_is_refused(at: &Ground) -> anyhow::Result<()> {
    let wrong = json!({"type": "object", "x-kubernetes-validations": [{"rule": "self.x =="}],
        "properties": {"x": {"type": "integer"}}});
    refused(at, &definition(&group(at), "things", &schema(&wrong)))
        .await?
        .mentions(".x-kubernetes-validations[0].rule: Invalid value: ")?
        .mentions("compilation failed: ERROR: ")?;
    Ok(())
}

async fn a_rule_of_an_unknown_field_is_refused(at: &Ground) -> anyhow::Result<()> {
    let wrong = json!({"type": "object", "x-kubernetes-validations": [{"rule": "self.y == 1"}],
        "properties": {"x": {"type": "integer"}}});
    refused(at, &definition(&group(at), "things", &schema(&wrong)))
        .await?
        .mentions("undefined field 'y'")?;
    Ok(())
}

async fn a_group_and_a_scope_cannot_change(at: &Ground) -> anyhow::Result<()> {
    let definition = definition(&group(at), "things", &schema(&json!({"type": "object"})));
    define(at, &definition).await?;
    let path = format!("customresourcedefinitions/things.{}", group(at));
    at.merge(&path, &json!({"spec": {"scope": "Cluster"}}))
        .await?
        .refused(422, "Invalid")?
        .mentions("spec.scope: Invalid value: \"Cluster\": field is immutable")?;
    undefine(at, &definition).await
}

async fn a_changed_schema_is_obeyed(at: &Ground) -> anyhow::Result<()> {
    let mut definition = definition(&group(at), "things", &schema(&json!({"type": "object"})));
    let objects = define(at, &definition).await?;
    let thing = |x: i64| {
        json!({"apiVersion": format!("{}/v1", group(at)), "kind": "Things",
        "metadata": {"generateName": "a-"}, "spec": {"x": x}})
    };
    ensure!(at.post(&objects, &thing(1)).await?.created()?["spec"]["x"].is_null());
    definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"] =
        schema(&json!({"type": "object", "properties": {"x": {"type": "integer"}}}));
    let path = format!("customresourcedefinitions/things.{}", group(at));
    at.merge(&path, &json!({"spec": definition["spec"]})).await?.ok()?;
    crate::eventually("the new schema", crate::conformance::ground::PATIENCE, || async {
        let made = at.post(&objects, &thing(1)).await?.created()?;
        Ok((made["spec"]["x"] == 1).then_some(()))
    })
    .await?;
    undefine(at, &definition).await
}

async fn what_was_valid_before_a_change_stays_unless_touched(at: &Ground) -> anyhow::Result<()> {
    let loose = json!({"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}});
    let definition = definition(&group(at), "things", &schema(&loose));
    let objects = define(at, &definition).await?;
    let thing = |name: &str, x: i64| {
        json!({"apiVersion": format!("{}/v1", group(at)), "kind": "Things",
        "metadata": {"name": name}, "spec": {"x": x, "y": 0}})
    };
    at.post(&objects, &thing("a", 9)).await?.created()?;
    let mut tight = loose;
    tight["properties"]["x"]["maximum"] = json!(5);
    let mut spec = definition["spec"].clone();
    spec["versions"][0]["schema"]["openAPIV3Schema"] = schema(&tight);
    at.merge(
        &format!("customresourcedefinitions/things.{}", group(at)),
        &json!({"spec": spec}),
    )
    .await?
    .ok()?;
    crate::eventually("the new schema", crate::conformance::ground::PATIENCE, || async {
        let refused = at.post(&format!("{objects}?dryRun=All"), &thing("b", 9)).await?;
        Ok((refused.code == 422).then_some(()))
    })
    .await?;
    let path = format!("{objects}/a");
    at.merge(&path, &json!({"spec": {"y": 1}})).await?.ok()?;
    at.merge(&path, &json!({"spec": {"x": 8}}))
        .await?
        .refused(422, "Invalid")?;
    at.merge(&path, &json!({"spec": {"x": 5}})).await?.ok()?;
    undefine(at, &definition).await
}

async fn a_definition_takes_its_objects_with_it(at: &Ground) -> anyhow::Result<()> {
    let definition = definition(&group(at), "things", &schema(&json!({"type": "object"})));
    let objects = define(at, &definition).await?;
    let thing = json!({"apiVersion": format!("{}/v1", group(at)), "kind": "Things", "metadata": {"name": "a",
        "finalizers": ["example.dev/x"]}});
    at.post(&objects, &thing).await?.created()?;
    undefine(at, &definition).await?;
    let path = format!("{objects}/a");
    at.until(&path, |thing| thing["metadata"]["deletionTimestamp"].is_string())
        .await?;
    let answer = at
        .post(
            &objects,
            &json!({"apiVersion": format!("{}/v1", group(at)), "kind": "Things", "metadata": {"name": "b"}}),
        )
        .await?;
    answer
        .refused(403, "Forbidden")?
        .mentions("create not allowed while custom resource definition is terminating")?;
    at.merge(&path, &json!({"metadata": {"finalizers": null}}))
        .await?
        .ok()?;
    at.is_gone(&format!("customresourcedefinitions/things.{}", group(at)))
        .await?;
    at.is_gone(&objects).await
}

async fn a_second_definition_of_the_names_waits(at: &Ground) -> anyhow::Result<()> {
    let first = definition(&group(at), "things", &schema(&json!({"type": "object"})));
    define(at, &first).await?;
    let mut second = definition(&group(at), "others", &schema(&json!({"type": "object"})));
    second["spec"]["names"]["kind"] = json!("Things");
    at.post("customresourcedefinitions", &second).await?.created()?;
    let path = format!("customresourcedefinitions/others.{}", group(at));
    let read = at
        .until(&path, |read| has_condition(read, "NamesAccepted", "False"))
        .await?;
    ensure!(!has_condition(&read, "Established", "True"));
    undefine(at, &second).await?;
    undefine(at, &first).await
}

async fn versions_share_their_objects(at: &Ground) -> anyhow::Result<()> {
    let mut definition = definition(
        &group(at),
        "things",
        &schema(&json!({"type": "object", "properties": {"x": {"type": "integer"}}})),
    );
    let mut old = definition["spec"]["versions"][0].clone();
    old["name"] = json!("v1beta1");
    old["storage"] = json!(false);
    old["deprecated"] = json!(true);
    definition["spec"]["versions"]
        .as_array_mut()
        .context("versions")?
        .push(old);
    let objects = define(at, &definition).await?;
    let thing = json!({"apiVersion": format!("{}/v1", group(at)), "kind": "Things", "metadata": {"name": "a"}, "spec": {"x": 1}});
    at.post(&objects, &thing).await?.created()?;
    let answer = at.get(&format!("{}/a", objects.replace("/v1/", "/v1beta1/"))).await?;
    ensure!(
        answer
            .warnings
            .iter()
            .any(|warning| warning.contains("v1beta1 Things is deprecated")),
        "{:?}",
        answer.warnings
    );
    let old = answer.ok()?;
    ensure!(old["apiVersion"] == format!("{}/v1beta1", group(at)) && old["spec"]["x"] == 1);
    undefine(at, &definition).await
}
