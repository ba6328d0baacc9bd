//! Whether a pod may run on a node: selector, affinity to node labels, taints, resources.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec, Taint, Toleration};

use crate::node::quantity;

/// Thousandths by resource name.
pub type Amounts = BTreeMap<String, i128>;

/// What a pod asks for: the sum over its containers, or the largest init container if that is more; one pod besides.
pub fn requests(spec: &PodSpec) -> Amounts {
    let mut total = Amounts::from([("pods".to_owned(), 1000)]);
    for container in &spec.containers {
        for (name, amount) in container_requests(container) {
            *total.entry(name).or_default() += amount;
        }
    }
    for container in spec.init_containers.iter().flatten() {
        for (name, amount) in container_requests(container) {
            let entry = total.entry(name).or_default();
            *entry = (*entry).max(amount);
        }
    }
    total
}

fn container_requests(container: &k8s_openapi::api::core::v1::Container) -> Amounts {
    let resources = container.resources.clone().unwrap_or_default();
    // A limit without a request is its own request.
    let mut amounts = resources.limits.unwrap_or_default();
    amounts.extend(resources.requests.unwrap_or_default());
    amounts
        .iter()
        .filter_map(|(name, amount)| Some((name.clone(), quantity::milli(amount)?)))
        .collect()
}

/// What is left of a node's allocatable resources after `pods`.
pub fn free<'a>(node: &Node, pods: impl Iterator<Item = &'a PodSpec>) -> Amounts {
    let allocatable = node
        .status
        .as_ref()
        .and_then(|status| status.allocatable.clone())
        .unwrap_or_default();
    let mut free: Amounts = allocatable
        .iter()
        .filter_map(|(name, amount)| Some((name.clone(), quantity::milli(amount)?)))
        .collect();
    for spec in pods {
        for (name, amount) in requests(spec) {
            *free.entry(name).or_default() -= amount;
        }
    }
    free
}

/// Why `pod` may not run on `node`, in the scheduler's words; empty when it may.
pub fn obstacles(pod: &Pod, node: &Node, free: &Amounts) -> Vec<String> {
    let Some(spec) = &pod.spec else {
        return vec!["the pod has no spec".to_owned()];
    };
    if node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true) {
        return vec!["node(s) were unschedulable".to_owned()];
    }
    if !matches_labels(spec, node) {
        return vec!["node(s) didn't match Pod's node affinity/selector".to_owned()];
    }
    let taints = node
        .spec
        .as_ref()
        .and_then(|spec| spec.taints.as_deref())
        .unwrap_or_default();
    let tolerations = spec.tolerations.as_deref().unwrap_or_default();
    if let Some(taint) = taints.iter().find(|taint| is_in_the_way(taint, tolerations)) {
        let value = taint.value.as_deref().unwrap_or_default();
        return vec![format!("node(s) had untolerated taint {{{}: {value}}}", taint.key)];
    }
    requests(spec)
        .iter()
        .filter(|(name, amount)| **amount > 0 && **amount > free.get(*name).copied().unwrap_or(0))
        .map(|(name, _)| {
            if name == "pods" {
                "Too many pods".to_owned()
            } else {
                format!("Insufficient {name}")
            }
        })
        .collect()
}

fn is_in_the_way(taint: &Taint, tolerations: &[Toleration]) -> bool {
    taint.effect != "PreferNoSchedule" && !tolerations.iter().any(|toleration| tolerates(toleration, taint))
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let same = |wanted: &Option<String>, found: &str| wanted.as_deref().is_none_or(|w| w.is_empty() || w == found);
    same(&toleration.effect, &taint.effect)
        && same(&toleration.key, &taint.key)
        && (toleration.operator.as_deref() == Some("Exists")
            || toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default())
}

fn matches_labels(spec: &PodSpec, node: &Node) -> bool {
    let empty = BTreeMap::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&empty);
    let selected = spec
        .node_selector
        .iter()
        .flatten()
        .all(|(key, value)| labels.get(key) == Some(value));
    let required = spec
        .affinity
        .as_ref()
        .and_then(|affinity| affinity.node_affinity.as_ref())
        .and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    selected
        && required.is_none_or(|required| {
            required
                .node_selector_terms
                .iter()
                .any(|term| holds(term, node, labels))
        })
}

fn holds(term: &NodeSelectorTerm, node: &Node, labels: &BTreeMap<String, String>) -> bool {
    let name = BTreeMap::from([(
        "metadata.name".to_owned(),
        node.metadata.name.clone().unwrap_or_default(),
    )]);
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    !(expressions.is_empty() && fields.is_empty())
        && expressions.iter().all(|requirement| is_met(requirement, labels))
        && fields.iter().all(|requirement| is_met(requirement, &name))
}

fn is_met(requirement: &NodeSelectorRequirement, labels: &BTreeMap<String, String>) -> bool {
    let found = labels.get(&requirement.key);
    let values = requirement.values.as_deref().unwrap_or_default();
    let compare = |less: bool| {
        let bound = values.first().and_then(|value| value.parse::<i64>().ok());
        let found = found.and_then(|value| value.parse::<i64>().ok());
        matches!((found, bound), (Some(found), Some(bound)) if (found < bound) == less && found != bound)
    };
    match requirement.operator.as_str() {
        "In" => found.is_some_and(|value| values.contains(value)),
        "NotIn" => found.is_none_or(|value| !values.contains(value)),
        "Exists" => found.is_some(),
        "DoesNotExist" => found.is_none(),
        "Lt" => compare(true),
        "Gt" => compare(false),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(extra: serde_json::Value) -> Node {
        let mut node = json!({
            "metadata": {"name": "n", "labels": {"zone": "a", "size": "8"}},
            "status": {"allocatable": {"cpu": "2", "memory": "1Gi", "pods": "2", "nvidia.com/gpu": "1"}}
        });
        node["spec"] = extra;
        serde_json::from_value(node).unwrap()
    }

    fn pod(spec: serde_json::Value) -> Pod {
        let mut spec = spec;
        if spec.get("containers").is_none() {
            spec["containers"] = json!([{"name": "c"}]);
        }
        serde_json::from_value(json!({"spec": spec})).unwrap()
    }

    fn fits(pod: &Pod, node: &Node) -> Vec<String> {
        obstacles(pod, node, &free(node, std::iter::empty()))
    }

    fn asking(cpu: &str, gpus: &str) -> Pod {
        pod(json!({"containers": [
            {"name": "c", "resources": {"requests": {"cpu": cpu}, "limits": {"nvidia.com/gpu": gpus}}}
        ]}))
    }

    #[test]
    fn resources_must_suffice_after_the_pods_that_are_there() {
        let node = node(json!({}));
        assert_eq!(fits(&asking("2", "1"), &node), Vec::<String>::new());
        assert_eq!(
            fits(&asking("2100m", "2"), &node),
            ["Insufficient cpu", "Insufficient nvidia.com/gpu"]
        );
        let there = asking("1500m", "0").spec.unwrap();
        let left = free(&node, [&there].into_iter());
        assert_eq!(obstacles(&asking("1", "0"), &node, &left), ["Insufficient cpu"]);
        let left = free(&node, [&there, &there].into_iter());
        assert!(obstacles(&asking("0", "0"), &node, &left).contains(&"Too many pods".to_owned()));
    }

    #[test]
    fn init_containers_count_by_the_largest() {
        let spec = pod(json!({
            "containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}],
            "initContainers": [
                {"name": "a", "resources": {"requests": {"cpu": "500m"}}},
                {"name": "b", "resources": {"requests": {"cpu": "3"}}}
            ]
        }));
        assert_eq!(requests(spec.spec.as_ref().unwrap())["cpu"], 3000);
    }

    #[test]
    fn selector_and_affinity_choose_by_label() {
        let node = node(json!({}));
        assert!(fits(&pod(json!({"nodeSelector": {"zone": "a"}})), &node).is_empty());
        assert_eq!(
            fits(&pod(json!({"nodeSelector": {"zone": "b"}})), &node),
            ["node(s) didn't match Pod's node affinity/selector"]
        );
        let affine = |key: &str, operator: &str, values: &[&str]| {
            pod(
                json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [{"matchExpressions": [{"key": key, "operator": operator, "values": values}]}]
                }}}}),
            )
        };
        for (key, operator, values, expected) in [
            ("zone", "In", &["a", "b"][..], true),
            ("zone", "NotIn", &["a"], false),
            ("size", "Gt", &["4"], true),
            ("size", "Lt", &["8"], false),
            ("none", "DoesNotExist", &[], true),
        ] {
            assert_eq!(
                fits(&affine(key, operator, values), &node).is_empty(),
                expected,
                "{key} {operator}"
            );
        }
    }

    #[test]
    fn a_taint_keeps_out_whoever_does_not_tolerate_it() {
        let node = node(json!({"taints": [{"key": "k", "value": "v", "effect": "NoSchedule"}]}));
        assert_eq!(fits(&pod(json!({})), &node), ["node(s) had untolerated taint {k: v}"]);
        for toleration in [
            json!({"operator": "Exists"}),
            json!({"key": "k", "value": "v", "effect": "NoSchedule"}),
        ] {
            assert!(fits(&pod(json!({"tolerations": [toleration]})), &node).is_empty());
        }
    }

    #[test]
    fn a_cordoned_node_takes_nothing() {
        let node = node(json!({"unschedulable": true}));
        assert_eq!(fits(&pod(json!({})), &node), ["node(s) were unschedulable"]);
    }
}
