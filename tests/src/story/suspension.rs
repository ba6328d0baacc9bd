//! A suspended job frees its pod, resumes where it was, and expires.

use anyhow::Context;
use flotilla_api::{ModelCheckpoint, TrainingJob, training_job::TrainingPhase};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{ListParams, Patch, PatchParams},
};
use serde_json::json;

use super::{LIMIT, warm_up};
use crate::{eventually, fleet::Fleet, run_folder};

/// Suspend after some steps, resume, complete, set a time to live; checkpoints outlive the job.
pub async fn suspension(fleet: &Fleet) -> anyhow::Result<()> {
    let mut sample = warm_up(fleet)?;
    for manifest in sample.iter_mut().filter(|manifest| manifest.kind.kind == "TrainingJob") {
        manifest.object.data["spec"]["algorithm"]["sft"]["steps"] = json!(60);
    }
    fleet.apply(&sample).await?;
    let client = fleet.client().await?;
    let jobs: Api<TrainingJob> = Api::default_namespaced(client.clone());
    let patch = async |spec: serde_json::Value| {
        jobs.patch(
            "digits-sft",
            &PatchParams::default(),
            &Patch::Merge(json!({ "spec": spec })),
        )
        .await
    };
    let status = async || anyhow::Ok(jobs.get("digits-sft").await?.status.context("status")?);
    eventually("some steps", LIMIT, || async {
        Ok(status()
            .await?
            .progress
            .filter(|progress| progress.step >= 5)
            .map(|_| ()))
    })
    .await?;
    patch(json!({ "suspend": true })).await?;
    eventually("suspended", LIMIT, || async {
        Ok((status().await?.phase == TrainingPhase::Suspended).then_some(()))
    })
    .await?;
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    eventually("no pod", LIMIT, || async {
        let left = pods
            .list(&ListParams::default().labels("flotilla.dev/role=train"))
            .await?;
        Ok(left.items.is_empty().then_some(()))
    })
    .await?;
    patch(json!({ "suspend": false })).await?;
    eventually("complete", LIMIT, || async {
        Ok((status().await?.phase == TrainingPhase::Complete).then_some(()))
    })
    .await?;
    assert_eq!(status().await?.restarts, 0, "suspension is no failure");
    let run = run_folder::of(&fleet.claim("critic-digits"), fleet.namespace(), "digits-sft")?;
    assert_eq!(
        run_folder::steps(&run)?,
        (1..=60).collect::<Vec<_>>(),
        "every step counts once"
    );

    patch(json!({ "ttlSecondsAfterFinished": 1 })).await?;
    eventually("the job is gone", LIMIT, || async {
        Ok(jobs.get_opt("digits-sft").await?.is_none().then_some(()))
    })
    .await?;
    let checkpoints: Api<ModelCheckpoint> = Api::default_namespaced(client.clone());
    assert!(
        !checkpoints.list(&ListParams::default()).await?.items.is_empty(),
        "checkpoints outlive the job"
    );
    Ok(())
}
