//! `/openapi/v3`: the index and one document a group and version.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{
    registry::Registry,
    reply::{self, Reply},
};
use crate::schema::openapi::{self, Described};

/// The documents by path below `/openapi/v3/`.
pub fn documents(registry: &Registry) -> &BTreeMap<String, Value> {
    registry.documents.get_or_init(|| {
        let versions = registry
            .groups
            .iter()
            .flat_map(|(group, versions)| versions.iter().map(move |version| (group.as_str(), version.as_str())));
        versions
            .map(|(group, version)| {
                (
                    openapi::document_path(group, version),
                    document(registry, group, version),
                )
            })
            .collect()
    })
}

/// The index.
pub fn index(registry: &Registry) -> Value {
    openapi::index(
        documents(registry)
            .iter()
            .map(|(path, document)| (path.clone(), document)),
    )
}

fn document(registry: &Registry, group: &str, version: &str) -> Value {
    let found: Vec<_> = registry.of(group, version).collect();
    let subresources: Vec<Vec<&str>> = found
        .iter()
        .map(|resource| {
            let mut names: Vec<&str> = resource
                .subresources
                .iter()
                .copied()
                .filter(|name| *name == "status")
                .collect();
            names.extend(resource.scale.is_some().then_some("scale"));
            names
        })
        .collect();
    let described: Vec<Described<'_>> = found
        .iter()
        .zip(&subresources)
        .map(|(resource, subresources)| Described {
            kind: &resource.kind,
            plural: &resource.plural,
            namespaced: resource.namespaced,
            subresources,
            custom: resource.custom.then_some(&resource.raw_schema),
        })
        .collect();
    openapi::document(group, version, &described)
}

/// `/openapi/v2` for a client that has no other use for it than to learn that a kind is not described: an empty document
/// (protobuf `openapi.v2.Document` with field 1, `swagger`, "2.0"). Kinds are described by OpenAPI v3.
#[must_use]
pub fn legacy() -> Reply {
    reply::bytes(
        200,
        "application/com.github.proto-openapi.spec.v2.v1.0+protobuf",
        &b"\x0a\x032.0"[..],
    )
}
