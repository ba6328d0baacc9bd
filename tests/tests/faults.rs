//! Worker, operator and node killed with `kill -9` at random points of a job: it completes all the same, and on the CPU its
//! weights are those of a run that nobody touched, bit for bit.

use std::time::Duration;

use anyhow::Context;
use flotilla_api::{TrainingJob, training_job::TrainingPhase};
use flotilla_cli::{apply, follow, manifest::Manifest};
use flotilla_tests::{eventually, fleet::Fleet, program, run_folder, sample};
use kube::Api;
use rand::{Rng, SeedableRng, rngs::StdRng};

const LIMIT: Duration = Duration::from_secs(300);
const KILLS: u32 = 3;

/// Data, warm-up and GRPO job; no deployment.
fn manifests() -> anyhow::Result<Vec<Manifest>> {
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
    Ok(manifests)
}

const GRPO_STEPS: u32 = 30;

/// Random points; `FLOTILLA_FAULT_SEED` draws those of an earlier run again, whose output names its seed.
fn points() -> anyhow::Result<StdRng> {
    let seed = match std::env::var("FLOTILLA_FAULT_SEED") {
        Ok(text) => text.parse().context("FLOTILLA_FAULT_SEED")?,
        Err(_) => rand::random(),
    };
    println!("FLOTILLA_FAULT_SEED={seed}");
    Ok(StdRng::seed_from_u64(seed))
}

/// Runs the job, calling `fault` at `kills` random points; the final weights, and how often the job restarted.
async fn run(
    mut fault: impl AsyncFnMut(&mut Fleet) -> anyhow::Result<()>,
    kills: u32,
) -> anyhow::Result<(Vec<u8>, u32)> {
    let mut fleet = Fleet::start().await?;
    let client = fleet.client().await?;
    flotilla_cli::control_plane::install_definitions(&client).await?;
    let manifests = manifests()?;
    apply::apply(&client, &manifests).await?;
    let jobs: Api<TrainingJob> = Api::default_namespaced(client.clone());
    let mut random = points()?;
    for kill in 1..=kills {
        let step = kill * GRPO_STEPS / (kills + 2) + random.random_range(0..3);
        eventually(&format!("step {step}"), LIMIT, || async {
            let status = jobs.get("digits-grpo").await?.status.context("status")?;
            Ok(status.progress.filter(|progress| progress.step >= step).map(|_| ()))
        })
        .await?;
        // Somewhere in a step, an evaluation or the writing of a checkpoint.
        tokio::time::sleep(Duration::from_millis(random.random_range(0..500))).await;
        fault(&mut fleet).await?;
    }
    follow::follow(&client, &manifests, LIMIT).await?;
    let status = jobs.get("digits-grpo").await?.status.context("status")?;
    assert_eq!(status.phase, TrainingPhase::Complete);
    let folder = run_folder::of(&fleet.claim("critic-digits"), "default", "digits-grpo")?;
    assert_eq!(
        run_folder::steps(&folder)?,
        (1..=GRPO_STEPS).collect::<Vec<_>>(),
        "every step counts once"
    );
    let (weights, partial) = run_folder::newest_weights(&folder)?;
    assert_eq!(partial, 0, "no partial checkpoint is visible");
    fleet.stop()?;
    Ok((weights, status.restarts))
}

async fn kill_worker(fleet: &mut Fleet) -> anyhow::Result<()> {
    let dir = fleet.dir().to_owned();
    let pids = eventually("a worker runs", LIMIT, || async {
        let pids = program::workers_below(&dir)?;
        Ok((!pids.is_empty()).then_some(pids))
    })
    .await?;
    pids.into_iter().try_for_each(program::kill)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_survives_kills_of_worker_operator_and_node_and_ends_bit_identical() -> anyhow::Result<()> {
    let (untouched, restarts) = run(async |_| Ok(()), 0).await?;
    assert_eq!(restarts, 0);

    let (weights, restarts) = run(kill_worker, KILLS).await?;
    assert!(weights == untouched, "killing the worker changed the weights");
    assert_eq!(restarts, KILLS, "each kill of the worker is one restart");

    let kill_operator = async |fleet: &mut Fleet| {
        fleet.kill_operator()?;
        fleet.start_operator()
    };
    let (weights, restarts) = run(kill_operator, KILLS).await?;
    assert!(weights == untouched, "killing the operator changed the weights");
    assert_eq!(restarts, 0, "the operator's death is no failure of the job");

    let kill_node = async |fleet: &mut Fleet| {
        fleet.kill_node()?;
        fleet.start_node()
    };
    let (weights, _) = run(kill_node, KILLS).await?;
    assert!(weights == untouched, "killing the node changed the weights");
    Ok(())
}
