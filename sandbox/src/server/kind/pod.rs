//! Pods: what the pod strategy and the admission plugins ServiceAccount, Priority and DefaultTolerationSeconds set, and
//! which fields of a spec may change.

use serde_json::{Value, json};

use super::container;
use crate::{
    schema::Cause,
    server::{call::Call, status::ApiError, write::metadata},
    store::object::{ObjectKey, ResourceKey},
};

/// When a pod's containers start anew.
const RESTART_POLICIES: [&str; 3] = ["Always", "OnFailure", "Never"];

/// Completes a pod.
pub fn complete(call: &Call, pod: &mut Value, old: Option<&Value>) -> Result<(), ApiError> {
    let Some(old) = old else {
        container::write_quantities(&mut pod["spec"]);
        pod["status"] = json!({"phase": "Pending", "qosClass": quality(&pod["spec"])});
        if pod["spec"]["schedulingGates"]
            .as_array()
            .is_some_and(|gates| !gates.is_empty())
        {
            pod["status"]["conditions"] = json!([{"type": "PodScheduled", "status": "False", "lastProbeTime": null,
                "lastTransitionTime": metadata::now(), "reason": "SchedulingGated",
                "message": "Scheduling is blocked due to non-empty scheduling gates"}]);
        }
        let name = pod["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        return admit(call, &name, &mut pod["spec"]);
    };
    if call.path.subresource.as_deref() == Some("status") && pod["status"]["qosClass"].is_null() {
        pod["status"]["qosClass"] = old["status"]["qosClass"].clone();
    }
    Ok(())
}

fn admit(call: &Call, pod: &str, spec: &mut Value) -> Result<(), ApiError> {
    check_account(call, pod, spec)?;
    if spec["serviceAccountName"].as_str().is_none_or(str::is_empty) {
        spec["serviceAccountName"] = json!("default");
        spec["serviceAccount"] = json!("default");
    }
    match spec["priorityClassName"].as_str().filter(|name| !name.is_empty()) {
        Some("system-cluster-critical") => spec["priority"] = json!(2_000_000_000),
        Some("system-node-critical") => spec["priority"] = json!(2_000_001_000),
        Some(name) => {
            let classes = ResourceKey::new("scheduling.k8s.io", "priorityclasses");
            let class = call
                .server
                .store
                .get(&classes, &ObjectKey::new("", name))
                .ok_or_else(|| {
                    let why = format!("no PriorityClass with name {name} was found");
                    ApiError::forbidden(&call.resource.key(), call.name(), &why)
                })?;
            spec["priority"] = class["value"].clone();
            if class["preemptionPolicy"].is_string() {
                spec["preemptionPolicy"] = class["preemptionPolicy"].clone();
            }
        }
        None => spec["priority"] = json!(0),
    }
    if spec["preemptionPolicy"].is_null() {
        spec["preemptionPolicy"] = json!("PreemptLowerPriority");
    }
    tolerate_lost_nodes(spec);
    Ok(())
}

/// The service account is there. Its default one is taken for granted: it is made a moment after its namespace.
fn check_account(call: &Call, pod: &str, spec: &Value) -> Result<(), ApiError> {
    let account = spec["serviceAccountName"].as_str().unwrap_or_default();
    if matches!(account, "" | "default") {
        return Ok(());
    }
    let namespace = call.namespace().unwrap_or_default();
    let (accounts, key) = (
        ResourceKey::new("", "serviceaccounts"),
        ObjectKey::new(namespace, account),
    );
    if call.server.store.get(&accounts, &key).is_some() {
        return Ok(());
    }
    let why = format!("error looking up service account {namespace}/{account}: serviceaccount \"{account}\" not found");
    Err(ApiError::forbidden(&call.resource.key(), pod, &why))
}

/// Five minutes on a node that is not ready or cannot be reached.
fn tolerate_lost_nodes(spec: &mut Value) {
    let given = spec["tolerations"].as_array().cloned().unwrap_or_default();
    let mut tolerations = given.clone();
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let covered = given.iter().any(|toleration| {
            (toleration["key"] == key || toleration["key"].as_str().is_none_or(str::is_empty))
                && (toleration["effect"] == "NoExecute" || toleration["effect"].as_str().is_none_or(str::is_empty))
        });
        if !covered {
            tolerations
                .push(json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}));
        }
    }
    spec["tolerations"] = Value::Array(tolerations);
}

/// `Guaranteed`, `Burstable` or `BestEffort` (kubernetes `ComputePodQOS`).
fn quality(spec: &Value) -> &'static str {
    let containers = || {
        let lists = ["containers", "initContainers"];
        lists
            .into_iter()
            .flat_map(|list| spec[list].as_array().into_iter().flatten())
    };
    let (mut asks, mut guaranteed) = (false, true);
    for container in containers() {
        let (limits, requests) = (&container["resources"]["limits"], &container["resources"]["requests"]);
        for name in ["cpu", "memory"] {
            asks |= !limits[name].is_null() || !requests[name].is_null();
            guaranteed &= !limits[name].is_null() && (requests[name].is_null() || requests[name] == limits[name]);
        }
    }
    match (asks, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

/// What the schema cannot say of a new pod.
#[must_use]
pub fn check(pod: &Value) -> Vec<Cause> {
    let spec = &pod["spec"];
    let mut causes = Vec::new();
    if spec["containers"].as_array().is_none_or(Vec::is_empty) {
        causes.push(Cause::required("spec.containers", ""));
    }
    if let Some(policy) = spec["restartPolicy"].as_str()
        && !RESTART_POLICIES.contains(&policy)
    {
        let known = RESTART_POLICIES.map(|policy| json!(policy));
        causes.push(Cause::not_supported(
            "spec.restartPolicy",
            &spec["restartPolicy"],
            &known,
        ));
    }
    let volumes: Vec<&str> = spec["volumes"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|volume| volume["name"].as_str())
        .collect();
    for list in ["initContainers", "containers"] {
        for (index, container) in spec[list].as_array().into_iter().flatten().enumerate() {
            let at = format!("spec.{list}[{index}]");
            container::check(container, &at, &volumes, &mut causes);
        }
        container::check_names(&spec[list], &format!("spec.{list}"), &mut causes);
    }
    causes
}

/// The spec of a pod is fixed but for images, deadlines and new tolerations.
#[must_use]
pub fn check_update(new: &Value, old: &Value) -> Vec<Cause> {
    if fixed(&new["spec"]) == fixed(&old["spec"]) {
        return Vec::new();
    }
    vec![Cause::forbidden(
        "spec",
        "pod updates may not change fields other than \
         `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` \
         (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it \
         was previously negative)",
    )]
}

fn fixed(spec: &Value) -> Value {
    let mut spec = spec.clone();
    for list in ["containers", "initContainers"] {
        for container in spec[list].as_array_mut().into_iter().flatten() {
            if let Some(fields) = container.as_object_mut() {
                fields.remove("image");
            }
        }
    }
    if let Some(fields) = spec.as_object_mut() {
        for field in ["initContainers", "activeDeadlineSeconds", "tolerations"] {
            if field != "initContainers" || fields.get(field).is_some_and(Value::is_null) {
                fields.remove(field);
            }
        }
    }
    spec
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quality_of_service_follows_requests_and_limits() {
        let spec = |resources: Value| json!({"containers": [{"resources": resources}]});
        assert_eq!(quality(&spec(json!({}))), "BestEffort");
        assert_eq!(quality(&spec(json!({"requests": {"cpu": "1"}}))), "Burstable");
        assert_eq!(
            quality(&spec(json!({"limits": {"cpu": "1", "memory": "1Gi"}}))),
            "Guaranteed"
        );
    }

    #[test]
    fn only_images_deadlines_and_tolerations_of_a_pod_change() {
        let old = json!({"spec": {"containers": [{"name": "a", "image": "x"}], "nodeName": "n"}});
        let mut new = old.clone();
        new["spec"]["containers"][0]["image"] = json!("y");
        new["spec"]["activeDeadlineSeconds"] = json!(5);
        assert_eq!(check_update(&new, &old), []);
        new["spec"]["nodeName"] = json!("m");
        assert_eq!(check_update(&new, &old).len(), 1);
    }
}
