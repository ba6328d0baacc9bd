//! From a Dataset's spec to the role of its pod.

use flotilla_api::role::{Prepare, Role, RoleConfig, SCHEMA_VERSION};

use super::gather::Observed;
use crate::{refusal::Refusal, volumes, worker_pod};

/// The role of the conversion pod, or why there is none.
pub fn validate(observed: &Observed) -> Result<RoleConfig, Refusal> {
    let spec = &observed.dataset.spec;
    worker_pod::check(&spec.prepare).map_err(|error| Refusal::invalid(error.to_string()))?;
    let owner = &observed.owner;
    let generation = observed.dataset.metadata.generation.unwrap_or(1);
    let role = Role::Prepare(Prepare {
        source_uri: spec.source.uri.clone(),
        output_uri: format!(
            "pvc://{}/datasets/{}/{}-{}-{generation}",
            spec.storage.claim_name,
            owner.namespace,
            owner.name,
            owner.short_uid()
        ),
        conversion: spec.conversion.clone(),
    });
    volumes::claims(&role).map_err(|error| Refusal::invalid(error.to_string()))?;
    Ok(RoleConfig {
        schema_version: SCHEMA_VERSION,
        owner: owner.role_owner(),
        role,
    })
}
