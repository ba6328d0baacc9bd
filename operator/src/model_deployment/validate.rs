//! From a ModelDeployment's spec and its model to the role and revision of its pods.

use flotilla_api::role::{AccessSettings, EngineSettings, MediaSettings, Role, RoleConfig, SCHEMA_VERSION, Serve};
use sha2::{Digest, Sha256};

use super::gather::Observed;
use crate::{model::Resolution, refusal::Refusal, volumes, worker_pod};

/// What every new pod runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// What a pod does.
    pub config: RoleConfig,
    /// Hash of what a pod runs: pods with another one are replaced.
    pub revision: String,
    /// ModelCheckpoint or URI.
    pub checkpoint: String,
}

/// The plan, or why there is none.
pub fn validate(observed: &Observed) -> Result<Plan, Refusal> {
    let spec = &observed.deployment.spec;
    worker_pod::check(&spec.serve).map_err(|error| Refusal::invalid(error.to_string()))?;
    let (model, checkpoint) = match &observed.model {
        Resolution::Resolved { source, name } => (source.clone(), name.clone()),
        Resolution::Waiting(text) => return Err(Refusal::waiting(text.clone())),
    };
    let role = Role::Serve(Serve {
        model,
        served_model_name: spec
            .served_model_name
            .clone()
            .unwrap_or_else(|| observed.owner.name.clone()),
        purpose: spec.purpose,
        critic_template: spec.critic_template.clone(),
        critic_templates: std::collections::BTreeMap::new(),
        max_model_len: positive(spec.max_model_len, "maxModelLen")?,
        max_queue: positive(spec.max_queue, "maxQueue")?,
        engine: EngineSettings::default(),
        access: AccessSettings::default(),
        media: MediaSettings::default(),
        drain_seconds: drain_seconds(spec.drain_timeout_seconds),
        otlp_endpoint: None,
    });
    volumes::claims(&role).map_err(|error| Refusal::invalid(error.to_string()))?;
    let config = RoleConfig {
        schema_version: SCHEMA_VERSION,
        owner: observed.owner.role_owner(),
        role,
    };
    Ok(Plan {
        revision: revision(observed, &config)?,
        config,
        checkpoint,
    })
}

/// Seconds that the worker's answers have to end: what the pod has, less the time that the worker needs before and after.
/// None for the default, which the worker knows itself.
fn drain_seconds(pod_seconds: i64) -> Option<u32> {
    const MARGIN: i64 = 5;
    const DEFAULT: i64 = 30;
    let seconds = u32::try_from(pod_seconds.saturating_sub(MARGIN)).unwrap_or(0);
    (pod_seconds != DEFAULT).then_some(seconds)
}

fn positive(value: i64, field: &str) -> Result<u32, Refusal> {
    u32::try_from(value).map_err(|_| Refusal::invalid(format!("{field} is {value}, which is out of range")))
}

/// Covers what users decide, not what this operator makes of it: an upgrade of the operator replaces no pod.
fn revision(observed: &Observed, config: &RoleConfig) -> Result<String, Refusal> {
    let spec = &observed.deployment.spec;
    let text = serde_json::to_vec(&(config, &spec.serve, spec.drain_timeout_seconds));
    let text = text.map_err(|error| Refusal::invalid(format!("serve cannot be written as JSON: {error}")))?;
    Ok(hex::encode(&Sha256::digest(&text)[..4]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_have_what_the_pod_has_less_a_margin_and_the_default_is_not_written() {
        assert_eq!(drain_seconds(30), None);
        assert_eq!(drain_seconds(600), Some(595));
        assert_eq!(drain_seconds(3), Some(0));
    }
}
