//! Weights whose digest does not match are refused: when they are registered, and when they are served.

use std::path::Path;

use anyhow::Context;
use flotilla_api::{
    ModelCheckpoint, ModelDeployment, TrainingJob, model_checkpoint::CheckpointPhase, model_deployment::DeploymentPhase,
};
use flotilla_cli::manifest;
use kube::Api;

use super::{LIMIT, warm_up};
use crate::{eventually, fleet::Fleet};

/// A wrong digest, and a bit that flips after the right one was registered.
pub async fn refused_weights(fleet: &Fleet) -> anyhow::Result<()> {
    fleet.reach(&warm_up(fleet)?, LIMIT).await?;
    let client = fleet.client().await?;
    let file = Path::new("story.yaml");
    let jobs: Api<TrainingJob> = Api::default_namespaced(client.clone());
    let last = jobs
        .get("digits-sft")
        .await?
        .status
        .and_then(|status| status.last_checkpoint)
        .context("checkpoint")?;
    let checkpoints: Api<ModelCheckpoint> = Api::default_namespaced(client.clone());
    let uri = checkpoints.get(&last.name).await?.spec.uri;

    let text = format!(
        "apiVersion: flotilla.dev/v1alpha1\nkind: ModelCheckpoint\nmetadata: {{name: sound}}\nspec: {{uri: '{uri}', digest: '{}'}}\n---\n\
         apiVersion: flotilla.dev/v1alpha1\nkind: ModelCheckpoint\nmetadata: {{name: forged}}\nspec: {{uri: '{uri}', digest: 'sha256:{}'}}\n",
        last.digest,
        "0".repeat(64)
    );
    fleet.apply(&fleet.adapt(manifest::parse(file, &text)?)).await?;
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
    let weights = fleet
        .claim("critic-digits")
        .join(uri.trim_start_matches("pvc://critic-digits/"))
        .join("model.safetensors");
    let mut bytes = std::fs::read(&weights)?;
    *bytes.last_mut().context("weights")? ^= 1;
    std::fs::write(&weights, bytes)?;
    let text = format!(
        "apiVersion: flotilla.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {{name: broken}}\nspec: {{model: {{checkpointRef: {{name: {}}}}}}}\n",
        last.name
    );
    fleet.apply(&fleet.adapt(manifest::parse(file, &text)?)).await?;
    let deployments: Api<ModelDeployment> = Api::default_namespaced(client.clone());
    let message = eventually("the deployment is degraded", LIMIT, || async {
        let status = deployments.get("broken").await?.status.context("status")?;
        Ok((status.phase == DeploymentPhase::Degraded).then_some(status.message))
    })
    .await?;
    assert!(
        message.contains("model.safetensors"),
        "the message names the file: {message}"
    );
    Ok(())
}
