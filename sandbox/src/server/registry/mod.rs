//! Which resources exist, in which versions, with which subresources, columns and schemas. Built anew whenever a
//! CustomResourceDefinition changes; requests hold the version they began with.

pub mod builtin;
pub mod custom;

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
};

use serde_json::Value;

use crate::{
    schema::{ResourceSchema, subresource::ScalePaths},
    store::object::ResourceKey,
};

/// One printer column of a custom resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Heading.
    pub name: String,
    /// `string`, `integer`, `number`, `boolean` or `date`.
    pub kind: String,
    /// OpenAPI format.
    pub format: String,
    /// For `kubectl explain` and `-o wide` readers.
    pub description: String,
    /// Above 0: only `-o wide`.
    pub priority: i64,
    /// Where the value stands.
    pub json_path: String,
}

/// One resource in one version.
#[derive(Debug)]
pub struct Resource {
    /// API group, empty for core.
    pub group: String,
    /// API version.
    pub version: String,
    /// Kind.
    pub kind: String,
    /// Kind of a list.
    pub list_kind: String,
    /// Plural.
    pub plural: String,
    /// Singular.
    pub singular: String,
    /// Short names.
    pub short_names: Vec<String>,
    /// Categories (`all`, …).
    pub categories: Vec<String>,
    /// Lives in a namespace.
    pub namespaced: bool,
    /// Verbs of the main resource.
    pub verbs: &'static [&'static str],
    /// Subresources besides scale.
    pub subresources: Vec<&'static str>,
    /// Scale subresource.
    pub scale: Option<ScalePaths>,
    /// Where the objects are stored.
    pub table: ResourceKey,
    /// `apiVersion` in which they are stored.
    pub storage_api_version: String,
    /// Printer columns of a custom resource.
    pub columns: Vec<Column>,
    /// Fields of a custom resource that can be selected on, without leading dot.
    pub selectable: Vec<String>,
    /// Schema of the version.
    pub schema: ResourceSchema,
    /// The schema as the CustomResourceDefinition states it (null for built-ins), for the OpenAPI document.
    pub raw_schema: Value,
    /// Comes from a CustomResourceDefinition.
    pub custom: bool,
    /// Warning that the version answers with, when it is deprecated.
    pub deprecation: Option<String>,
}

impl Resource {
    /// `v1` or `group/version`.
    #[must_use]
    pub fn api_version(&self) -> String {
        api_version(&self.group, &self.version)
    }

    /// Group and plural as the API names them (not where it is stored).
    #[must_use]
    pub fn key(&self) -> ResourceKey {
        ResourceKey::new(self.group.clone(), self.plural.clone())
    }

    /// Whether `/status` exists, so that the main resource ignores `.status`.
    #[must_use]
    pub fn has_status(&self) -> bool {
        self.subresources.contains(&"status")
    }

    /// Whether the group is empty and the plural is this one.
    #[must_use]
    pub fn is_core(&self, plural: &str) -> bool {
        self.group.is_empty() && self.plural == plural
    }
}

/// `v1` or `group/version`.
#[must_use]
pub fn api_version(group: &str, version: &str) -> String {
    if group.is_empty() {
        version.to_owned()
    } else {
        format!("{group}/{version}")
    }
}

/// All resources.
#[derive(Debug, Default)]
pub struct Registry {
    /// Group -> versions, preferred first. Order of groups: built-in first.
    pub groups: Vec<(String, Vec<String>)>,
    resources: BTreeMap<(String, String, String), Arc<Resource>>,
    /// OpenAPI documents by path, built when they are first asked for.
    pub(super) documents: OnceLock<BTreeMap<String, Value>>,
}

impl Registry {
    /// The built-in resources and those of the established definitions.
    pub fn build<'a>(definitions: impl Iterator<Item = &'a Value>) -> Self {
        let mut registry = Self::default();
        for resource in builtin::resources() {
            registry.add(resource);
        }
        for definition in definitions {
            for resource in custom::resources(definition) {
                registry.add(resource);
            }
        }
        for (_, versions) in &mut registry.groups {
            versions.sort_by_key(|version| std::cmp::Reverse(version_rank(version)));
        }
        registry
    }

    fn add(&mut self, resource: Resource) {
        let index = self
            .groups
            .iter()
            .position(|(name, _)| *name == resource.group)
            .unwrap_or_else(|| {
                self.groups.push((resource.group.clone(), Vec::new()));
                self.groups.len() - 1
            });
        let versions = &mut self.groups[index].1;
        if !versions.contains(&resource.version) {
            versions.push(resource.version.clone());
        }
        let key = (
            resource.group.clone(),
            resource.version.clone(),
            resource.plural.clone(),
        );
        self.resources.insert(key, Arc::new(resource));
    }

    /// One resource.
    #[must_use]
    pub fn find(&self, group: &str, version: &str, plural: &str) -> Option<Arc<Resource>> {
        self.resources
            .get(&(group.to_owned(), version.to_owned(), plural.to_owned()))
            .cloned()
    }

    /// All resources of a group and version.
    pub fn of<'a>(&'a self, group: &'a str, version: &'a str) -> impl Iterator<Item = &'a Arc<Resource>> {
        self.resources
            .values()
            .filter(move |resource| resource.group == group && resource.version == version)
    }

    /// Whether any resource is served there.
    #[must_use]
    pub fn serves(&self, group: &str, version: &str) -> bool {
        self.of(group, version).next().is_some()
    }

    /// Versions of a group, preferred first.
    #[must_use]
    pub fn versions(&self, group: &str) -> Option<&[String]> {
        self.groups
            .iter()
            .find(|(name, _)| name == group)
            .map(|(_, versions)| versions.as_slice())
    }
}

/// Kubernetes' order of versions: v2 > v1 > v2beta1 > v1beta1 > v1alpha1 > others.
fn version_rank(version: &str) -> (u8, u64, u64) {
    let read = |text: &str| -> Option<(u8, u64, u64)> {
        let rest = text.strip_prefix('v')?;
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let major = rest[..digits].parse().ok()?;
        let (stage, minor) = match &rest[digits..] {
            "" => (3, "0"),
            tail => tail
                .strip_prefix("beta")
                .map(|minor| (2, minor))
                .or_else(|| tail.strip_prefix("alpha").map(|minor| (1, minor)))?,
        };
        Some((stage, major, minor.parse().ok()?))
    };
    read(version).unwrap_or((0, 0, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_preferred_as_kubernetes_prefers_them() {
        let mut versions = vec!["v1alpha1", "foo", "v1", "v2beta1", "v10", "v1beta1", "v2"];
        versions.sort_by_key(|version| std::cmp::Reverse(version_rank(version)));
        assert_eq!(versions, ["v10", "v2", "v1", "v2beta1", "v1beta1", "v1alpha1", "foo"]);
    }

    #[test]
    fn built_in_pods_are_found() {
        let registry = Registry::build(std::iter::empty());
        let pods = registry.find("", "v1", "pods").unwrap();
        assert_eq!(pods.kind, "Pod");
        assert!(pods.has_status());
    }
}
