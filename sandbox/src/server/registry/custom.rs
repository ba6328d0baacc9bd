//! Resources that a CustomResourceDefinition describes.

use serde_json::Value;

use super::{Column, Resource, api_version};
use crate::{
    schema::{ResourceSchema, subresource::ScalePaths},
    store::object::ResourceKey,
};

const VERBS: &[&str] = &[
    "delete",
    "deletecollection",
    "get",
    "list",
    "patch",
    "create",
    "update",
    "watch",
];

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().map(text).collect()
}

/// The served versions of a definition whose names were accepted.
pub fn resources(definition: &Value) -> Vec<Resource> {
    let spec = &definition["spec"];
    let names = &spec["names"];
    if !is_established(definition) {
        return Vec::new();
    }
    let group = text(&spec["group"]);
    let versions = spec["versions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let storage = versions
        .iter()
        .find(|version| version["storage"] == true)
        .map(|version| text(&version["name"]));
    let plural = text(&names["plural"]);
    let kind = text(&names["kind"]);
    versions
        .iter()
        .filter(|version| version["served"] == true)
        .map(|version| {
            let name = text(&version["name"]);
            let mut subresources = Vec::new();
            if version["subresources"]["status"].is_object() {
                subresources.push("status");
            }
            Resource {
                list_kind: non_empty(text(&names["listKind"]), || format!("{kind}List")),
                singular: non_empty(text(&names["singular"]), || kind.to_lowercase()),
                short_names: texts(&names["shortNames"]),
                categories: texts(&names["categories"]),
                namespaced: spec["scope"] == "Namespaced",
                verbs: VERBS,
                subresources,
                scale: ScalePaths::parse(&version["subresources"]["scale"]),
                table: ResourceKey::new(group.clone(), plural.clone()),
                storage_api_version: api_version(&group, storage.as_deref().unwrap_or(&name)),
                columns: columns(&version["additionalPrinterColumns"]),
                selectable: selectable(&version["selectableFields"]),
                schema: ResourceSchema::custom(&version["schema"]["openAPIV3Schema"])
                    .unwrap_or_else(|_| ResourceSchema::open()),
                raw_schema: version["schema"]["openAPIV3Schema"].clone(),
                custom: true,
                deprecation: deprecation(version, &group, &kind),
                group: group.clone(),
                version: name,
                kind: kind.clone(),
                plural: plural.clone(),
            }
        })
        .collect()
}

/// Whether the condition `Established` is true.
#[must_use]
pub fn is_established(definition: &Value) -> bool {
    definition["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|condition| condition["type"] == "Established" && condition["status"] == "True")
}

fn non_empty(text: String, otherwise: impl FnOnce() -> String) -> String {
    if text.is_empty() { otherwise() } else { text }
}

fn columns(value: &Value) -> Vec<Column> {
    let stated = value.as_array().map(Vec::as_slice).unwrap_or_default();
    if stated.is_empty() {
        // What the real server shows where the definition names no columns.
        return vec![Column {
            name: "Age".into(),
            kind: "date".into(),
            format: String::new(),
            description: String::new(),
            priority: 0,
            json_path: ".metadata.creationTimestamp".into(),
        }];
    }
    stated
        .iter()
        .map(|column| Column {
            name: text(&column["name"]),
            kind: text(&column["type"]),
            format: text(&column["format"]),
            description: text(&column["description"]),
            priority: column["priority"].as_i64().unwrap_or(0),
            json_path: text(&column["jsonPath"]),
        })
        .collect()
}

fn selectable(value: &Value) -> Vec<String> {
    let fields = value.as_array().into_iter().flatten();
    fields
        .map(|field| text(&field["jsonPath"]).trim_start_matches('.').to_owned())
        .collect()
}

fn deprecation(version: &Value, group: &str, kind: &str) -> Option<String> {
    if version["deprecated"] != true {
        return None;
    }
    let stated = text(&version["deprecationWarning"]);
    Some(non_empty(stated, || {
        format!("{group}/{} {kind} is deprecated", text(&version["name"]))
    }))
}
