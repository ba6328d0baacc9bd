//! A container's environment variables.
//!
//! In this order, later ones winning: what every process needs (`PATH`, `HOME`, `TMPDIR`, `HOSTNAME`), a few variables
//! of the sandbox's own environment (named by [`super::NodeConfig::pass_env`]), the services of the namespace
//! (`NAME_SERVICE_HOST` and so on: there is no DNS here), `envFrom`, `env`. Nothing else is inherited.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, EnvVarSource, Pod, Service};

use super::{
    downward,
    expansion::expand,
    sources::{PodFacts, Sources},
};

/// Why an environment cannot be made; the kubelet reports it as `CreateContainerConfigError`.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnvironmentError {
    /// A ConfigMap or Secret that is not optional does not exist.
    #[error("{kind} \"{name}\" not found")]
    Missing {
        /// `configmap` or `secret`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// The object exists, the key does not.
    #[error("couldn't find key {key} in {kind} {name}")]
    MissingKey {
        /// `ConfigMap` or `Secret`.
        kind: &'static str,
        /// Its name.
        name: String,
        /// The key.
        key: String,
    },
    /// A `fieldRef`, `resourceFieldRef` or `fileKeyRef` that the node cannot follow.
    #[error("environment variable {variable} refers to {path}, which this node does not support")]
    Unsupported {
        /// The variable.
        variable: String,
        /// The path.
        path: String,
    },
}

/// Values of `env` and `envFrom` with `$(VAR)` expanded, on top of `base`.
pub fn resolve(
    pod: &Pod,
    container: &Container,
    facts: &PodFacts,
    sources: &Sources,
    base: BTreeMap<String, String>,
) -> Result<BTreeMap<String, String>, EnvironmentError> {
    let mut values = base;
    for service in &sources.services {
        values.extend(service_variables(service));
    }
    for from in container.env_from.iter().flatten() {
        let prefix = from.prefix.clone().unwrap_or_default();
        if let Some(reference) = &from.config_map_ref {
            let found = sources.config_maps.get(&reference.name);
            let data = required("configmap", &reference.name, found, reference.optional)?;
            values.extend(texts(data).map(|(key, value)| (format!("{prefix}{key}"), value)));
        }
        if let Some(reference) = &from.secret_ref {
            let found = sources.secrets.get(&reference.name);
            let data = required("secret", &reference.name, found, reference.optional)?;
            values.extend(texts(data).map(|(key, value)| (format!("{prefix}{key}"), value)));
        }
    }
    for variable in container.env.iter().flatten() {
        let value = match &variable.value_from {
            Some(source) => value_from(&variable.name, source, pod, container, facts, sources)?,
            None => {
                let text = variable.value.as_deref().unwrap_or_default();
                Some(expand(text, |name| values.get(name).cloned()))
            }
        };
        if let Some(value) = value {
            values.insert(variable.name.clone(), value);
        }
    }
    Ok(values)
}

fn required<'a>(
    kind: &'static str,
    name: &str,
    found: Option<&'a BTreeMap<String, Vec<u8>>>,
    optional: Option<bool>,
) -> Result<Option<&'a BTreeMap<String, Vec<u8>>>, EnvironmentError> {
    if found.is_none() && optional != Some(true) {
        return Err(EnvironmentError::Missing {
            kind,
            name: name.to_owned(),
        });
    }
    Ok(found)
}

fn texts(data: Option<&BTreeMap<String, Vec<u8>>>) -> impl Iterator<Item = (String, String)> {
    data.into_iter()
        .flatten()
        .map(|(key, value)| (key.clone(), String::from_utf8_lossy(value).into_owned()))
}

fn value_from(
    variable: &str,
    source: &EnvVarSource,
    pod: &Pod,
    container: &Container,
    facts: &PodFacts,
    sources: &Sources,
) -> Result<Option<String>, EnvironmentError> {
    let unsupported = |path: &str| EnvironmentError::Unsupported {
        variable: variable.to_owned(),
        path: path.to_owned(),
    };
    if let Some(reference) = &source.field_ref {
        let path = &reference.field_path;
        return downward::field(path, pod, facts)
            .map(Some)
            .ok_or_else(|| unsupported(path));
    }
    if let Some(reference) = &source.resource_field_ref {
        return downward::resource(reference, container)
            .map(Some)
            .ok_or_else(|| unsupported(&reference.resource));
    }
    if let Some(reference) = &source.config_map_key_ref {
        let found = sources.config_maps.get(&reference.name);
        return key_of(
            ["configmap", "ConfigMap"],
            &reference.name,
            &reference.key,
            found,
            reference.optional,
        );
    }
    if let Some(reference) = &source.secret_key_ref {
        let found = sources.secrets.get(&reference.name);
        return key_of(
            ["secret", "Secret"],
            &reference.name,
            &reference.key,
            found,
            reference.optional,
        );
    }
    Err(unsupported("an unknown source"))
}

fn key_of(
    [lower, kind]: [&'static str; 2],
    name: &str,
    key: &str,
    found: Option<&BTreeMap<String, Vec<u8>>>,
    optional: Option<bool>,
) -> Result<Option<String>, EnvironmentError> {
    let value = required(lower, name, found, optional)?.and_then(|data| data.get(key));
    match value {
        Some(value) => Ok(Some(String::from_utf8_lossy(value).into_owned())),
        None if optional == Some(true) => Ok(None),
        None => Err(EnvironmentError::MissingKey {
            kind,
            name: name.to_owned(),
            key: key.to_owned(),
        }),
    }
}

/// `NAME_SERVICE_HOST`, `NAME_SERVICE_PORT` and one `NAME_SERVICE_PORT_PORTNAME` for each named port.
fn service_variables(service: &Service) -> Vec<(String, String)> {
    let upper = |name: &str| name.to_uppercase().replace(['-', '.'], "_");
    let Some(spec) = &service.spec else { return Vec::new() };
    let Some(address) = spec.cluster_ip.as_deref().filter(|ip| !ip.is_empty() && *ip != "None") else {
        return Vec::new();
    };
    let name = upper(service.metadata.name.as_deref().unwrap_or_default());
    let mut variables = vec![(format!("{name}_SERVICE_HOST"), address.to_owned())];
    let ports = spec.ports.as_deref().unwrap_or_default();
    variables.extend(
        ports
            .first()
            .map(|port| (format!("{name}_SERVICE_PORT"), port.port.to_string())),
    );
    for port in ports {
        if let Some(port_name) = &port.name {
            variables.push((
                format!("{name}_SERVICE_PORT_{}", upper(port_name)),
                port.port.to_string(),
            ));
        }
    }
    variables
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use serde_json::json;

    use super::*;

    fn resolved(container: serde_json::Value) -> Result<BTreeMap<String, String>, EnvironmentError> {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p", "labels": {"a": "1"}}})).unwrap();
        let container: Container = serde_json::from_value(container).unwrap();
        let facts = PodFacts {
            pod_ip: Ipv4Addr::new(127, 9, 9, 2),
            host_ip: Ipv4Addr::new(127, 9, 9, 1),
            node_name: "node".to_owned(),
        };
        let data = BTreeMap::from([("K".to_owned(), b"v".to_vec())]);
        let sources = Sources {
            config_maps: BTreeMap::from([("c".to_owned(), data.clone())]),
            secrets: BTreeMap::from([("s".to_owned(), data)]),
            services: vec![
                serde_json::from_value(json!({
                    "metadata": {"name": "my-svc"},
                    "spec": {"clusterIP": "127.200.0.9", "ports": [{"name": "http", "port": 80}]}
                }))
                .unwrap(),
            ],
        };
        resolve(
            &pod,
            &container,
            &facts,
            &sources,
            BTreeMap::from([("PATH".to_owned(), "/bin".to_owned())]),
        )
    }

    #[test]
    fn values_expand_those_defined_before_them() {
        let values = resolved(json!({"name": "x", "env": [
            {"name": "A", "value": "1"}, {"name": "B", "value": "$(A)$(C)"}, {"name": "C", "value": "3"}
        ]}))
        .unwrap();
        assert_eq!(values["B"], "1$(C)");
    }

    #[test]
    fn sources_are_fields_config_maps_secrets_and_services() {
        let values = resolved(
            json!({"name": "x", "envFrom": [{"prefix": "P_", "secretRef": {"name": "s"}}], "env": [
                {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "L", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['a']"}}},
                {"name": "M", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "K"}}}
            ]}),
        )
        .unwrap();
        let expected = [
            ("IP", "127.9.9.2"),
            ("L", "1"),
            ("M", "v"),
            ("P_K", "v"),
            ("PATH", "/bin"),
            ("MY_SVC_SERVICE_HOST", "127.200.0.9"),
            ("MY_SVC_SERVICE_PORT_HTTP", "80"),
        ];
        for (name, value) in expected {
            assert_eq!(values[name], value);
        }
    }

    #[test]
    fn a_missing_object_or_key_is_an_error_unless_optional() {
        let of = |reference: serde_json::Value| {
            resolved(json!({"name": "x", "env": [{"name": "M", "valueFrom": {"configMapKeyRef": reference}}]}))
        };
        assert_eq!(
            of(json!({"name": "none", "key": "K"})).unwrap_err().to_string(),
            "configmap \"none\" not found"
        );
        assert_eq!(
            of(json!({"name": "c", "key": "none"})).unwrap_err().to_string(),
            "couldn't find key none in ConfigMap c"
        );
        assert!(
            !of(json!({"name": "none", "key": "K", "optional": true}))
                .unwrap()
                .contains_key("M")
        );
    }
}
