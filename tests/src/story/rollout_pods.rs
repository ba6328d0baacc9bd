//! Rollout pods that are killed, deleted and added while the learner goes on.

use anyhow::{Context, ensure};
use flotilla_api::{TrainingJob, TrainingJobStatus, training_job::TrainingPhase};
use flotilla_cli::follow;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use serde_json::json;

use super::{
    LIMIT,
    kills::{self, Outcome},
};
use crate::{eventually, fleet::Fleet, program, run_folder};

const JOB: &str = "digits-grpo";

/// Trains the small sample with two rollout pods. Where `disturbed`, one is killed and the other deleted on the way, and a
/// third one is added. The learner never restarts, and at the end no rollout pod is left.
pub async fn rollout_pods(fleet: &Fleet, disturbed: bool) -> anyhow::Result<Outcome> {
    let mut manifests = kills::manifests(fleet)?;
    for manifest in manifests
        .iter_mut()
        .filter(|manifest| manifest.object.name_any() == JOB)
    {
        manifest.object.data["spec"]["roles"]["rollout"] = json!({ "replicas": 2, "threads": 1 });
    }
    let manifests = fleet.adapt(manifests);
    fleet.apply(&manifests).await?;
    if disturbed {
        disturb(fleet).await?;
    }
    let client = fleet.client().await?;
    follow::follow(&client, &manifests, LIMIT).await?;
    let status = status(fleet).await?;
    ensure!(
        status.phase == TrainingPhase::Complete,
        "{:?}: {}",
        status.phase,
        status.message
    );
    let rollout = status.rollout.context("the status tells of rollout pods")?;
    ensure!(
        (rollout.restarts > 0) == disturbed,
        "restarts of rollout pods: {}",
        rollout.restarts
    );
    ensure!(
        rollout.weight_version.is_some(),
        "the newest samples have a weight version"
    );
    eventually("no rollout pod is left", LIMIT, || async {
        Ok(members(fleet).await?.is_empty().then_some(()))
    })
    .await?;
    let folder = run_folder::of(&fleet.claim("critic-digits"), fleet.namespace(), JOB)?;
    let steps = run_folder::steps(&folder)?;
    ensure!(
        steps == (1..=kills::GRPO_STEPS).collect::<Vec<_>>(),
        "every step counts once: {steps:?}"
    );
    Ok(Outcome {
        weights: run_folder::newest_weights(&folder)?.0,
        restarts: status.restarts,
    })
}

async fn disturb(fleet: &Fleet) -> anyhow::Result<()> {
    reach(fleet, 4).await?;
    let uid = member(fleet, 0).await?.uid().context("a UID")?;
    let processes = program::workers_below(std::path::Path::new(&uid))?;
    ensure!(processes.len() == 1, "{} processes of one pod", processes.len());
    processes.into_iter().try_for_each(program::kill)?;

    reach(fleet, 9).await?;
    let pods: Api<Pod> = Api::default_namespaced(fleet.client().await?);
    let name = member(fleet, 1).await?.name_any();
    pods.delete(&name, &DeleteParams::default()).await?;

    reach(fleet, 14).await?;
    let jobs: Api<TrainingJob> = Api::default_namespaced(fleet.client().await?);
    let more = Patch::Merge(json!({ "spec": { "roles": { "rollout": { "replicas": 3 } } } }));
    jobs.patch(JOB, &PatchParams::default(), &more).await?;
    eventually("a third rollout pod", LIMIT, || async {
        let third = members(fleet).await?.into_iter().find(|pod| index(pod) == Some("2"));
        let over = status(fleet).await?.completion_time.is_some();
        Ok((third.is_some() || over).then_some(()))
    })
    .await
}

async fn status(fleet: &Fleet) -> anyhow::Result<TrainingJobStatus> {
    let jobs: Api<TrainingJob> = Api::default_namespaced(fleet.client().await?);
    jobs.get(JOB).await?.status.context("status")
}

async fn reach(fleet: &Fleet, step: u32) -> anyhow::Result<()> {
    eventually(&format!("step {step}"), LIMIT, || async {
        let progress = status(fleet).await?.progress;
        Ok(progress.filter(|progress| progress.step >= step).map(|_| ()))
    })
    .await
}

async fn members(fleet: &Fleet) -> anyhow::Result<Vec<Pod>> {
    let pods: Api<Pod> = Api::default_namespaced(fleet.client().await?);
    let rollout = ListParams::default().labels("flotilla.dev/role=rollout");
    Ok(pods.list(&rollout).await?.items)
}

fn index(pod: &Pod) -> Option<&str> {
    pod.labels().get("flotilla.dev/index").map(String::as_str)
}

async fn member(fleet: &Fleet, place: u32) -> anyhow::Result<Pod> {
    let place = place.to_string();
    let found = members(fleet).await?.into_iter().find(|pod| index(pod) == Some(&place));
    found.with_context(|| format!("a rollout pod in place {place}"))
}
