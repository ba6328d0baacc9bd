//! From a ModelCheckpoint's spec to the role of its verification pod.

use flotilla_api::role::{ModelSource, Role, RoleConfig, SCHEMA_VERSION, Verify};

use super::gather::Observed;
use crate::{refusal::Refusal, volumes, worker_pod};

/// The role of the verification pod, or why there is none.
pub fn validate(observed: &Observed) -> Result<RoleConfig, Refusal> {
    let spec = &observed.checkpoint.spec;
    worker_pod::check(&spec.verify).map_err(|error| Refusal::invalid(error.to_string()))?;
    let role = Role::Verify(Verify {
        model: ModelSource {
            uri: spec.uri.clone(),
            digest: Some(spec.digest.clone()),
            random_seed: None,
        },
    });
    volumes::claims(&role).map_err(|error| Refusal::invalid(error.to_string()))?;
    Ok(RoleConfig {
        schema_version: SCHEMA_VERSION,
        owner: observed.owner.role_owner(),
        role,
    })
}
