//! Which groups, versions and resources exist: the legacy documents and the aggregated one.

use serde_json::{Value, json};

use super::registry::{Registry, Resource, api_version};

/// Verbs of `/status` and `/scale`.
const SUBRESOURCE_VERBS: &[&str] = &["get", "patch", "update"];

fn verbs_of(subresource: &str) -> &'static [&'static str] {
    match subresource {
        "log" => &["get"],
        "binding" | "eviction" => &["create"],
        "finalize" => &["update"],
        _ => SUBRESOURCE_VERBS,
    }
}

/// Group, version and kind of what a subresource takes.
fn kind_of<'a>(resource: &'a Resource, subresource: &str) -> (&'a str, &'a str, &'a str) {
    match subresource {
        "scale" => ("autoscaling", "v1", "Scale"),
        "binding" => ("", "v1", "Binding"),
        "eviction" => ("policy", "v1", "Eviction"),
        _ => (&resource.group, &resource.version, &resource.kind),
    }
}

fn subresources(resource: &Resource) -> Vec<&'static str> {
    let mut all = resource.subresources.clone();
    if resource.scale.is_some() {
        all.push("scale");
    }
    all.sort_unstable();
    all
}

/// `/api`.
#[must_use]
pub fn core_versions(address: &str) -> Value {
    json!({"kind": "APIVersions", "versions": ["v1"],
        "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}]})
}

/// `/apis`.
#[must_use]
pub fn groups(registry: &Registry) -> Value {
    let groups: Vec<Value> = registry
        .groups
        .iter()
        .filter(|(name, _)| !name.is_empty())
        .map(|(name, versions)| group_entry(name, versions))
        .collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// `/apis/GROUP`.
#[must_use]
pub fn group(registry: &Registry, name: &str) -> Option<Value> {
    let mut entry = group_entry(name, registry.versions(name)?);
    entry["kind"] = json!("APIGroup");
    entry["apiVersion"] = json!("v1");
    Some(entry)
}

fn group_entry(name: &str, versions: &[String]) -> Value {
    let entry = |version: &String| json!({"groupVersion": api_version(name, version), "version": version});
    json!({"name": name, "versions": versions.iter().map(entry).collect::<Vec<_>>(),
        "preferredVersion": versions.first().map(entry)})
}

/// `/api/v1` and `/apis/GROUP/VERSION`.
#[must_use]
pub fn resources(registry: &Registry, group: &str, version: &str) -> Option<Value> {
    if !registry.serves(group, version) {
        return None;
    }
    let mut entries = Vec::new();
    for resource in registry.of(group, version) {
        let mut entry = json!({"name": resource.plural, "singularName": resource.singular,
            "namespaced": resource.namespaced, "kind": resource.kind, "verbs": resource.verbs});
        if !resource.short_names.is_empty() {
            entry["shortNames"] = json!(resource.short_names);
        }
        if !resource.categories.is_empty() {
            entry["categories"] = json!(resource.categories);
        }
        entries.push(entry);
        for subresource in subresources(resource) {
            let (kind_group, kind_version, kind) = kind_of(resource, subresource);
            let mut entry = json!({"name": format!("{}/{subresource}", resource.plural), "singularName": "",
                "namespaced": resource.namespaced, "kind": kind, "verbs": verbs_of(subresource)});
            if (kind_group, kind_version) != (group, version) {
                entry["group"] = json!(kind_group);
                entry["version"] = json!(kind_version);
            }
            entries.push(entry);
        }
    }
    Some(
        json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api_version(group, version),
        "resources": entries}),
    )
}

/// `APIGroupDiscoveryList` of the core group (for `/api`) or of all others (for `/apis`).
#[must_use]
pub fn aggregated(registry: &Registry, core: bool, version: &str) -> Value {
    let groups = registry.groups.iter().filter(|(name, _)| name.is_empty() == core);
    let items: Vec<Value> = groups
        .map(|(name, versions)| {
            let metadata = if name.is_empty() {
                json!({"creationTimestamp": null})
            } else {
                json!({"name": name, "creationTimestamp": null})
            };
            let versions: Vec<Value> = versions
                .iter()
                .map(|version| aggregated_version(registry, name, version))
                .collect();
            json!({"metadata": metadata, "versions": versions})
        })
        .collect();
    json!({"kind": "APIGroupDiscoveryList", "apiVersion": format!("apidiscovery.k8s.io/{version}"), "metadata": {},
        "items": items})
}

fn aggregated_version(registry: &Registry, group: &str, version: &str) -> Value {
    let resources: Vec<Value> = registry
        .of(group, version)
        .map(|resource| {
            let kind = |(group, version, kind): (&str, &str, &str)| json!({"group": group, "version": version, "kind": kind});
            let own = kind((&resource.group, &resource.version, &resource.kind));
            let subresources: Vec<Value> = subresources(resource)
                .into_iter()
                .map(|name| json!({"subresource": name, "responseKind": kind(kind_of(resource, name)), "verbs": verbs_of(name)}))
                .collect();
            let mut entry = json!({"resource": resource.plural, "responseKind": own,
                "scope": if resource.namespaced { "Namespaced" } else { "Cluster" },
                "singularResource": resource.singular, "verbs": resource.verbs});
            for (key, list) in [("shortNames", json!(resource.short_names)), ("categories", json!(resource.categories)), ("subresources", json!(subresources))] {
                if list.as_array().is_some_and(|list| !list.is_empty()) {
                    entry[key] = list;
                }
            }
            entry
        })
        .collect();
    json!({"version": version, "resources": resources, "freshness": "Current"})
}

/// `/version`: the release whose behaviour the sandbox follows.
#[must_use]
pub fn version() -> Value {
    json!({"major": "1", "minor": "33", "emulationMajor": "1", "emulationMinor": "33", "minCompatibilityMajor": "1",
        "minCompatibilityMinor": "32", "gitVersion": concat!("v1.33.0+flotilla-", env!("CARGO_PKG_VERSION")),
        "gitCommit": "", "gitTreeState": "clean", "buildDate": "1970-01-01T00:00:00Z", "goVersion": "",
        "compiler": "rustc", "platform": format!("{}/{}", std::env::consts::OS, std::env::consts::ARCH)})
}
