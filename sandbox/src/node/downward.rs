//! The downward API: fields and resources of a pod as text.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{Container, Pod, ResourceFieldSelector},
    apimachinery::pkg::api::resource::Quantity,
};

use super::{quantity, sources::PodFacts};

/// Value of a `fieldRef` path; `None` when the path is none that Kubernetes supports.
pub fn field(path: &str, pod: &Pod, facts: &PodFacts) -> Option<String> {
    let meta = &pod.metadata;
    if let Some((map, key)) = path.strip_suffix("']").and_then(|path| path.split_once("['")) {
        let values = match map {
            "metadata.labels" => meta.labels.as_ref(),
            "metadata.annotations" => meta.annotations.as_ref(),
            _ => return None,
        };
        return Some(values.and_then(|values| values.get(key)).cloned().unwrap_or_default());
    }
    Some(match path {
        "metadata.name" => meta.name.clone().unwrap_or_default(),
        "metadata.namespace" => meta.namespace.clone().unwrap_or_default(),
        "metadata.uid" => meta.uid.clone().unwrap_or_default(),
        "metadata.labels" => lines(meta.labels.as_ref()),
        "metadata.annotations" => lines(meta.annotations.as_ref()),
        "spec.nodeName" => facts.node_name.clone(),
        "spec.serviceAccountName" => pod
            .spec
            .as_ref()
            .and_then(|spec| spec.service_account_name.clone())
            .unwrap_or_else(|| "default".to_owned()),
        "status.podIP" | "status.podIPs" => facts.pod_ip.to_string(),
        "status.hostIP" | "status.hostIPs" => facts.host_ip.to_string(),
        _ => return None,
    })
}

fn lines(values: Option<&BTreeMap<String, String>>) -> String {
    let lines: Vec<String> = values
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={value:?}"))
        .collect();
    lines.join("\n")
}

/// Value of a `resourceFieldRef` of `container`, rounded up to whole divisors. A missing limit is 0 here: the
/// machine's own size is nothing that a pod of the sandbox may count on.
pub fn resource(selector: &ResourceFieldSelector, container: &Container) -> Option<String> {
    let (kind, name) = selector.resource.split_once('.')?;
    let resources = container.resources.as_ref();
    let values = match kind {
        "limits" => resources.and_then(|r| r.limits.as_ref()),
        "requests" => resources.and_then(|r| r.requests.as_ref()),
        _ => return None,
    };
    let amount = match values.and_then(|values| values.get(name)) {
        Some(amount) => quantity::milli(amount)?,
        None => 0,
    };
    let one = Quantity("1".to_owned());
    let divisor = selector
        .divisor
        .as_ref()
        .filter(|divisor| divisor.0 != "0")
        .unwrap_or(&one);
    let divisor = quantity::milli(divisor).filter(|divisor| *divisor > 0)?;
    Some(((amount + divisor - 1) / divisor).to_string())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u", "labels": {"a": "1", "b/c": "2"}}
        }))
        .unwrap()
    }

    fn facts() -> PodFacts {
        PodFacts {
            pod_ip: Ipv4Addr::new(127, 9, 9, 2),
            host_ip: Ipv4Addr::new(127, 9, 9, 1),
            node_name: "node".into(),
        }
    }

    #[test]
    fn fields_of_the_pod_and_of_the_node_are_known() {
        for (path, value) in [
            ("metadata.name", "p"),
            ("metadata.uid", "u"),
            ("metadata.labels['b/c']", "2"),
            ("metadata.labels['absent']", ""),
            ("metadata.labels", "a=\"1\"\nb/c=\"2\""),
            ("status.podIP", "127.9.9.2"),
            ("spec.nodeName", "node"),
        ] {
            assert_eq!(field(path, &pod(), &facts()).as_deref(), Some(value), "{path}");
        }
        assert_eq!(field("spec.containers", &pod(), &facts()), None);
    }

    #[test]
    fn resources_are_counted_in_divisors_and_rounded_up() {
        let container: Container = serde_json::from_value(serde_json::json!({
            "name": "c", "resources": {"limits": {"cpu": "1500m", "memory": "3Mi"}}
        }))
        .unwrap();
        let of = |name: &str, divisor: &str| {
            let selector = ResourceFieldSelector {
                resource: name.to_owned(),
                divisor: Some(Quantity(divisor.to_owned())),
                ..ResourceFieldSelector::default()
            };
            resource(&selector, &container)
        };
        assert_eq!(of("limits.cpu", "1").as_deref(), Some("2"));
        assert_eq!(of("limits.cpu", "1m").as_deref(), Some("1500"));
        assert_eq!(of("limits.memory", "1Mi").as_deref(), Some("3"));
        assert_eq!(of("requests.cpu", "1").as_deref(), Some("0"));
    }
}
