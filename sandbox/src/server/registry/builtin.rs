//! The resources that need no definition. Roles, policies and the like are stored and shown, not enforced.

use serde_json::Value;

use super::{Resource, api_version};
use crate::{schema::ResourceSchema, store::object::ResourceKey};

const ALL: &[&str] = &[
    "create",
    "delete",
    "deletecollection",
    "get",
    "list",
    "patch",
    "update",
    "watch",
];
const NO_COLLECTION: &[&str] = &["create", "delete", "get", "list", "patch", "update", "watch"];
const CREATE: &[&str] = &["create"];

/// One row of the table below.
struct Row {
    group: &'static str,
    plural: &'static str,
    singular: &'static str,
    kind: &'static str,
    namespaced: bool,
    short: &'static [&'static str],
    categories: &'static [&'static str],
    subresources: &'static [&'static str],
    verbs: &'static [&'static str],
}

const fn row(group: &'static str, plural: &'static str, singular: &'static str, kind: &'static str) -> Row {
    Row {
        group,
        plural,
        singular,
        kind,
        namespaced: true,
        short: &[],
        categories: &[],
        subresources: &[],
        verbs: ALL,
    }
}

impl Row {
    const fn cluster(mut self) -> Self {
        self.namespaced = false;
        self
    }
    const fn short(mut self, short: &'static [&'static str]) -> Self {
        self.short = short;
        self
    }
    const fn subresources(mut self, subresources: &'static [&'static str]) -> Self {
        self.subresources = subresources;
        self
    }
    const fn in_all(mut self) -> Self {
        self.categories = &["all"];
        self
    }
    const fn extensions(mut self) -> Self {
        self.categories = &["api-extensions"];
        self
    }
    const fn verbs(mut self, verbs: &'static [&'static str]) -> Self {
        self.verbs = verbs;
        self
    }
}

const RBAC: &str = "rbac.authorization.k8s.io";
const AUTHORIZATION: &str = "authorization.k8s.io";

#[rustfmt::skip]
const ROWS: &[Row] = &[
    row("", "configmaps", "configmap", "ConfigMap").short(&["cm"]),
    row("", "endpoints", "endpoints", "Endpoints").short(&["ep"]),
    row("", "events", "event", "Event").short(&["ev"]),
    row("", "namespaces", "namespace", "Namespace").cluster().short(&["ns"]).subresources(&["finalize", "status"]).verbs(NO_COLLECTION),
    row("", "nodes", "node", "Node").cluster().short(&["no"]).subresources(&["status"]),
    row("", "persistentvolumeclaims", "persistentvolumeclaim", "PersistentVolumeClaim").short(&["pvc"]).subresources(&["status"]),
    row("", "persistentvolumes", "persistentvolume", "PersistentVolume").cluster().short(&["pv"]).subresources(&["status"]),
    row("", "pods", "pod", "Pod").short(&["po"]).in_all().subresources(&["binding", "eviction", "log", "status"]),
    row("", "resourcequotas", "resourcequota", "ResourceQuota").short(&["quota"]).subresources(&["status"]),
    row("", "secrets", "secret", "Secret"),
    row("", "serviceaccounts", "serviceaccount", "ServiceAccount").short(&["sa"]),
    row("", "services", "service", "Service").short(&["svc"]).in_all().subresources(&["status"]),
    row("apiextensions.k8s.io", "customresourcedefinitions", "customresourcedefinition", "CustomResourceDefinition")
        .cluster().short(&["crd", "crds"]).extensions().subresources(&["status"]),
    row("authentication.k8s.io", "selfsubjectreviews", "selfsubjectreview", "SelfSubjectReview").cluster().verbs(CREATE),
    row(AUTHORIZATION, "selfsubjectaccessreviews", "selfsubjectaccessreview", "SelfSubjectAccessReview").cluster().verbs(CREATE),
    row(AUTHORIZATION, "selfsubjectrulesreviews", "selfsubjectrulesreview", "SelfSubjectRulesReview").cluster().verbs(CREATE),
    row(AUTHORIZATION, "subjectaccessreviews", "subjectaccessreview", "SubjectAccessReview").cluster().verbs(CREATE),
    row(AUTHORIZATION, "localsubjectaccessreviews", "localsubjectaccessreview", "LocalSubjectAccessReview").verbs(CREATE),
    row("coordination.k8s.io", "leases", "lease", "Lease"),
    row("discovery.k8s.io", "endpointslices", "endpointslice", "EndpointSlice"),
    row("events.k8s.io", "events", "event", "Event").short(&["ev"]),
    row("networking.k8s.io", "networkpolicies", "networkpolicy", "NetworkPolicy").short(&["netpol"]),
    row("policy", "poddisruptionbudgets", "poddisruptionbudget", "PodDisruptionBudget").short(&["pdb"]).subresources(&["status"]),
    row(RBAC, "clusterrolebindings", "clusterrolebinding", "ClusterRoleBinding").cluster(),
    row(RBAC, "clusterroles", "clusterrole", "ClusterRole").cluster(),
    row(RBAC, "rolebindings", "rolebinding", "RoleBinding"),
    row(RBAC, "roles", "role", "Role"),
    row("scheduling.k8s.io", "priorityclasses", "priorityclass", "PriorityClass").cluster().short(&["pc"]),
    row("storage.k8s.io", "storageclasses", "storageclass", "StorageClass").cluster().short(&["sc"]),
];

/// All built-in resources, each in `v1`.
pub fn resources() -> impl Iterator<Item = Resource> {
    ROWS.iter().map(|row| {
        // Both event APIs are views of one table, kept in the core form.
        let table_group = if row.plural == "events" { "" } else { row.group };
        Resource {
            group: row.group.into(),
            version: "v1".into(),
            kind: row.kind.into(),
            list_kind: format!("{}List", row.kind),
            plural: row.plural.into(),
            singular: row.singular.into(),
            short_names: row.short.iter().map(|&name| name.into()).collect(),
            categories: row.categories.iter().map(|&name| name.into()).collect(),
            namespaced: row.namespaced,
            verbs: row.verbs,
            subresources: row.subresources.to_vec(),
            scale: None,
            table: ResourceKey::new(table_group, row.plural),
            storage_api_version: api_version(table_group, "v1"),
            columns: Vec::new(),
            selectable: Vec::new(),
            schema: ResourceSchema::builtin(row.group, "v1", row.kind).unwrap_or_else(ResourceSchema::open),
            raw_schema: Value::Null,
            custom: false,
            deprecation: None,
        }
    })
}
