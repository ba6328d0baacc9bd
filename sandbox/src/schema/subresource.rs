//! What the main resource, `/status` and `/scale` may change, and when `metadata.generation` moves.
//!
//! Source: `apiextensions-apiserver/pkg/registry/customresource/{strategy,status_strategy,etcd}.go`.

use serde_json::{Map, Value, json};

/// Metadata fields that do not count as a change of the desired state.
const STATUS_ONLY: [&str; 2] = ["metadata", "status"];

/// On the main resource: the status is the old one's (absent on create).
pub fn keep_status(new: &mut Value, old: Option<&Value>) {
    let Value::Object(map) = new else { return };
    match old.and_then(|o| o.get("status")) {
        Some(status) => map.insert("status".to_owned(), status.clone()),
        None => map.remove("status"),
    };
}

/// On `/status`: the old object with the new status; managed fields and resourceVersion are the request's.
#[must_use]
pub fn only_status(new: &Value, old: &Value) -> Value {
    let mut kept = old.clone();
    let Value::Object(map) = &mut kept else { return kept };
    match new.get("status") {
        Some(status) => map.insert("status".to_owned(), status.clone()),
        None => map.remove("status"),
    };
    if let Some(Value::Object(metadata)) = map.get_mut("metadata") {
        for name in ["managedFields", "resourceVersion"] {
            match new.pointer("/metadata").and_then(|m| m.get(name)) {
                Some(value) => metadata.insert(name.to_owned(), value.clone()),
                None => metadata.remove(name),
            };
        }
    }
    kept
}

/// The generation of `new`: 1 on create; one more than the old when anything but metadata and status changed.
///
/// `has_status`: the status is a subresource; without it a status change counts too.
#[must_use]
pub fn generation(new: &Value, old: Option<&Value>, has_status: bool) -> i64 {
    let Some(old) = old else { return 1 };
    let before = old.pointer("/metadata/generation").and_then(Value::as_i64).unwrap_or(1);
    let desired = |object: &Value| -> Map<String, Value> {
        let left_out = |name: &String| name == "metadata" || (has_status && STATUS_ONLY.contains(&name.as_str()));
        let map = object.as_object().cloned().unwrap_or_default();
        map.into_iter().filter(|(name, _)| !left_out(name)).collect()
    };
    if desired(new) == desired(old) {
        before
    } else {
        before + 1
    }
}

/// True for built-in kinds whose objects carry `metadata.generation`.
#[must_use]
pub fn builtin_has_generation(kind: &str) -> bool {
    matches!(
        kind,
        "Pod"
            | "Deployment"
            | "ReplicaSet"
            | "StatefulSet"
            | "DaemonSet"
            | "Job"
            | "CronJob"
            | "NetworkPolicy"
            | "Ingress"
            | "PodDisruptionBudget"
            | "EndpointSlice"
            | "PriorityClass"
            | "CustomResourceDefinition"
    )
}

/// Where a kind keeps the figures of `/scale`: JSON paths such as `.spec.replicas`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ScalePaths {
    /// Wanted replicas.
    pub spec_replicas: String,
    /// Observed replicas.
    pub status_replicas: String,
    /// Selector of the pods as text, where there is one.
    pub label_selector: Option<String>,
}

impl ScalePaths {
    /// From `subresources.scale` of a CRD version.
    #[must_use]
    pub fn parse(scale: &Value) -> Option<Self> {
        let text = |key: &str| {
            scale
                .get(key)
                .and_then(Value::as_str)
                .filter(|t| !t.is_empty())
                .map(str::to_owned)
        };
        Some(Self {
            spec_replicas: text("specReplicasPath")?,
            status_replicas: text("statusReplicasPath")?,
            label_selector: text("labelSelectorPath"),
        })
    }

    /// The paths of Deployment, ReplicaSet and StatefulSet.
    #[must_use]
    pub fn of_workloads() -> Self {
        Self {
            spec_replicas: ".spec.replicas".to_owned(),
            status_replicas: ".status.replicas".to_owned(),
            label_selector: None,
        }
    }

    /// The `autoscaling/v1` Scale of `object`; `None` when `spec.replicas` is absent, which the API server answers with 404.
    #[must_use]
    pub fn read(&self, object: &Value) -> Option<Value> {
        let at = |path: &str| object.pointer(&pointer(path));
        let wanted = at(&self.spec_replicas).and_then(Value::as_i64)?;
        let observed = at(&self.status_replicas).and_then(Value::as_i64).unwrap_or(0);
        let selector = self.label_selector.as_deref().and_then(at).and_then(Value::as_str);
        let mut metadata = Map::new();
        for name in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
            if let Some(value) = object.pointer("/metadata").and_then(|m| m.get(name)) {
                metadata.insert(name.to_owned(), value.clone());
            }
        }
        let mut status = json!({"replicas": observed});
        if let Some(selector) = selector {
            status["selector"] = json!(selector);
        }
        Some(
            json!({"apiVersion": "autoscaling/v1", "kind": "Scale", "metadata": metadata,
            "spec": {"replicas": wanted}, "status": status}),
        )
    }

    /// Writes `spec.replicas` of a Scale (0 when absent, as the zero value of Go) into `object`.
    pub fn write(&self, object: &mut Value, scale: &Value) {
        let wanted = scale.pointer("/spec/replicas").and_then(Value::as_i64).unwrap_or(0);
        let mut node = object;
        for part in self.spec_replicas.split('.').filter(|p| !p.is_empty()) {
            if !node.is_object() {
                *node = json!({});
            }
            node = &mut node[part];
        }
        *node = json!(wanted);
    }
}

fn pointer(path: &str) -> String {
    path.replace('.', "/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_desired_state_moves_the_generation() {
        let old = json!({"metadata": {"generation": 3}, "spec": {"a": 1}, "status": {"b": 1}});
        let mut new = old.clone();
        new["metadata"]["labels"] = json!({"x": "y"});
        new["status"]["b"] = json!(2);
        assert_eq!(generation(&new, Some(&old), true), 3);
        assert_eq!(generation(&new, Some(&old), false), 4);
        new["spec"]["a"] = json!(2);
        assert_eq!(generation(&new, Some(&old), true), 4);
        assert_eq!(generation(&new, None, true), 1);
    }

    #[test]
    fn a_status_write_changes_nothing_else() {
        let old = json!({"metadata": {"name": "a", "labels": {}}, "spec": {"a": 1}});
        let new = json!({"metadata": {"name": "a", "resourceVersion": "4"}, "spec": {"a": 2}, "status": {"b": 1}});
        let kept = only_status(&new, &old);
        let metadata = json!({"name": "a", "labels": {}, "resourceVersion": "4"});
        assert_eq!(
            kept,
            json!({"metadata": metadata, "spec": {"a": 1}, "status": {"b": 1}})
        );
        let mut main = new.clone();
        keep_status(&mut main, Some(&old));
        assert_eq!(main.get("status"), None);
    }

    #[test]
    fn scale_reads_and_writes_the_paths_of_the_crd() {
        let paths = ScalePaths::parse(
            &json!({"specReplicasPath": ".spec.n", "statusReplicasPath": ".status.n",
            "labelSelectorPath": ".status.selector"}),
        )
        .unwrap();
        let mut object =
            json!({"metadata": {"name": "a", "labels": {}}, "spec": {"n": 2}, "status": {"n": 1, "selector": "a=b"}});
        let mut scale = paths.read(&object).unwrap();
        assert_eq!(scale["spec"]["replicas"], 2);
        assert_eq!(scale["status"], json!({"replicas": 1, "selector": "a=b"}));
        assert_eq!(scale["metadata"], json!({"name": "a"}));
        scale["spec"]["replicas"] = json!(5);
        paths.write(&mut object, &scale);
        assert_eq!(object["spec"]["n"], 5);
        assert_eq!(paths.read(&json!({})), None);
    }
}
