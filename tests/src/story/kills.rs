//! Worker, operator and node killed with `kill -9` at random points of a job: it completes all the same.

use std::time::Duration;

use anyhow::{Context, ensure};
use flotilla_api::{TrainingJob, training_job::TrainingPhase};
use flotilla_cli::{follow, manifest::Manifest};
use kube::Api;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::LIMIT;
use crate::{eventually, fleet::Fleet, program, run_folder, sample};

pub(super) const GRPO_STEPS: u32 = 30;

/// Whom a story kills.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kill {
    /// The processes of all pods.
    Workers,
    /// The operator; a new one starts at once.
    Operator,
    /// The node's agent; a new one starts at once.
    Node,
}

/// What a run that was disturbed ended with.
#[derive(Debug)]
pub struct Outcome {
    /// `model.safetensors` of the last checkpoint.
    pub weights: Vec<u8>,
    /// `status.restarts` of the GRPO job.
    pub restarts: u32,
}

/// Trains the small sample and kills in turn; each step counts once, and no partial checkpoint is left.
pub async fn kills(fleet: &mut Fleet, kills: &[Kill]) -> anyhow::Result<Outcome> {
    let client = fleet.client().await?;
    let manifests = manifests(fleet)?;
    fleet.apply(&manifests).await?;
    let jobs: Api<TrainingJob> = Api::default_namespaced(client.clone());
    let mut random = points()?;
    let count = u32::try_from(kills.len())?;
    for (number, kill) in (1..=count).zip(kills) {
        let step = number * GRPO_STEPS / (count + 2) + random.random_range(0..3);
        eventually(&format!("step {step}"), LIMIT, || async {
            let status = jobs.get("digits-grpo").await?.status.context("status")?;
            Ok(status.progress.filter(|progress| progress.step >= step).map(|_| ()))
        })
        .await?;
        // Somewhere in a step, an evaluation or the writing of a checkpoint.
        tokio::time::sleep(Duration::from_millis(random.random_range(0..500))).await;
        kill.strike(fleet).await?;
    }
    follow::follow(&client, &manifests, LIMIT).await?;
    let status = jobs.get("digits-grpo").await?.status.context("status")?;
    ensure!(
        status.phase == TrainingPhase::Complete,
        "{:?}: {}",
        status.phase,
        status.message
    );
    let folder = run_folder::of(&fleet.claim("critic-digits"), fleet.namespace(), "digits-grpo")?;
    let steps = run_folder::steps(&folder)?;
    ensure!(
        steps == (1..=GRPO_STEPS).collect::<Vec<_>>(),
        "every step counts once: {steps:?}"
    );
    let (weights, partial) = run_folder::newest_weights(&folder)?;
    ensure!(partial == 0, "{partial} partial checkpoints are visible");
    Ok(Outcome {
        weights,
        restarts: status.restarts,
    })
}

impl Kill {
    async fn strike(self, fleet: &mut Fleet) -> anyhow::Result<()> {
        match self {
            Self::Workers => kill_workers(fleet).await,
            Self::Operator => {
                fleet.kill_operator()?;
                fleet.start_operator()
            }
            Self::Node => {
                fleet.kill_node()?;
                fleet.start_node()
            }
        }
    }
}

async fn kill_workers(fleet: &Fleet) -> anyhow::Result<()> {
    let pids = eventually("a worker runs", LIMIT, || async {
        let pids = program::workers_below(fleet.dir())?;
        Ok((!pids.is_empty()).then_some(pids))
    })
    .await?;
    pids.into_iter().try_for_each(program::kill)
}

/// Data, warm-up and GRPO job; no deployment.
pub(super) fn manifests(fleet: &Fleet) -> anyhow::Result<Vec<Manifest>> {
    let mut manifests = sample::only(sample::small()?, |manifest| manifest.kind.kind != "ModelDeployment");
    for manifest in manifests
        .iter_mut()
        .filter(|manifest| manifest.kind.kind == "TrainingJob")
    {
        let spec = &mut manifest.object.data["spec"];
        spec["failurePolicy"] = serde_json::json!({ "maxRestarts": 20 });
        if let Some(steps) = spec.pointer_mut("/algorithm/grpo/steps") {
            *steps = serde_json::json!(GRPO_STEPS);
        }
    }
    Ok(fleet.adapt(manifests))
}

/// Random points; `FLOTILLA_FAULT_SEED` draws those of an earlier run again, whose output names its seed.
fn points() -> anyhow::Result<StdRng> {
    let seed = match std::env::var("FLOTILLA_FAULT_SEED") {
        Ok(text) => text.parse().context("FLOTILLA_FAULT_SEED")?,
        Err(_) => rand::random(),
    };
    println!("FLOTILLA_FAULT_SEED={seed}");
    Ok(StdRng::seed_from_u64(seed))
}
