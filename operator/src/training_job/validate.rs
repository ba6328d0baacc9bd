//! From a TrainingJob's spec and what it refers to, to the roles of its pods.

use flotilla_api::{
    Dataset,
    dataset::DatasetPhase,
    reference::LocalObjectReference,
    reward::Rule,
    role::{PreparedDataset, RemoteRollout, Role, RoleConfig, Rollout, SCHEMA_VERSION, Train},
};
use kube::ResourceExt as _;

use super::gather::Observed;
use crate::{model::Resolution, refusal::Refusal, volumes, worker_pod};

/// What the pods of a run do.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The role of the learner.
    pub learner: RoleConfig,
    /// The role of the rollout pods, where there are any.
    pub rollout: Option<RoleConfig>,
}

/// The roles of the pods, or why there are none yet.
pub fn validate(observed: &Observed) -> Result<Plan, Refusal> {
    let spec = &observed.job.spec;
    for pod in [&spec.roles.learner.pod, &spec.roles.rollout.pod] {
        worker_pod::check(pod).map_err(|error| Refusal::invalid(error.to_string()))?;
    }
    let Resolution::Resolved { source: model, .. } = &observed.model else {
        return Err(Refusal::waiting(waits_for_model(observed)));
    };
    let datasets = spec.datasets.iter().map(|set| training_set(observed, &set.dataset_ref));
    let plan = spec.evaluation.as_ref();
    let sets = plan.map(|plan| plan.sets.as_slice()).unwrap_or_default();
    let held_out = sets.iter().map(|set| {
        let dataset = prepared(observed, &set.dataset_ref)?;
        if dataset.spec.conversion.format.instruction.is_some() {
            let name = &set.dataset_ref.name;
            return Err(Refusal::invalid(format!(
                "evaluation set {name:?} has no verifiable answers: its format is instruction"
            )));
        }
        rows(dataset, set.name.clone(), set.max_rows)
    });
    let owner = &observed.owner;
    let separate = spec.roles.rollout.replicas > 0;
    let train = Role::Train(Box::new(Train {
        model: model.clone(),
        datasets: datasets.collect::<Result<_, _>>()?,
        algorithm: spec.algorithm.clone(),
        rewards: spec.rewards.clone(),
        evaluation_sets: held_out.collect::<Result<_, _>>()?,
        evaluate_every: plan.map_or(0, |plan| plan.every_steps),
        guard: plan.and_then(|plan| plan.guard.clone()),
        dtype: spec.precision.dtype(),
        seed: u64::try_from(spec.seed).map_err(|_| Refusal::invalid("seed is negative"))?,
        output_uri: format!(
            "pvc://{}/jobs/{}/{}-{}",
            spec.checkpoint.storage.claim_name,
            owner.namespace,
            owner.name,
            owner.short_uid()
        ),
        checkpoint_every: spec.checkpoint.every_steps,
        keep_last: spec.checkpoint.keep_last,
        threads: spec.roles.learner.threads,
        rollout: separate.then_some(RemoteRollout {
            lanes: spec.roles.rollout.threads,
        }),
    }));
    let rollout = Role::Rollout(Rollout {
        model: model.clone(),
        threads: spec.roles.rollout.threads,
        dtype: spec.precision.dtype(),
    });
    let config = |role: Role| {
        volumes::claims(&role).map_err(|error| Refusal::invalid(error.to_string()))?;
        Ok(RoleConfig {
            schema_version: SCHEMA_VERSION,
            owner: owner.role_owner(),
            role,
        })
    };
    Ok(Plan {
        learner: config(train)?,
        rollout: if separate { Some(config(rollout)?) } else { None },
    })
}

fn waits_for_model(observed: &Observed) -> String {
    match &observed.model {
        Resolution::Waiting(text) => text.clone(),
        Resolution::Resolved { name, .. } => name.clone(),
    }
}

fn training_set(observed: &Observed, reference: &LocalObjectReference) -> Result<PreparedDataset, Refusal> {
    let dataset = prepared(observed, reference)?;
    let (format, name) = (&dataset.spec.conversion.format, &reference.name);
    let spec = &observed.job.spec;
    if spec.algorithm.sft.is_some() && format.instruction.is_none() {
        return Err(Refusal::invalid(format!(
            "sft needs instruction rows, which Dataset {name:?} does not have"
        )));
    }
    if spec.algorithm.grpo.is_some() && format.instruction.is_some() {
        return Err(Refusal::invalid(format!(
            "grpo needs verifiable rows, but Dataset {name:?} has instruction rows"
        )));
    }
    let rewards = |rule| spec.rewards.iter().any(|reward| reward.rule == rule);
    if rewards(Rule::Preference) && !rewards(Rule::ExactMatch) && format.preference.is_none() {
        return Err(Refusal::invalid(format!(
            "rewards ask for preferences, which Dataset {name:?} does not have"
        )));
    }
    rows(dataset, reference.name.clone(), 0)
}

/// The Dataset, if its rows can be used.
fn prepared<'a>(observed: &'a Observed, reference: &LocalObjectReference) -> Result<&'a Dataset, Refusal> {
    let name = &reference.name;
    let found = observed.datasets.iter().find(|dataset| dataset.name_any() == *name);
    let dataset = found.ok_or_else(|| Refusal::waiting(format!("Dataset {name:?} does not exist")))?;
    let status = dataset.status.as_ref();
    match status.map(|status| status.phase).unwrap_or_default() {
        DatasetPhase::Ready => Ok(dataset),
        DatasetPhase::Failed => {
            let message = status.map(|status| status.message.as_str()).unwrap_or_default();
            Err(Refusal::waiting(format!("Dataset {name:?} failed: {message}")))
        }
        phase @ (DatasetPhase::Pending | DatasetPhase::Preparing) => {
            Err(Refusal::waiting(format!("Dataset {name:?} is not ready ({phase:?})")))
        }
    }
}

fn rows(dataset: &Dataset, name: String, max_rows: u32) -> Result<PreparedDataset, Refusal> {
    let report = dataset.status.as_ref().and_then(|status| status.report.as_ref());
    let report = report.ok_or_else(|| Refusal::waiting(format!("Dataset {:?} has no report", dataset.name_any())))?;
    Ok(PreparedDataset {
        name,
        uri: report.uri.clone(),
        digest: report.digest.clone(),
        max_rows,
    })
}
