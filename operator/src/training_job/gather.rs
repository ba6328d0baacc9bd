//! Everything that a decision about a TrainingJob needs.

use std::{collections::BTreeSet, sync::Arc};

use flotilla_api::{
    Dataset, ModelCheckpoint, TrainingJob, TrainingJobStatus,
    names::{condition, label},
    progress::Progress,
};
use k8s_openapi::jiff::Timestamp;
use kube::{ResourceExt as _, runtime::reflector::ObjectRef};

use crate::{
    attempt::{Attempts, Verdict, judge},
    conditions::holds,
    context::Context,
    error::Result,
    model::{Resolution, resolve},
    owner::{Owner, label_value},
    pod_view::PodView,
    run_pod::{self, RunNames},
};

/// Role of the learner pod.
pub const ROLE: &str = "train";
/// Role of the rollout pods.
pub const ROLLOUT: &str = "rollout";

/// A TrainingJob and all that it depends on, at one moment.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The TrainingJob.
    pub job: TrainingJob,
    /// Its identity.
    pub owner: Owner,
    /// Its status, empty before the first pass.
    pub status: TrainingJobStatus,
    /// Names of its children.
    pub names: RunNames,
    /// The model it begins with.
    pub model: Resolution,
    /// Datasets that it names and that exist.
    pub datasets: Vec<Arc<Dataset>>,
    /// The learner pod of the current attempt.
    pub pod: Option<PodView>,
    /// Learner pods of other attempts that are still there, the next one among them.
    pub others: Vec<PodView>,
    /// Names of the rollout pods.
    pub rollout_names: RunNames,
    /// The rollout pods that are there, by place and attempt.
    pub rollout: Vec<PodView>,
    /// What a running learner says.
    pub live: Option<Progress>,
    /// ModelCheckpoints with the name of this job as producer, namesakes included.
    pub checkpoints: Vec<Arc<ModelCheckpoint>>,
    /// Names of ModelCheckpoints that deployments and unfinished jobs use.
    pub in_use: BTreeSet<String>,
    /// The time of this pass.
    pub now: Timestamp,
}

impl Observed {
    /// Whether the job reached its goal or cannot reach it.
    pub fn is_finished(&self) -> bool {
        let conditions = &self.status.conditions;
        holds(conditions, condition::COMPLETE) || holds(conditions, condition::FAILED)
    }

    /// What follows from the learner pod alone.
    pub fn verdict(&self) -> Verdict {
        let attempts = Attempts {
            current: self.status.attempt,
            restarts: self.status.restarts,
            max_restarts: self.job.spec.failure_policy.max_restarts,
        };
        judge(attempts, self.pod.as_ref(), self.now)
    }

    /// The newest words of the learner: its last one, or what it says now.
    pub fn news(&self) -> Option<&Progress> {
        let exit = self.pod.as_ref().and_then(PodView::exit);
        exit.and_then(|exit| exit.progress.as_deref()).or(self.live.as_ref())
    }
}

/// Reads; None where the job is gone or going (its pods then end by their owner reference, with their grace period).
pub async fn gather(context: &Context, object: &Arc<TrainingJob>) -> Result<Option<Observed>> {
    let job = TrainingJob::clone(&context.latest.of(object));
    if job.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    let owner = Owner::of(&job)?;
    let now = context.now();
    let names = RunNames::new(&owner, ROLE);
    let status = job.status.clone().unwrap_or_default();
    let pod = match status.attempt {
        0 => None,
        attempt => run_pod::find(context, &owner, &names.pod(attempt), now).await?,
    };
    let live = match &pod {
        Some(pod) => run_pod::ask(context, &owner, &names.token(), pod).await?,
        None => None,
    };
    let mut pods = context.stores.owned_pods.of(&owner, now);
    pods.retain(|pod| pod.index.is_some());
    pods.sort_by_key(|pod| (pod.index, pod.attempt));
    let mut observed = Observed {
        model: resolve(&job.spec.model, &owner.namespace, &context.stores),
        datasets: datasets(context, &job, &owner.namespace),
        checkpoints: Vec::new(),
        in_use: BTreeSet::new(),
        others: others(context, &owner, &names, status.attempt, now),
        rollout_names: RunNames::new(&owner, ROLLOUT),
        rollout: pods,
        job,
        owner,
        status,
        names,
        pod,
        live,
        now,
    };
    if observed.is_finished() {
        context.tokens.forget(&observed.owner);
    } else if observed.news().is_some() {
        // Walks over all checkpoints and deployments: only for a learner that may have made some.
        observed.checkpoints = produced(context, &observed.owner);
        if !observed.checkpoints.is_empty() {
            observed.in_use = in_use(context, &observed.owner.namespace);
        }
    }
    Ok(Some(observed))
}

/// How far back ended pods are looked for: each start removes those that are too old.
const OLDER: usize = 4;

/// And the next one: it is there where it was made by a pass that could not write its status any more.
fn others(context: &Context, owner: &Owner, names: &RunNames, attempt: u32, now: Timestamp) -> Vec<PodView> {
    let find = |attempt| context.stores.owned_pods.get(owner, &names.pod(attempt), now);
    let older = (1..attempt).rev().take(OLDER);
    older.chain([attempt + 1]).filter_map(find).collect()
}

fn datasets(context: &Context, job: &TrainingJob, namespace: &str) -> Vec<Arc<Dataset>> {
    let sets = job
        .spec
        .evaluation
        .iter()
        .flat_map(|plan| &plan.sets)
        .map(|set| &set.dataset_ref);
    let names: BTreeSet<&str> = job
        .spec
        .datasets
        .iter()
        .map(|set| &set.dataset_ref)
        .chain(sets)
        .map(|reference| reference.name.as_str())
        .collect();
    let find = |name| context.stores.datasets.get(&ObjectRef::new(name).within(namespace));
    names.into_iter().filter_map(find).collect()
}

fn produced(context: &Context, owner: &Owner) -> Vec<Arc<ModelCheckpoint>> {
    let value = label_value(&owner.name);
    context.stores.model_checkpoints.state_filter(|checkpoint| {
        checkpoint.namespace().as_deref() == Some(&owner.namespace)
            && checkpoint.labels().get(label::TRAINING_JOB) == Some(&value)
    })
}

fn in_use(context: &Context, namespace: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for deployment in context.stores.model_deployments.state() {
        if deployment.namespace().as_deref() == Some(namespace) {
            names.extend(
                deployment
                    .spec
                    .model
                    .checkpoint_ref
                    .iter()
                    .map(|reference| reference.name.clone()),
            );
            names.extend(deployment.status.iter().map(|status| status.checkpoint.clone()));
        }
    }
    for job in context.stores.training_jobs.state() {
        let finished = job
            .status
            .as_ref()
            .is_some_and(|status| status.completion_time.is_some());
        if !finished && job.namespace().as_deref() == Some(namespace) {
            names.extend(
                job.spec
                    .model
                    .checkpoint_ref
                    .iter()
                    .map(|reference| reference.name.clone()),
            );
        }
    }
    names
}
