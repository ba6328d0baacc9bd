//! From a ModelDeployment's spec and its model to the role and revision of its pods.

use flotilla_api::{
    ModelDeploymentSpec,
    role::{AccessSettings, EngineSettings, MediaSettings, Role, RoleConfig, SCHEMA_VERSION, Serve},
};
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
        tensor_parallel: tensor_parallel(spec)?,
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

/// The resource by which NVIDIA's device plugin gives whole GPUs to a pod.
const GPU: &str = "nvidia.com/gpu";

/// How many GPUs share the model: at most as many as a pod is given. Where the pod names none, as with parts of GPUs or another
/// plugin's names, the worker counts those that it sees.
fn tensor_parallel(spec: &ModelDeploymentSpec) -> Result<u32, Refusal> {
    let size = positive(i64::from(spec.tensor_parallel), "tensorParallel")?;
    let resources = &spec.serve.resources;
    let named = resources.limits.get(GPU).or_else(|| resources.requests.get(GPU));
    match named.and_then(|number| number.parse::<u32>().ok()) {
        Some(given) if size > 1 && given < size => Err(Refusal::invalid(format!(
            "tensorParallel is {size}, but serve.resources gives a pod {given} of {GPU}: set serve.resources.limits[\"{GPU}\"] to \
             {size}, or tensorParallel to {given}"
        ))),
        _ => Ok(size),
    }
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
    use flotilla_api::{ModelDeployment, role::ModelSource};
    use serde_json::{Value, json};

    use super::*;
    use crate::owner::Owner;

    /// A deployment of a model that is there.
    fn observed(spec: &Value) -> Observed {
        let mut full = json!({ "model": { "uri": "hf://Qwen/Qwen2.5-VL-72B-Instruct" } });
        let fields = full.as_object_mut().expect("an object");
        fields.extend(spec.as_object().cloned().unwrap_or_default());
        let deployment: ModelDeployment = serde_json::from_value(json!({
            "apiVersion": "flotilla.dev/v1alpha1",
            "kind": "ModelDeployment",
            "metadata": { "name": "large", "namespace": "lab", "uid": "u" },
            "spec": full
        }))
        .expect("a deployment");
        Observed {
            owner: Owner::of(&deployment).expect("an identity"),
            status: flotilla_api::ModelDeploymentStatus::default(),
            stem: "large-serve".to_owned(),
            model: Resolution::Resolved {
                source: ModelSource {
                    uri: "hf://Qwen/Qwen2.5-VL-72B-Instruct".to_owned(),
                    digest: None,
                    random_seed: None,
                },
                name: "hf://Qwen/Qwen2.5-VL-72B-Instruct".to_owned(),
            },
            pods: Vec::new(),
            now: k8s_openapi::jiff::Timestamp::UNIX_EPOCH,
            deployment,
        }
    }

    fn gpus(number: &str) -> Value {
        json!({ "resources": { "limits": { "nvidia.com/gpu": number } } })
    }

    fn size_in_role(plan: &Plan) -> u32 {
        match &plan.config.role {
            Role::Serve(serve) => serve.tensor_parallel,
            _ => 0,
        }
    }

    #[test]
    fn the_worker_is_told_how_many_gpus_share_the_model_and_a_change_replaces_pods() {
        let alone = validate(&observed(&json!({ "serve": gpus("4") }))).expect("a plan");
        let shared = validate(&observed(&json!({ "tensorParallel": 4, "serve": gpus("4") }))).expect("a plan");
        assert_eq!((size_in_role(&alone), size_in_role(&shared)), (1, 4));
        assert_ne!(alone.revision, shared.revision);
    }

    #[test]
    fn the_sample_of_a_large_model_is_sound() {
        let sample = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../manifests/samples/qwen-72b/10-deployment.yaml"
        );
        let text = std::fs::read_to_string(sample).expect("the sample");
        let sample: Value = serde_yaml::from_str(&text).expect("YAML");
        let plan = validate(&observed(&sample["spec"])).expect("a plan");
        assert_eq!(size_in_role(&plan), 4);
    }

    #[test]
    fn more_gpus_than_a_pod_is_given_are_refused_with_both_numbers() {
        let refusal = validate(&observed(&json!({ "tensorParallel": 4, "serve": gpus("1") }))).expect_err("too few");
        assert_eq!(refusal.reason, flotilla_api::names::reason::INVALID_SPEC);
        assert!(
            refusal
                .message
                .contains("tensorParallel is 4, but serve.resources gives a pod 1 of nvidia.com/gpu"),
            "{}",
            refusal.message
        );
        let requested = json!({ "resources": { "requests": { "nvidia.com/gpu": "2" } } });
        assert!(validate(&observed(&json!({ "tensorParallel": 4, "serve": requested }))).is_err());
    }

    #[test]
    fn a_pod_that_names_no_gpus_is_left_to_the_worker() {
        for serve in [
            json!({}),
            gpus("2k"),
            json!({ "resources": { "limits": { "example.com/gpu": "1" } } }),
        ] {
            assert!(
                validate(&observed(&json!({ "tensorParallel": 2, "serve": serve }))).is_ok(),
                "{serve}"
            );
        }
        // Without a GPU a deployment of one is served by the CPU.
        assert!(validate(&observed(&json!({ "serve": gpus("0") }))).is_ok());
    }

    #[test]
    fn answers_have_what_the_pod_has_less_a_margin_and_the_default_is_not_written() {
        assert_eq!(drain_seconds(30), None);
        assert_eq!(drain_seconds(600), Some(595));
        assert_eq!(drain_seconds(3), Some(0));
    }
}
