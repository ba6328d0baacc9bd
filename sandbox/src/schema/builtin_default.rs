//! Defaults of built-in kinds that depend on other fields, as Kubernetes' Go defaulting functions fill them.

use serde_json::{Map, Value, json};

/// Completes an object of a built-in kind after its constant defaults.
pub(super) fn complete(kind: &str, object: &mut Value) {
    match kind {
        "Pod" => pod_spec(object, "/spec"),
        "Deployment" | "ReplicaSet" | "StatefulSet" | "DaemonSet" | "Job" => pod_spec(object, "/spec/template/spec"),
        "CronJob" => pod_spec(object, "/spec/jobTemplate/spec/template/spec"),
        "Service" => service(object),
        _ => {}
    }
}

fn pod_spec(object: &mut Value, at: &str) {
    let Some(Value::Object(spec)) = object.pointer_mut(at) else {
        return;
    };
    for field in ["containers", "initContainers", "ephemeralContainers"] {
        for container in objects(spec.get_mut(field)) {
            pull_policy(container);
            requests(container);
        }
    }
    for volume in objects(spec.get_mut("volumes")) {
        if volume.len() == 1 && volume.contains_key("name") {
            volume.insert("emptyDir".to_owned(), json!({}));
        }
    }
    let name = spec
        .get("serviceAccountName")
        .filter(|n| n.as_str().is_some_and(|n| !n.is_empty()))
        .cloned();
    if let Some(name) = name {
        spec.entry("serviceAccount").or_insert(name);
    }
}

/// An image without tag, or with the tag `latest`, is pulled each time.
fn pull_policy(container: &mut Map<String, Value>) {
    let image = container.get("image").and_then(Value::as_str).unwrap_or_default();
    let name = image.rsplit('/').next().unwrap_or(image);
    let floating = !image.contains('@') && name.split_once(':').is_none_or(|(_, tag)| tag == "latest");
    let policy = if floating { "Always" } else { "IfNotPresent" };
    container.entry("imagePullPolicy").or_insert_with(|| json!(policy));
}

/// What a limit names and no request does is requested in full.
fn requests(container: &mut Map<String, Value>) {
    let Some(Value::Object(resources)) = container.get_mut("resources") else {
        return;
    };
    let Some(Value::Object(limits)) = resources.get("limits").cloned() else {
        return;
    };
    if limits.is_empty() {
        return;
    }
    if let Value::Object(requests) = resources.entry("requests").or_insert_with(|| json!({})) {
        for (name, quantity) in limits {
            requests.entry(name).or_insert(quantity);
        }
    }
}

fn service(object: &mut Value) {
    for port in objects(object.pointer_mut("/spec/ports")) {
        if let Some(number) = port.get("port").cloned() {
            port.entry("targetPort").or_insert(number);
        }
    }
}

fn objects(list: Option<&mut Value>) -> impl Iterator<Item = &mut Map<String, Value>> {
    list.and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
        .filter_map(Value::as_object_mut)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pull_policy_follows_the_tag() {
        for (image, policy) in [
            ("a", "Always"),
            ("host:5000/a", "Always"),
            ("a:latest", "Always"),
            ("host:5000/a:1", "IfNotPresent"),
            ("a@sha256:0", "IfNotPresent"),
        ] {
            let mut pod = json!({"spec": {"containers": [{"image": image}]}});
            complete("Pod", &mut pod);
            assert_eq!(pod["spec"]["containers"][0]["imagePullPolicy"], policy, "{image}");
        }
    }

    #[test]
    fn limits_become_requests_and_service_ports_target_themselves() {
        let mut pod = json!({"spec": {"containers": [
            {"resources": {"limits": {"cpu": "2", "memory": "1Gi"}, "requests": {"cpu": "1"}}}]}});
        complete("Pod", &mut pod);
        let requests = &pod["spec"]["containers"][0]["resources"]["requests"];
        assert_eq!(*requests, json!({"cpu": "1", "memory": "1Gi"}));
        let mut service = json!({"spec": {"ports": [{"port": 80}, {"port": 1, "targetPort": "x"}]}});
        complete("Service", &mut service);
        assert_eq!(
            service["spec"]["ports"],
            json!([{"port": 80, "targetPort": 80}, {"port": 1, "targetPort": "x"}])
        );
    }
}
