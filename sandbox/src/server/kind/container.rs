//! The containers of a pod: what the schema cannot say of them.

use std::collections::HashSet;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde_json::{Value, json};

use crate::{node::quantity, schema::Cause, server::write::name};

const PULL_POLICIES: [&str; 3] = ["Always", "IfNotPresent", "Never"];

/// Writes amounts that were given as numbers as texts, which is what a quantity is.
pub fn write_quantities(spec: &mut Value) {
    for list in ["containers", "initContainers"] {
        for container in spec[list].as_array_mut().into_iter().flatten() {
            for part in ["limits", "requests"] {
                let amounts = container.pointer_mut(&format!("/resources/{part}"));
                let amounts = amounts.and_then(Value::as_object_mut).into_iter().flatten();
                for (_, amount) in amounts.filter(|(_, amount)| amount.is_number()) {
                    *amount = json!(amount.to_string());
                }
            }
        }
    }
}

/// Reports what is wrong with a container; `volumes` are those of its pod.
pub fn check(container: &Value, at: &str, volumes: &[&str], causes: &mut Vec<Cause>) {
    for field in ["name", "image"] {
        if container[field].as_str().is_none_or(str::is_empty) {
            causes.push(Cause::required(&format!("{at}.{field}"), ""));
        }
    }
    if let Some(text) = container["name"].as_str().filter(|text| !text.is_empty())
        && !name::is_label(text)
    {
        let rule = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start \
                    and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is \
                    '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
        causes.push(Cause::invalid(&format!("{at}.name"), &container["name"], rule));
    }
    if let Some(policy) = container["imagePullPolicy"].as_str()
        && !PULL_POLICIES.contains(&policy)
    {
        let known = PULL_POLICIES.map(|policy| json!(policy));
        causes.push(Cause::not_supported(
            &format!("{at}.imagePullPolicy"),
            &container["imagePullPolicy"],
            &known,
        ));
    }
    for (place, mount) in container["volumeMounts"].as_array().into_iter().flatten().enumerate() {
        if mount["name"].as_str().is_none_or(|name| !volumes.contains(&name)) {
            causes.push(Cause::not_found(
                &format!("{at}.volumeMounts[{place}].name"),
                &mount["name"],
            ));
        }
    }
    check_resources(&container["resources"], &format!("{at}.resources"), causes);
}

/// No two containers have one name.
pub fn check_names(list: &Value, at: &str, causes: &mut Vec<Cause>) {
    let mut seen = HashSet::new();
    for (index, container) in list.as_array().into_iter().flatten().enumerate() {
        if let Some(name) = container["name"].as_str()
            && !seen.insert(name)
        {
            causes.push(Cause::duplicate(&format!("{at}[{index}].name"), &container["name"]));
        }
    }
}

/// Nothing is requested beyond its limit, and what a node cannot overcommit is limited.
fn check_resources(resources: &Value, at: &str, causes: &mut Vec<Cause>) {
    for (name, request) in resources["requests"].as_object().into_iter().flatten() {
        let limit = &resources["limits"][name];
        let amount = |value: &Value| {
            value
                .as_str()
                .and_then(|text| quantity::milli(&Quantity(text.to_owned())))
        };
        match (amount(request), amount(limit)) {
            (Some(asked), Some(most)) if asked > most => {
                let most = limit.as_str().unwrap_or_default();
                let why = format!("must be less than or equal to {name} limit of {most}");
                causes.push(Cause::invalid(&format!("{at}.requests"), request, &why));
            }
            (Some(_), None) if is_extended(name) => {
                let why = "Limit must be set for non overcommitable resources";
                causes.push(Cause::required(&format!("{at}.limits"), why));
            }
            _ => {}
        }
    }
}

/// A resource of a vendor, such as a GPU.
fn is_extended(name: &str) -> bool {
    name.contains('/') && !name.split('/').next().unwrap_or_default().ends_with("kubernetes.io")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_stay_below_limits_and_gpus_are_limited() {
        let wrong = |resources: Value| {
            let mut causes = Vec::new();
            check_resources(&resources, "r", &mut causes);
            causes.len()
        };
        assert_eq!(wrong(json!({"limits": {"cpu": "1"}, "requests": {"cpu": "500m"}})), 0);
        assert_eq!(wrong(json!({"limits": {"cpu": "1"}, "requests": {"cpu": "2"}})), 1);
        assert_eq!(wrong(json!({"requests": {"nvidia.com/gpu": "1"}})), 1);
    }

    #[test]
    fn numbers_become_quantities() {
        let mut spec = json!({"containers": [{"resources": {"limits": {"nvidia.com/gpu": 1, "cpu": "1"}}}]});
        write_quantities(&mut spec);
        assert_eq!(
            spec["containers"][0]["resources"]["limits"],
            json!({"nvidia.com/gpu": "1", "cpu": "1"})
        );
    }
}
