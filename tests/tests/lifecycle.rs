//! What befalls objects besides success: bad rows, refused weights, suspension, expiry, faults of the API server.

use std::{path::Path, time::Duration};

use anyhow::Context;
use flotilla_api::{
    Dataset, ModelCheckpoint, ModelDeployment, TrainingJob, dataset::DatasetPhase, model_checkpoint::CheckpointPhase,
    model_deployment::DeploymentPhase, training_job::TrainingPhase,
};
use flotilla_cli::{
    apply,
    control_plane::{ControlPlane, Options},
    follow,
    manifest::{self, Manifest},
};
use flotilla_tests::{
    eventually, program,
    rows::{dataset, write_rows},
    run_folder, sample,
};
use kube::{
    Api, ResourceExt,
    api::{Patch, PatchParams},
};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(240);

async fn plane(folder: &Path) -> anyhow::Result<ControlPlane> {
    ControlPlane::start(Options::for_tests(folder, &program::path("flotilla-worker")?)).await
}

fn manifests(folder: &Path, text: &str) -> anyhow::Result<Vec<Manifest>> {
    Ok(manifest::parse(&folder.join("story.yaml"), text)?)
}

/// Claims, and the data and jobs of the small sample up to the warm-up.
fn warm_up() -> anyhow::Result<Vec<Manifest>> {
    let keep = [
        "digits-instruction",
        "digits-policy-heldout",
        "digits-sft",
        "critic-digits",
        "critic-digits-source",
    ];
    Ok(sample::only(sample::small()?, |manifest| {
        keep.contains(&manifest.object.name_any().as_str())
    }))
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_rows_are_counted_by_reason_and_too_many_fail_the_dataset() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    write_rows(folder.path())?;
    let plane = plane(&folder.path().join("plane")).await?;
    let datasets: Api<Dataset> = Api::default_namespaced(plane.client().clone());

    let tolerant = manifests(folder.path(), &dataset("tolerant", 3))?;
    apply::apply(plane.client(), &tolerant).await?;
    follow::follow(plane.client(), &tolerant, LIMIT).await?;
    let report = datasets
        .get("tolerant")
        .await?
        .status
        .and_then(|status| status.report)
        .context("report")?;
    assert_eq!((report.rows_in, report.rows_out, report.bad_records), (5, 2, 3));
    let reasons: Vec<_> = report
        .bad_by_reason
        .iter()
        .map(|(reason, count)| (reason.as_str(), *count))
        .collect();
    assert_eq!(reasons, [("corruptImage", 1), ("emptyText", 1), ("unknownLabel", 1)]);

    let strict = manifests(folder.path(), &dataset("strict", 2))?;
    apply::apply(plane.client(), &strict).await?;
    let error = follow::follow(plane.client(), &strict, LIMIT)
        .await
        .expect_err("too many bad rows");
    let status = datasets.get("strict").await?.status.context("status")?;
    assert_eq!(
        (status.phase, status.restarts),
        (DatasetPhase::Failed, 0),
        "another attempt would end the same way"
    );
    assert!(
        status.message.contains("row 1"),
        "the message names the first rows: {}",
        status.message
    );
    assert!(
        error.to_string().contains(&status.message),
        "the follower shows it: {error:#}"
    );
    plane.stop().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_whose_digest_does_not_match_are_refused() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let plane = plane(folder.path()).await?;
    let sample = warm_up()?;
    apply::apply(plane.client(), &sample).await?;
    follow::follow(plane.client(), &sample, LIMIT).await?;
    let jobs: Api<TrainingJob> = Api::default_namespaced(plane.client().clone());
    let last = jobs
        .get("digits-sft")
        .await?
        .status
        .and_then(|status| status.last_checkpoint)
        .context("checkpoint")?;
    let checkpoints: Api<ModelCheckpoint> = Api::default_namespaced(plane.client().clone());
    let uri = checkpoints.get(&last.name).await?.spec.uri;

    let text = format!(
        "apiVersion: flotilla.dev/v1alpha1\nkind: ModelCheckpoint\nmetadata: {{name: sound}}\nspec: {{uri: '{uri}', digest: '{}'}}\n---\n\
         apiVersion: flotilla.dev/v1alpha1\nkind: ModelCheckpoint\nmetadata: {{name: forged}}\nspec: {{uri: '{uri}', digest: 'sha256:{}'}}\n",
        last.digest,
        "0".repeat(64)
    );
    apply::apply(plane.client(), &manifests(folder.path(), &text)?).await?;
    let phase = |name: &'static str, wanted: CheckpointPhase| {
        let checkpoints = checkpoints.clone();
        eventually(name, LIMIT, move || {
            let checkpoints = checkpoints.clone();
            async move {
                let status = checkpoints.get(name).await?.status.context("status")?;
                Ok((status.phase == wanted).then_some(status.message))
            }
        })
    };
    phase("sound", CheckpointPhase::Available).await?;
    let message = phase("forged", CheckpointPhase::Refused).await?;
    assert!(
        message.contains("sha256:000"),
        "the message names both digests: {message}"
    );

    // One flipped bit after the checkpoint was registered: the pod that would serve it refuses.
    let weights = plane
        .volume("default", "critic-digits")
        .join(uri.trim_start_matches("pvc://critic-digits/"))
        .join("model.safetensors");
    let mut bytes = std::fs::read(&weights)?;
    *bytes.last_mut().context("weights")? ^= 1;
    std::fs::write(&weights, bytes)?;
    let text = format!(
        "apiVersion: flotilla.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {{name: broken}}\nspec: {{model: {{checkpointRef: {{name: {}}}}}}}\n",
        last.name
    );
    apply::apply(plane.client(), &manifests(folder.path(), &text)?).await?;
    let deployments: Api<ModelDeployment> = Api::default_namespaced(plane.client().clone());
    let message = eventually("the deployment is degraded", LIMIT, || async {
        let status = deployments.get("broken").await?.status.context("status")?;
        Ok((status.phase == DeploymentPhase::Degraded).then_some(status.message))
    })
    .await?;
    assert!(
        message.contains("model.safetensors"),
        "the message names the file: {message}"
    );
    plane.stop().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_job_frees_its_pod_and_resumes_where_it_was_and_expires() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let plane = plane(folder.path()).await?;
    let mut sample = warm_up()?;
    for manifest in sample.iter_mut().filter(|manifest| manifest.kind.kind == "TrainingJob") {
        manifest.object.data["spec"]["algorithm"]["sft"]["steps"] = json!(60);
    }
    apply::apply(plane.client(), &sample).await?;
    let jobs: Api<TrainingJob> = Api::default_namespaced(plane.client().clone());
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
    let pods: Api<k8s_openapi::api::core::v1::Pod> = Api::default_namespaced(plane.client().clone());
    eventually("no pod", LIMIT, || async {
        let left = pods
            .list(&kube::api::ListParams::default().labels("flotilla.dev/role=train"))
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
    let run = run_folder::of(&plane.volume("default", "critic-digits"), "default", "digits-sft")?;
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
    let checkpoints: Api<ModelCheckpoint> = Api::default_namespaced(plane.client().clone());
    assert!(
        !checkpoints
            .list(&kube::api::ListParams::default())
            .await?
            .items
            .is_empty(),
        "checkpoints outlive the job"
    );
    plane.stop().await;
    Ok(())
}
