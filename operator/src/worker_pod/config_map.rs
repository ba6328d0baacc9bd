//! The ConfigMap with a pod's role.

use std::collections::BTreeMap;

use flotilla_api::{names::ROLE_CONFIG_FILE, role::RoleConfig};
use k8s_openapi::api::core::v1::ConfigMap;

use crate::owner::Owner;

/// A ConfigMap `name` with `config` as pretty JSON, so that `kubectl get cm -o yaml` can be read.
pub fn config_map(owner: &Owner, name: String, config: &RoleConfig) -> serde_json::Result<ConfigMap> {
    Ok(ConfigMap {
        metadata: owner.child(name, config.role.name()),
        data: Some(BTreeMap::from([(
            ROLE_CONFIG_FILE.to_owned(),
            serde_json::to_string_pretty(config)?,
        )])),
        ..ConfigMap::default()
    })
}
