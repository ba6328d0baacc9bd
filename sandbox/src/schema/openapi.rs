//! OpenAPI v3 documents, one per group and version, for `kubectl explain`, `apply` and `--validate`.
//!
//! kubectl finds a kind through the paths (`x-kubernetes-group-version-kind` of the operations), learns from the
//! parameters of `patch` what the server can do (`fieldValidation`, `dryRun`), and reads fields and merge keys from
//! the components.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::builtin;

const REFERENCE: &str = "#/components/schemas/";
const OBJECT_META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";
const LIST_META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta";

/// One resource of a document.
#[derive(Clone, Copy, Debug)]
pub struct Described<'a> {
    /// Kind.
    pub kind: &'a str,
    /// Plural name in URLs.
    pub plural: &'a str,
    /// Lives in a namespace.
    pub namespaced: bool,
    /// Subresources with `get`, `put` and `patch`, such as `status`.
    pub subresources: &'a [&'a str],
    /// The schema as the CRD states it; `None` for a built-in kind.
    pub custom: Option<&'a Value>,
}

/// The document of one group and version; the group is "" for core.
#[must_use]
pub fn document(group: &str, version: &str, resources: &[Described<'_>]) -> Value {
    let mut schemas = Map::new();
    let mut paths = Map::new();
    for resource in resources {
        let gvk = json!({"group": group, "version": version, "kind": resource.kind});
        let Some(name) = component(group, version, resource, &gvk, &mut schemas) else {
            continue;
        };
        add_paths(group, version, resource, &gvk, &name, &mut paths);
    }
    add_referenced(&mut schemas);
    json!({
        "openapi": "3.0.0",
        "info": {"title": "Flotilla sandbox", "version": "v1"},
        "paths": paths,
        "components": {"schemas": schemas},
    })
}

/// The path of a group and version below `/openapi/v3/`: `api/v1`, `apis/flotilla.dev/v1alpha1`.
#[must_use]
pub fn document_path(group: &str, version: &str) -> String {
    if group.is_empty() {
        format!("api/{version}")
    } else {
        format!("apis/{group}/{version}")
    }
}

/// The index at `/openapi/v3` from pairs of [`document_path`] and document.
pub fn index<'a>(documents: impl Iterator<Item = (String, &'a Value)>) -> Value {
    let entry = |(path, document): (String, &Value)| {
        let digest = hex::encode_upper(Sha256::digest(document.to_string()));
        let url = format!("/openapi/v3/{path}?hash={digest}");
        (path, json!({"serverRelativeURL": url}))
    };
    json!({"paths": documents.map(entry).collect::<Map<String, Value>>()})
}

fn component(
    group: &str,
    version: &str,
    resource: &Described<'_>,
    gvk: &Value,
    schemas: &mut Map<String, Value>,
) -> Option<String> {
    let Some(raw) = resource.custom else {
        let found = builtin::find(group, version, resource.kind)?;
        let name = builtin::definition_name(found)?;
        schemas.insert(name.to_owned(), published(name)?);
        return Some(name.to_owned());
    };
    let reversed: Vec<&str> = group.rsplit('.').collect();
    let name = format!("{}.{version}.{}", reversed.join("."), resource.kind);
    schemas.insert(name.clone(), custom(raw, gvk));
    let mut list_gvk = gvk.clone();
    list_gvk["kind"] = json!(format!("{}List", resource.kind));
    let list = json!({
        "type": "object",
        "description": format!("{}List is a list of {}", resource.kind, resource.kind),
        "required": ["items"],
        "properties": {
            "apiVersion": text(API_VERSION),
            "kind": text(KIND),
            "metadata": {"allOf": [{"$ref": format!("{REFERENCE}{LIST_META}")}], "default": {}},
            "items": {"type": "array", "items": {"allOf": [{"$ref": format!("{REFERENCE}{name}")}], "default": {}}},
        },
        "x-kubernetes-group-version-kind": [list_gvk],
    });
    schemas.insert(format!("{name}List"), list);
    Some(name)
}

const API_VERSION: &str = "APIVersion defines the versioned schema of this representation of an object. More info: \
    https://git.k8s.io/community/contributors/devel/sig-architecture/api-conventions.md#resources";
const KIND: &str = "Kind is a string value representing the REST resource this object represents. More info: \
    https://git.k8s.io/community/contributors/devel/sig-architecture/api-conventions.md#types-kinds";
const METADATA: &str = "Standard object's metadata. More info: \
    https://git.k8s.io/community/contributors/devel/sig-architecture/api-conventions.md#metadata";

fn text(description: &str) -> Value {
    json!({"type": "string", "description": description})
}

fn custom(raw: &Value, gvk: &Value) -> Value {
    let mut schema = if raw.is_object() {
        raw.clone()
    } else {
        json!({"type": "object"})
    };
    let Value::Object(node) = &mut schema else {
        return schema;
    };
    node.insert("x-kubernetes-group-version-kind".to_owned(), json!([gvk]));
    let properties = node.entry("properties").or_insert_with(|| json!({}));
    if let Value::Object(properties) = properties {
        properties.insert("apiVersion".to_owned(), text(API_VERSION));
        properties.insert("kind".to_owned(), text(KIND));
        let metadata =
            json!({"allOf": [{"$ref": format!("{REFERENCE}{OBJECT_META}")}], "default": {}, "description": METADATA});
        properties.insert("metadata".to_owned(), metadata);
    }
    schema
}

/// A built-in definition with references wrapped so that descriptions may stand beside them, as Kubernetes writes them.
fn published(name: &str) -> Option<Value> {
    let mut schema = builtin::definitions().get(name)?.clone();
    wrap_references(&mut schema);
    Some(schema)
}

fn wrap_references(schema: &mut Value) {
    let Value::Object(node) = schema else { return };
    for child in node
        .get_mut("properties")
        .and_then(Value::as_object_mut)
        .into_iter()
        .flat_map(Map::values_mut)
    {
        wrap_references(child);
    }
    for key in ["items", "additionalProperties"] {
        if let Some(child) = node.get_mut(key) {
            wrap_references(child);
        }
    }
    for key in ["oneOf", "anyOf", "allOf"] {
        for child in node.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten() {
            wrap_references(child);
        }
    }
    if node.len() > 1
        && let Some(target) = node.remove("$ref")
    {
        node.insert("allOf".to_owned(), json!([{"$ref": target}]));
    }
}

/// Adds every built-in definition that the schemas refer to, directly or not.
fn add_referenced(schemas: &mut Map<String, Value>) {
    let mut wanted: Vec<String> = references(&Value::Object(schemas.clone())).into_iter().collect();
    while let Some(name) = wanted.pop() {
        if schemas.contains_key(&name) {
            continue;
        }
        let Some(schema) = published(&name) else { continue };
        wanted.extend(references(&schema));
        schemas.insert(name, schema);
    }
}

fn references(value: &Value) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open = vec![value];
    while let Some(node) = open.pop() {
        match node {
            Value::Object(map) => {
                let target = map
                    .get("$ref")
                    .and_then(Value::as_str)
                    .and_then(|t| t.strip_prefix(REFERENCE));
                found.extend(target.map(str::to_owned));
                open.extend(map.values());
            }
            Value::Array(items) => open.extend(items),
            _ => {}
        }
    }
    found
}

fn add_paths(
    group: &str,
    version: &str,
    resource: &Described<'_>,
    gvk: &Value,
    component: &str,
    paths: &mut Map<String, Value>,
) {
    let base = format!("/{}", document_path(group, version));
    let scope = if resource.namespaced {
        "/namespaces/{namespace}"
    } else {
        ""
    };
    let list = format!("{base}{scope}/{}", resource.plural);
    let operations = |verbs: &[(&str, &str)], parameters: &Value| {
        let strategic = resource.custom.is_none();
        let operation =
            |(method, action): &(&str, &str)| ((*method).to_owned(), operation(action, gvk, component, strategic));
        let mut item: Map<String, Value> = verbs.iter().map(operation).collect();
        item.insert("parameters".to_owned(), parameters.clone());
        Value::Object(item)
    };
    let namespace = json!([path_parameter("namespace")]);
    let named = if resource.namespaced {
        json!([path_parameter("name"), path_parameter("namespace")])
    } else {
        json!([path_parameter("name")])
    };
    let collection = if resource.namespaced { namespace } else { json!([]) };
    let verbs = [("get", "list"), ("post", "post"), ("delete", "deletecollection")];
    paths.insert(list.clone(), operations(&verbs, &collection));
    if resource.namespaced {
        paths.insert(
            format!("{base}/{}", resource.plural),
            operations(&[("get", "list")], &json!([])),
        );
    }
    let verbs = [("get", "get"), ("put", "put"), ("patch", "patch"), ("delete", "delete")];
    paths.insert(format!("{list}/{{name}}"), operations(&verbs, &named));
    for subresource in resource
        .subresources
        .iter()
        .filter(|s| matches!(**s, "status" | "scale"))
    {
        paths.insert(
            format!("{list}/{{name}}/{subresource}"),
            operations(&verbs[..3], &named),
        );
    }
}

/// `strategic`: the kind takes strategic merge patches, which custom resources do not.
fn operation(action: &str, gvk: &Value, component: &str, strategic: bool) -> Value {
    let reference = json!({"$ref": format!("{REFERENCE}{component}")});
    let content = json!({"application/json": {"schema": reference}});
    let mut operation = json!({
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": gvk,
        "responses": {"200": {"description": "OK", "content": content}},
    });
    let names: &[&str] = match action {
        "patch" => &["dryRun", "fieldManager", "fieldValidation", "force", "pretty"],
        "post" | "put" => &["dryRun", "fieldManager", "fieldValidation", "pretty"],
        "delete" => &[
            "dryRun",
            "gracePeriodSeconds",
            "orphanDependents",
            "propagationPolicy",
            "pretty",
        ],
        "list" => &[
            "allowWatchBookmarks",
            "continue",
            "fieldSelector",
            "labelSelector",
            "limit",
            "resourceVersion",
            "resourceVersionMatch",
            "sendInitialEvents",
            "timeoutSeconds",
            "watch",
            "pretty",
        ],
        _ => &["pretty"],
    };
    operation["parameters"] = names.iter().map(|name| query_parameter(name)).collect();
    match action {
        "post" | "put" => operation["requestBody"] = json!({"required": true, "content": content}),
        "patch" => {
            let body = json!({"schema": {"type": "object"}});
            let types = [
                "application/json-patch+json",
                "application/merge-patch+json",
                "application/apply-patch+yaml",
                "application/strategic-merge-patch+json",
            ];
            let types = if strategic { &types[..] } else { &types[..3] };
            let content: Map<String, Value> = types.iter().map(|t| ((*t).to_owned(), body.clone())).collect();
            operation["requestBody"] = json!({"required": true, "content": content});
        }
        _ => {}
    }
    operation
}

fn query_parameter(name: &str) -> Value {
    let kind = match name {
        "force" | "watch" | "allowWatchBookmarks" | "sendInitialEvents" | "orphanDependents" => "boolean",
        "limit" | "timeoutSeconds" | "gracePeriodSeconds" => "integer",
        _ => "string",
    };
    json!({"name": name, "in": "query", "schema": {"type": kind, "uniqueItems": true}})
}

fn path_parameter(name: &str) -> Value {
    json!({"name": name, "in": "path", "required": true, "schema": {"type": "string", "uniqueItems": true}})
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: Described<'_> = Described {
        kind: "Pod",
        plural: "pods",
        namespaced: true,
        subresources: &["status"],
        custom: None,
    };

    #[test]
    fn every_reference_of_a_document_is_in_it() {
        let document = document("", "v1", &[POD]);
        let schemas = document
            .pointer("/components/schemas")
            .and_then(Value::as_object)
            .unwrap();
        for name in references(&document) {
            assert!(schemas.contains_key(&name), "{name}");
        }
        assert!(schemas.len() > 50);
        let containers = &schemas["io.k8s.api.core.v1.PodSpec"]["properties"]["containers"];
        assert_eq!(containers["x-kubernetes-patch-merge-key"], "name");
        assert_eq!(containers["x-kubernetes-list-map-keys"], json!(["name"]));
    }

    #[test]
    fn the_paths_name_the_kind_and_what_patch_can_do() {
        let document = document("", "v1", &[POD]);
        let patch = &document["paths"]["/api/v1/namespaces/{namespace}/pods/{name}"]["patch"];
        assert_eq!(
            patch["x-kubernetes-group-version-kind"],
            json!({"group": "", "version": "v1", "kind": "Pod"})
        );
        let names: Vec<&str> = patch["parameters"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|p| p["name"].as_str())
            .collect();
        assert!(names.contains(&"fieldValidation") && names.contains(&"dryRun"));
    }

    #[test]
    fn a_custom_kind_has_its_own_schema_and_object_metadata() {
        let schema = json!({"type": "object", "properties": {"spec": {"type": "object"}}});
        let job = Described {
            kind: "Job",
            plural: "jobs",
            namespaced: true,
            subresources: &[],
            custom: Some(&schema),
        };
        let document = document("x.flotilla.dev", "v1alpha1", &[job]);
        let component = &document["components"]["schemas"]["dev.flotilla.x.v1alpha1.Job"];
        assert_eq!(
            component["properties"]["metadata"]["allOf"][0]["$ref"],
            format!("{REFERENCE}{OBJECT_META}")
        );
        assert!(document["components"]["schemas"].get(LIST_META).is_some());
        let path = document_path("x.flotilla.dev", "v1alpha1");
        let index = index([(path, &document)].into_iter());
        let url = index["paths"]["apis/x.flotilla.dev/v1alpha1"]["serverRelativeURL"]
            .as_str()
            .unwrap();
        assert!(url.starts_with("/openapi/v3/apis/x.flotilla.dev/v1alpha1?hash="));
    }
}
