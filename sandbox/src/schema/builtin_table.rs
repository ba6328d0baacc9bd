//! What the generated built-in schemas lack: how lists merge, which maps are one value, and constant defaults.
//!
//! Source: the struct tags and `+listType`, `+mapType`, `+default` markers in `k8s.io/api` (v0.35), and
//! `k8s.io/kubernetes/pkg/apis/*/v1/defaults.go`.

use serde_json::{Map, Value, json};

/// How a list of a built-in type merges.
struct List {
    /// Last part of the definition's name and the field.
    at: (&'static str, &'static str),
    /// Key of a strategic merge patch, or "" when items are replaced (or, for scalars, added).
    merge_key: &'static str,
    /// Keys of the list map; `["*"]` is a set of scalars; none is an atomic list.
    map_keys: &'static [&'static str],
}

const fn list(
    definition: &'static str,
    field: &'static str,
    merge_key: &'static str,
    map_keys: &'static [&'static str],
) -> List {
    List {
        at: (definition, field),
        merge_key,
        map_keys,
    }
}

const LISTS: &[List] = &[
    list("v1.ObjectMeta", "ownerReferences", "uid", &["uid"]),
    list("v1.ObjectMeta", "finalizers", "", &["*"]),
    list("v1.PodSpec", "containers", "name", &["name"]),
    list("v1.PodSpec", "initContainers", "name", &["name"]),
    list("v1.PodSpec", "ephemeralContainers", "name", &["name"]),
    list("v1.PodSpec", "volumes", "name", &["name"]),
    list("v1.PodSpec", "imagePullSecrets", "name", &["name"]),
    list("v1.PodSpec", "hostAliases", "ip", &["ip"]),
    list("v1.PodSpec", "schedulingGates", "name", &["name"]),
    list("v1.PodSpec", "resourceClaims", "name", &["name"]),
    list(
        "v1.PodSpec",
        "topologySpreadConstraints",
        "topologyKey",
        &["topologyKey", "whenUnsatisfiable"],
    ),
    list("v1.Container", "env", "name", &["name"]),
    list("v1.Container", "ports", "containerPort", &["containerPort", "protocol"]),
    list("v1.Container", "volumeMounts", "mountPath", &["mountPath"]),
    list("v1.Container", "volumeDevices", "devicePath", &["devicePath"]),
    list("v1.EphemeralContainer", "env", "name", &["name"]),
    list(
        "v1.EphemeralContainer",
        "ports",
        "containerPort",
        &["containerPort", "protocol"],
    ),
    list("v1.EphemeralContainer", "volumeMounts", "mountPath", &["mountPath"]),
    list("v1.EphemeralContainer", "volumeDevices", "devicePath", &["devicePath"]),
    list("v1.ResourceRequirements", "claims", "", &["name"]),
    list("v1.PodStatus", "conditions", "type", &["type"]),
    list("v1.PodStatus", "podIPs", "ip", &["ip"]),
    list("v1.PodStatus", "hostIPs", "ip", &[]),
    list("v1.PodStatus", "resourceClaimStatuses", "name", &["name"]),
    list("v1.ServiceSpec", "ports", "port", &["port", "protocol"]),
    list("v1.ServiceStatus", "conditions", "type", &["type"]),
    list("v1.ServiceAccount", "secrets", "name", &["name"]),
    list("v1.NodeStatus", "conditions", "type", &["type"]),
    list("v1.NodeStatus", "addresses", "type", &["type"]),
    list("v1.NodeSpec", "podCIDRs", "", &["*"]),
    list("v1.NamespaceStatus", "conditions", "type", &["type"]),
    list("v1.PersistentVolumeClaimStatus", "conditions", "type", &["type"]),
    list("v1.DeploymentStatus", "conditions", "type", &["type"]),
    list("v1.ReplicaSetStatus", "conditions", "type", &["type"]),
    list("v1.StatefulSetStatus", "conditions", "type", &["type"]),
    list("v1.DaemonSetStatus", "conditions", "type", &["type"]),
    list("v1.JobStatus", "conditions", "type", &[]),
    list("v1.PodFailurePolicyOnExitCodesRequirement", "values", "", &["*"]),
    list("v1.PodDisruptionBudgetStatus", "conditions", "type", &["type"]),
    list("v1.CustomResourceDefinitionStatus", "conditions", "", &["type"]),
];

/// Maps and objects that are one value for field ownership: whole types, by definition.
const ATOMIC_TYPES: [&str; 11] = [
    "v1.LabelSelector",
    "v1.NodeSelector",
    "v1.NodeSelectorTerm",
    "v1.ObjectReference",
    "v1.LocalObjectReference",
    "v1.TypedLocalObjectReference",
    "v1.ConfigMapKeySelector",
    "v1.SecretKeySelector",
    "v1.ObjectFieldSelector",
    "v1.ResourceFieldSelector",
    "v1.OwnerReference",
];

/// Single fields that are one value.
const ATOMIC_FIELDS: [(&str, &str); 3] = [
    ("v1.PodSpec", "nodeSelector"),
    ("v1.ServiceSpec", "selector"),
    ("v1.CSIPersistentVolumeSource", "volumeAttributes"),
];

/// Objects whose keys a strategic merge patch may retain by list.
const RETAIN_KEYS: [(&str, &str); 3] = [
    ("v1.PodSpec", "volumes"),
    ("v1.PodSpec", "resourceClaims"),
    ("v1.DeploymentSpec", "strategy"),
];

/// Constant defaults: definition, field, value.
fn defaults() -> Vec<(&'static str, &'static str, Value)> {
    let mode = json!(0o644);
    let mut table = vec![
        ("v1.ContainerPort", "protocol", json!("TCP")),
        ("v1.ServicePort", "protocol", json!("TCP")),
        ("v1.PodSpec", "restartPolicy", json!("Always")),
        ("v1.PodSpec", "dnsPolicy", json!("ClusterFirst")),
        ("v1.PodSpec", "schedulerName", json!("default-scheduler")),
        ("v1.PodSpec", "terminationGracePeriodSeconds", json!(30)),
        ("v1.PodSpec", "securityContext", json!({})),
        ("v1.PodSpec", "enableServiceLinks", json!(true)),
        ("v1.HTTPGetAction", "scheme", json!("HTTP")),
        ("v1.HTTPGetAction", "path", json!("/")),
        ("v1.ObjectFieldSelector", "apiVersion", json!("v1")),
        ("v1.SecretVolumeSource", "defaultMode", mode.clone()),
        ("v1.ConfigMapVolumeSource", "defaultMode", mode.clone()),
        ("v1.ProjectedVolumeSource", "defaultMode", mode.clone()),
        ("v1.DownwardAPIVolumeSource", "defaultMode", mode),
        ("v1.ServiceAccountTokenProjection", "expirationSeconds", json!(3600)),
        ("v1.ServiceSpec", "type", json!("ClusterIP")),
        ("v1.ServiceSpec", "sessionAffinity", json!("None")),
        ("v1.ServiceSpec", "internalTrafficPolicy", json!("Cluster")),
        ("v1.Secret", "type", json!("Opaque")),
        ("v1.PersistentVolumeClaimSpec", "volumeMode", json!("Filesystem")),
        (
            "v1.CustomResourceDefinitionSpec",
            "conversion",
            json!({"strategy": "None"}),
        ),
    ];
    for (field, value) in [
        ("timeoutSeconds", 1),
        ("periodSeconds", 10),
        ("successThreshold", 1),
        ("failureThreshold", 3),
    ] {
        table.push(("v1.Probe", field, json!(value)));
    }
    for definition in ["v1.Container", "v1.EphemeralContainer"] {
        table.push((definition, "terminationMessagePath", json!("/dev/termination-log")));
        table.push((definition, "terminationMessagePolicy", json!("File")));
        table.push((definition, "resources", json!({})));
    }
    table
}

/// Writes the table into generated OpenAPI definitions as the `x-kubernetes-*` extensions of Kubernetes' own documents.
pub(super) fn annotate(definitions: &mut Map<String, Value>) {
    for (name, definition) in definitions.iter_mut() {
        let Value::Object(node) = definition else { continue };
        // Several API groups have types of one name (v1.Event); the fields in the table differ, so a suffix is enough.
        let is = |short: &str| name.ends_with(short) && name[..name.len() - short.len()].ends_with('.');
        if ATOMIC_TYPES.iter().any(|t| is(t)) {
            node.insert("x-kubernetes-map-type".to_owned(), json!("atomic"));
        }
        let Some(Value::Object(properties)) = node.get_mut("properties") else {
            continue;
        };
        for list in LISTS.iter().filter(|l| is(l.at.0)) {
            if let Some(Value::Object(field)) = properties.get_mut(list.at.1) {
                annotate_list(field, list);
            }
        }
        for (_, field) in ATOMIC_FIELDS.iter().filter(|(d, _)| is(d)) {
            set(properties, field, "x-kubernetes-map-type", json!("atomic"));
        }
        for (_, field) in RETAIN_KEYS.iter().filter(|(d, _)| is(d)) {
            let merged = LISTS.iter().any(|l| is(l.at.0) && l.at.1 == *field);
            let strategy = if merged { "merge,retainKeys" } else { "retainKeys" };
            set(properties, field, "x-kubernetes-patch-strategy", json!(strategy));
        }
        for (_, field, value) in defaults().into_iter().filter(|(d, ..)| is(d)) {
            set(properties, field, "default", value);
        }
    }
}

fn annotate_list(field: &mut Map<String, Value>, list: &List) {
    match list.map_keys {
        [] => field.insert("x-kubernetes-list-type".to_owned(), json!("atomic")),
        ["*"] => field.insert("x-kubernetes-list-type".to_owned(), json!("set")),
        keys => {
            field.insert("x-kubernetes-list-map-keys".to_owned(), json!(keys));
            field.insert("x-kubernetes-list-type".to_owned(), json!("map"))
        }
    };
    if !list.merge_key.is_empty() {
        field.insert("x-kubernetes-patch-merge-key".to_owned(), json!(list.merge_key));
    }
    if !list.merge_key.is_empty() || list.map_keys == ["*"] {
        field.insert("x-kubernetes-patch-strategy".to_owned(), json!("merge"));
    }
}

fn set(properties: &mut Map<String, Value>, field: &str, key: &str, value: Value) {
    if let Some(Value::Object(node)) = properties.get_mut(field) {
        node.insert(key.to_owned(), value);
    }
}
