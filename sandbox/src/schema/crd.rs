//! Custom resource definitions: are they valid, and what do they say.
//!
//! Source: `apiextensions-apiserver/pkg/apis/apiextensions/validation/validation.go`.

use serde_json::{Map, Value, json};

use super::{
    ResourceSchema, SchemaError,
    cause::Cause,
    path,
    structural::{Additional, Structural},
    subresource::ScalePaths,
};

/// One version of a custom resource.
#[derive(Clone, Debug)]
pub struct CrdVersion {
    /// Name, such as `v1alpha1`.
    pub name: String,
    /// Reachable through the API.
    pub served: bool,
    /// Objects are stored in this version.
    pub storage: bool,
    /// `/status` exists.
    pub has_status: bool,
    /// `/scale` exists, with its paths.
    pub scale: Option<ScalePaths>,
    /// The parsed schema.
    pub schema: ResourceSchema,
    /// `additionalPrinterColumns` as they are.
    pub columns: Vec<Value>,
    /// JSON paths that field selectors may name.
    pub selectable: Vec<String>,
}

/// The versions of a CRD that [`check`] accepts.
///
/// # Errors
/// When a version's schema is malformed.
pub fn versions(crd: &Value) -> Result<Vec<CrdVersion>, SchemaError> {
    let list = crd
        .pointer("/spec/versions")
        .and_then(Value::as_array)
        .map_or(&[] as &[Value], Vec::as_slice);
    list.iter().map(version).collect()
}

fn version(raw: &Value) -> Result<CrdVersion, SchemaError> {
    let list = |key: &str| raw.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    let schema = match raw.pointer("/schema/openAPIV3Schema") {
        Some(schema) => ResourceSchema::custom(schema)?,
        None => ResourceSchema::open(),
    };
    let path_of = |field: &Value| field.get("jsonPath").and_then(Value::as_str).map(str::to_owned);
    Ok(CrdVersion {
        name: raw.get("name").and_then(Value::as_str).unwrap_or_default().to_owned(),
        served: raw.get("served").and_then(Value::as_bool) == Some(true),
        storage: raw.get("storage").and_then(Value::as_bool) == Some(true),
        has_status: raw.pointer("/subresources/status").is_some(),
        scale: raw.pointer("/subresources/scale").and_then(ScalePaths::parse),
        schema,
        columns: list("additionalPrinterColumns"),
        selectable: list("selectableFields").iter().filter_map(path_of).collect(),
    })
}

/// Everything that is wrong with a CRD, beyond its own schema.
#[must_use]
pub fn check(crd: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let spec = &crd["spec"];
    names(crd, spec, &mut causes);
    match spec["scope"].as_str() {
        Some("Namespaced" | "Cluster") => {}
        Some(_) => {
            let known = [json!("Cluster"), json!("Namespaced")];
            causes.push(Cause::not_supported("spec.scope", &spec["scope"], &known));
        }
        None => causes.push(Cause::required("spec.scope", "")),
    }
    let versions = spec["versions"].as_array().map_or(&[] as &[Value], Vec::as_slice);
    if versions.is_empty() {
        causes.push(Cause::required("spec.versions", "must have at least one version"));
    }
    let stored = versions.iter().filter(|v| v["storage"] == json!(true)).count();
    if stored != 1 {
        let detail = "must have exactly one version marked as storage version";
        causes.push(Cause::invalid(
            "spec.versions",
            spec.get("versions").unwrap_or(&Value::Null),
            detail,
        ));
    }
    // One schema for all versions is a schema of the definition: that is where the real server looks for its faults.
    let shared = versions
        .iter()
        .all(|version| version["schema"] == versions[0]["schema"]);
    for (i, version) in versions.iter().enumerate() {
        let at = path::index("spec.versions", i);
        let earlier = versions[..i].iter().any(|v| v["name"] == version["name"]);
        check_version(version, earlier, &at, &mut causes);
        let schema = match version.pointer("/schema/openAPIV3Schema") {
            None => Err("schema.openAPIV3Schema"),
            Some(schema) => Ok(schema),
        };
        match schema {
            Err(field) => causes.push(Cause::required(&path::child(&at, field), "schemas are required")),
            Ok(schema) if shared && i == 0 => check_schema(schema, "spec.validation.openAPIV3Schema", &mut causes),
            Ok(_) if shared => {}
            Ok(schema) => check_schema(schema, &path::child(&at, "schema.openAPIV3Schema"), &mut causes),
        }
    }
    causes
}

fn names(crd: &Value, spec: &Value, causes: &mut Vec<Cause>) {
    let group = spec["group"].as_str().unwrap_or_default();
    let plural = spec
        .pointer("/names/plural")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let name = crd.pointer("/metadata/name").cloned().unwrap_or(Value::Null);
    let wanted = format!("{plural}.{group}");
    if name.as_str() != Some(&wanted) {
        let detail = "must be spec.names.plural+\".\"+spec.group";
        causes.push(Cause::invalid("metadata.name", &name, detail));
    }
    if group.is_empty() {
        causes.push(Cause::required("spec.group", ""));
    } else if !group.contains('.') {
        let detail = "should be a domain with at least one dot";
        causes.push(Cause::invalid("spec.group", &spec["group"], detail));
    } else if !super::format::matches("k8s-long-name", group) {
        causes.push(Cause::invalid("spec.group", &spec["group"], SUBDOMAIN));
    }
    for (field, required, lower) in [
        ("plural", true, true),
        ("kind", true, false),
        ("singular", false, true),
        ("listKind", false, false),
    ] {
        let at = format!("spec.names.{field}");
        let text = spec
            .pointer("/names")
            .and_then(|n| n.get(field))
            .and_then(Value::as_str)
            .unwrap_or_default();
        if text.is_empty() {
            if required {
                causes.push(Cause::required(&at, ""));
            }
            continue;
        }
        let shaped = if lower { text.to_owned() } else { text.to_lowercase() };
        if !super::format::matches("k8s-short-name", &shaped) {
            let detail = if lower { LABEL } else { KIND };
            causes.push(Cause::invalid(&at, &json!(text), detail));
        }
    }
}

const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', \
    and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
    '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic \
    character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is \
    '[a-z]([-a-z0-9]*[a-z0-9])?')";
const KIND: &str = "may have mixed case, but should otherwise match: a DNS-1035 label must consist of lower case alphanumeric \
    characters or '-', start with an alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or \
    'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";

fn check_version(version: &Value, earlier: bool, at: &str, causes: &mut Vec<Cause>) {
    let name = &version["name"];
    match name.as_str() {
        Some(text) if super::format::matches("k8s-short-name", text) => {}
        Some(_) => causes.push(Cause::invalid(&path::child(at, "name"), name, LABEL)),
        None => causes.push(Cause::required(&path::child(at, "name"), "")),
    }
    if earlier {
        causes.push(Cause::duplicate(&path::child(at, "name"), name));
    }
    if let Some(scale) = version.pointer("/subresources/scale") {
        check_scale(scale, &path::child(at, "subresources.scale"), causes);
    }
}

fn check_schema(schema: &Value, here: &str, causes: &mut Vec<Cause>) {
    if schema["type"] != json!("object") {
        let detail = "must be object at the root";
        let kind = schema.get("type").cloned().unwrap_or_else(|| json!(""));
        causes.push(if kind == json!("") {
            Cause::required(&path::child(here, "type"), "must not be empty at the root")
        } else {
            Cause::invalid(&path::child(here, "type"), &kind, detail)
        });
    }
    structure(schema, here, Place::Root, causes);
    match Structural::parse(schema) {
        Ok(parsed) => compiled(&parsed, here, causes),
        Err(error) => causes.push(Cause::invalid(here, &json!(""), &error.to_string())),
    }
}

fn check_scale(scale: &Value, at: &str, causes: &mut Vec<Cause>) {
    for (field, prefix, required) in [
        ("specReplicasPath", ".spec.", true),
        ("statusReplicasPath", ".status.", true),
        ("labelSelectorPath", ".s", false),
    ] {
        let here = path::child(at, field);
        match scale.get(field).and_then(Value::as_str) {
            Some(text) if text.starts_with(prefix) => {}
            Some(text) => {
                let detail = format!("should be a json path under {}", prefix.trim_end_matches('.'));
                causes.push(Cause::invalid(&here, &json!(text), &detail));
            }
            None if required => causes.push(Cause::required(&here, "")),
            None => {}
        }
    }
}

/// Where a node stands; only nodes outside junctors must have a type and may have the structural extensions.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Root,
    Inside,
    Junctor,
}

/// The rules that make a schema structural.
fn structure(schema: &Value, at: &str, place: Place, causes: &mut Vec<Cause>) {
    let Value::Object(node) = schema else {
        causes.push(Cause::invalid(at, schema, "must be a schema object"));
        return;
    };
    keywords(node, at, place, causes);
    lists(node, at, causes);
    let below = if place == Place::Junctor {
        Place::Junctor
    } else {
        Place::Inside
    };
    for (name, child) in node.get("properties").and_then(Value::as_object).into_iter().flatten() {
        structure(child, &path::key(&path::child(at, "properties"), name), below, causes);
    }
    if let Some(items) = node.get("items") {
        structure(items, &path::child(at, "items"), below, causes);
    }
    if let Some(additional @ Value::Object(_)) = node.get("additionalProperties") {
        structure(additional, &path::child(at, "additionalProperties"), below, causes);
    }
    for junctor in ["allOf", "anyOf", "oneOf"] {
        for (i, branch) in node
            .get(junctor)
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .enumerate()
        {
            structure(
                branch,
                &path::index(&path::child(at, junctor), i),
                Place::Junctor,
                causes,
            );
        }
    }
    if let Some(not) = node.get("not") {
        structure(not, &path::child(at, "not"), Place::Junctor, causes);
    }
}

fn keywords(node: &Map<String, Value>, at: &str, place: Place, causes: &mut Vec<Cause>) {
    let on = |key: &str| node.get(key) == Some(&json!(true));
    let typed = node.get("type").and_then(Value::as_str).is_some_and(|t| !t.is_empty());
    let free = on("x-kubernetes-int-or-string") || on("x-kubernetes-preserve-unknown-fields");
    if place == Place::Inside && !typed && !free {
        causes.push(Cause::required(
            &path::child(at, "type"),
            "must not be empty for specified object fields",
        ));
    }
    if place == Place::Junctor {
        for key in ["default", "additionalProperties", "nullable"] {
            if node.contains_key(key) {
                causes.push(Cause::forbidden(
                    &path::child(at, key),
                    "must be undefined to be structural",
                ));
            }
        }
    }
    for key in [
        "$ref",
        "definitions",
        "dependencies",
        "id",
        "patternProperties",
        "additionalItems",
    ] {
        if node.contains_key(key) {
            causes.push(Cause::forbidden(
                &path::child(at, key),
                &format!("{key} is not supported"),
            ));
        }
    }
    if on("uniqueItems") {
        causes.push(Cause::forbidden(
            &path::child(at, "uniqueItems"),
            "uniqueItems cannot be set to true since the runtime complexity becomes quadratic",
        ));
    }
    let fixed = node
        .get("properties")
        .and_then(Value::as_object)
        .is_some_and(|p| !p.is_empty());
    if fixed && node.get("additionalProperties").is_some_and(|a| *a != json!(false)) {
        let here = path::child(at, "additionalProperties");
        causes.push(Cause::forbidden(
            &here,
            "additionalProperties and properties are mutual exclusive",
        ));
    }
    if node.get("additionalProperties") == Some(&json!(false)) {
        let here = path::child(at, "additionalProperties");
        causes.push(Cause::forbidden(&here, "additionalProperties cannot be set to false"));
    }
    if node.get("type") == Some(&json!("array")) && !node.contains_key("items") && place != Place::Junctor {
        causes.push(Cause::required(&path::child(at, "items"), "must be specified"));
    }
}

fn lists(node: &Map<String, Value>, at: &str, causes: &mut Vec<Cause>) {
    let keys = node.get("x-kubernetes-list-map-keys").and_then(Value::as_array);
    match node.get("x-kubernetes-list-type") {
        None if keys.is_some() => {
            let here = path::child(at, "x-kubernetes-list-type");
            causes.push(Cause::required(
                &here,
                "must be map if x-kubernetes-list-map-keys is non-empty",
            ));
        }
        Some(Value::String(kind)) if kind == "map" => {
            let here = path::child(at, "x-kubernetes-list-map-keys");
            let Some(keys) = keys.filter(|k| !k.is_empty()) else {
                causes.push(Cause::required(
                    &here,
                    "must not be empty if x-kubernetes-list-type is map",
                ));
                return;
            };
            let items = node.get("items").unwrap_or(&Value::Null);
            for (i, key) in keys.iter().enumerate() {
                let name = key.as_str().unwrap_or_default();
                if items.pointer("/properties").and_then(|p| p.get(name)).is_none() {
                    let detail = "must be the name of a property of the items";
                    causes.push(Cause::invalid(&path::index(&here, i), key, detail));
                } else if !required_or_default(items, name) {
                    let here = format!("{}[{name}].default", path::child(at, "items.properties"));
                    let detail = "this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property";
                    causes.push(Cause::required(&here, detail));
                }
            }
        }
        Some(Value::String(kind)) if kind == "set" || kind == "atomic" => {}
        Some(other) => {
            let known = [json!("atomic"), json!("map"), json!("set")];
            causes.push(Cause::not_supported(
                &path::child(at, "x-kubernetes-list-type"),
                other,
                &known,
            ));
        }
        None => {}
    }
}

fn required_or_default(items: &Value, name: &str) -> bool {
    let required = items["required"]
        .as_array()
        .is_some_and(|r| r.iter().any(|k| k == name));
    required
        || items
            .pointer("/properties")
            .and_then(|p| p.get(name))
            .is_some_and(|p| p.get("default").is_some())
}

/// CEL rules that do not compile and defaults that the schema itself refuses.
fn compiled(schema: &Structural, at: &str, causes: &mut Vec<Cause>) {
    for (i, rule) in schema.rules.iter().enumerate() {
        for (part, source, error) in rule.compile_errors() {
            let here = path::child(&path::index(&path::child(at, "x-kubernetes-validations"), i), part);
            causes.push(Cause::invalid(
                &here,
                &json!(source),
                &format!("compilation failed: {error}"),
            ));
        }
    }
    if let Some(default) = &schema.default {
        let mut refused = Vec::new();
        let mut filled = default.clone();
        super::default::default(&mut filled, schema);
        super::validate::check(&filled, schema, "", &mut refused);
        let here = path::child(at, "default");
        causes.extend(refused.into_iter().map(|c| {
            let field = if c.field == "<nil>" {
                here.clone()
            } else {
                path::child(&here, &c.field)
            };
            Cause { field, ..c }
        }));
    }
    for (name, child) in &schema.properties {
        compiled(child, &path::key(&path::child(at, "properties"), name), causes);
    }
    if let Some(items) = &schema.items {
        compiled(items, &path::child(at, "items"), causes);
    }
    if let Some(Additional::Schema(additional)) = &schema.additional {
        compiled(additional, &path::child(at, "additionalProperties"), causes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crd(schema: &Value) -> Value {
        json!({"metadata": {"name": "as.x.dev"}, "spec": {"group": "x.dev", "scope": "Namespaced",
            "names": {"plural": "as", "singular": "a", "kind": "A", "listKind": "AList"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": schema}}]}})
    }

    fn messages(crd: &Value) -> Vec<String> {
        check(crd).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_plain_crd_is_valid() {
        let good = crd(&json!({"type": "object", "properties": {"spec": {"type": "object"}}}));
        assert_eq!(messages(&good), [] as [&str; 0]);
        assert_eq!(versions(&good).unwrap().len(), 1);
    }

    #[test]
    fn names_scope_and_storage_are_checked() {
        let mut bad = crd(&json!({"type": "object"}));
        bad["metadata"]["name"] = json!("bs.x.dev");
        bad["spec"]["scope"] = json!("Everywhere");
        bad["spec"]["versions"][0]["storage"] = json!(false);
        let found = messages(&bad).join("\n");
        assert!(
            found.contains(r#"metadata.name: Invalid value: "bs.x.dev": must be spec.names.plural+"."+spec.group"#),
            "{found}"
        );
        assert!(
            found.contains(r#"spec.scope: Unsupported value: "Everywhere": supported values: "Cluster", "Namespaced""#)
        );
        assert!(found.contains("must have exactly one version marked as storage version"));
    }

    #[test]
    fn fields_without_type_are_not_structural() {
        let found = messages(&crd(&json!({"type": "object", "properties": {"spec": {}}})));
        let at = "spec.validation.openAPIV3Schema.properties[spec].type";
        assert_eq!(
            found,
            [format!(
                "{at}: Required value: must not be empty for specified object fields"
            )]
        );
    }

    #[test]
    fn rules_and_defaults_are_checked_when_the_crd_is_written() {
        let schema = json!({"type": "object", "properties": {
            "a": {"type": "integer", "minimum": 1, "default": 0},
            "b": {"type": "string", "x-kubernetes-validations": [{"rule": "self =="}]}}});
        let found = messages(&crd(&schema));
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(
            found[0].contains("properties[a].default: Invalid value: 0"),
            "{found:?}"
        );
        assert!(
            found[1].contains("x-kubernetes-validations[0].rule: Invalid value"),
            "{found:?}"
        );
    }
}
