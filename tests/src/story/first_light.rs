//! From manifests to a served critic, with the sample's manifests cut down to seconds.

use anyhow::Context;
use flotilla_api::{
    Dataset, ModelCheckpoint, ModelDeployment, TrainingJob, dataset::DatasetPhase, model_checkpoint::CheckpointPhase,
    training_job::TrainingPhase,
};
use kube::{Api, api::ListParams};
use serde_json::json;

use super::LIMIT;
use crate::{fleet::Fleet, root, run_folder, sample};

/// Dataset, SFT, GRPO, checkpoint, deployment; then both roles of the served model are asked.
pub async fn first_light(fleet: &Fleet) -> anyhow::Result<()> {
    let manifests = fleet.adapt(sample::small()?);
    fleet.reach(&manifests, LIMIT).await?;
    let client = fleet.client().await?;

    let datasets: Api<Dataset> = Api::default_namespaced(client.clone());
    let pairs = datasets.get("digits-critic-heldout").await?.status.context("status")?;
    let report = pairs.report.context("report")?;
    assert_eq!(
        (pairs.phase, report.rows_in, report.rows_out, report.bad_records),
        (DatasetPhase::Ready, 360, 720, 0)
    );
    assert_eq!(
        report.labels.get("1"),
        report.labels.get("2"),
        "both orders balance the labels"
    );

    let jobs: Api<TrainingJob> = Api::default_namespaced(client.clone());
    let status = jobs.get("digits-grpo").await?.status.context("status")?;
    assert_eq!((status.phase, status.restarts), (TrainingPhase::Complete, 0));
    let progress = status.progress.context("progress")?;
    assert_eq!(progress.steps, format!("{0}/{0}", sample::STEPS));
    assert!(
        status
            .initial_scores
            .iter()
            .any(|score| score.set == "critic" && score.step == 0)
    );
    assert!(
        status
            .scores
            .iter()
            .any(|score| score.set == "policy" && score.step == sample::STEPS)
    );

    let checkpoints: Api<ModelCheckpoint> = Api::default_namespaced(client.clone());
    let last = status.last_checkpoint.context("last checkpoint")?;
    let checkpoint = checkpoints.get(&last.name).await?;
    assert_eq!(checkpoint.status.context("status")?.phase, CheckpointPhase::Available);
    assert_eq!(
        (checkpoint.spec.digest, last.step),
        (last.digest.clone(), sample::STEPS)
    );
    let kept = checkpoints
        .list(&ListParams::default().labels("flotilla.dev/training-job=digits-grpo"))
        .await?;
    assert_eq!(kept.items.len(), 2, "keepLast is 2");

    let run = run_folder::of(&fleet.claim("critic-digits"), fleet.namespace(), "digits-grpo")?;
    assert_eq!(run_folder::steps(&run)?, (1..=sample::STEPS).collect::<Vec<_>>());
    assert!(std::fs::read_to_string(run.join("plot.svg"))?.contains("<svg"));

    let deployments: Api<ModelDeployment> = Api::default_namespaced(client);
    let served = deployments.get("digits-critic").await?.status.context("status")?;
    assert_eq!(served.model_digest, Some(last.digest));
    let service = served.url.context("url")?;
    assert!(service.starts_with("http://"), "{service}");
    asks_both_roles(&fleet.url("digits-critic").await?).await
}

/// A grey picture of 8x8 pixels as a data URL.
fn picture() -> anyhow::Result<String> {
    let rows = std::fs::read(root().join("tests/fixtures/grey.png.base64"))?;
    Ok(format!("data:image/png;base64,{}", String::from_utf8(rows)?.trim()))
}

async fn asks_both_roles(url: &str) -> anyhow::Result<()> {
    let client = reqwest::Client::new();
    let compare =
        json!({ "images": [picture()?], "question": "What digit is this?", "responses": ["3", "5"], "swap": true });
    let answer = client
        .post(format!("{url}/v1/critic/compare"))
        .json(&compare)
        .send()
        .await?;
    assert_eq!(answer.status(), 200, "{}", answer.text().await?);
    let content = json!([
        { "type": "image_url", "image_url": { "url": picture()? } },
        { "type": "text", "text": "What digit is this?" }
    ]);
    let chat =
        json!({ "model": "digits-critic", "messages": [{ "role": "user", "content": content }], "max_tokens": 16 });
    let answer = client
        .post(format!("{url}/v1/chat/completions"))
        .json(&chat)
        .send()
        .await?;
    assert_eq!(answer.status(), 200);
    let answer: serde_json::Value = answer.json().await?;
    assert_eq!(answer["object"], "chat.completion");
    assert!(answer["usage"]["completion_tokens"].as_u64().context("usage")? > 0);
    Ok(())
}
