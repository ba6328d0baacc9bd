//! `flotilla demo`: the digits sample, then a question to the served critic.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use console::style;
use flotilla_api::{Dataset, ModelDeployment, TrainingJob, evaluation::Score};
use kube::{Api, Client};
use serde::{Deserialize, Serialize};

use crate::{
    apply,
    arguments::Demo,
    control_plane::{ControlPlane, Options, interrupted},
    follow,
    manifest::{self, Manifest},
    picture,
};

/// Objects of the sample that the demo reads, by name.
mod sample {
    pub const GRPO_JOB: &str = "digits-grpo";
    pub const DEPLOYMENT: &str = "digits-critic";
    pub const HELD_OUT_PAIRS: &str = "digits-critic-heldout";
    pub const CRITIC_SET: &str = "critic";
    pub const POLICY_SET: &str = "policy";
}

/// The last line of the demo.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    critic_accuracy_before: f64,
    critic_accuracy_after: f64,
    policy_accuracy_before: f64,
    policy_accuracy_after: f64,
    format_rate_after: f64,
    seconds: f64,
}

/// Runs the command; the sandbox ends with it.
pub async fn command(arguments: Demo) -> anyhow::Result<()> {
    let begun = Instant::now();
    let mut manifests = manifest::load(std::slice::from_ref(&arguments.sample)).context(
        "the demo applies manifests of this repository: run it in a checkout, or name their folder with --sample",
    )?;
    if let Some(seed) = arguments.seed {
        manifests.iter_mut().for_each(|manifest| reseed(manifest, seed));
    }
    let plane = ControlPlane::start(Options::for_one_run(&arguments.plane)?).await?;
    let outcome = tokio::select! {
        outcome = story(&plane, &manifests, &arguments, begun) => outcome,
        () = interrupted() => Err(anyhow::anyhow!("interrupted; the state is kept in {}", plane.dir().display())),
    };
    plane.stop().await;
    let summary = outcome?;
    println!("{}", serde_json::to_string(&summary)?);
    ensure!(
        summary.critic_accuracy_after >= arguments.gate,
        "held-out critic accuracy {:.3} is below the gate {:.3}",
        summary.critic_accuracy_after,
        arguments.gate
    );
    Ok(())
}

async fn story(
    plane: &ControlPlane,
    manifests: &[Manifest],
    arguments: &Demo,
    begun: Instant,
) -> anyhow::Result<Summary> {
    plane.announce();
    apply::apply(plane.client(), manifests).await?;
    follow::follow(plane.client(), manifests, arguments.timeout).await?;
    let job: TrainingJob = Api::default_namespaced(plane.client().clone())
        .get(sample::GRPO_JOB)
        .await?;
    let summary = summary(&job, begun.elapsed())?;
    explain(&summary);
    ask(plane).await?;
    eprintln!(
        "checkpoints, metrics and plot: {}",
        plane
            .volume("default", &job.spec.checkpoint.storage.claim_name)
            .display()
    );
    if arguments.keep {
        eprintln!("staying up; Ctrl-C ends the sandbox");
        interrupted().await;
    }
    Ok(summary)
}

/// Gives the initial weights and every run of `manifest` another seed.
fn reseed(manifest: &mut Manifest, seed: u32) {
    if manifest.kind.kind != "TrainingJob" {
        return;
    }
    let spec = &mut manifest.object.data["spec"];
    spec["seed"] = seed.into();
    if let Some(random) = spec.pointer_mut("/model/randomSeed") {
        *random = seed.into();
    }
}

fn summary(job: &TrainingJob, elapsed: Duration) -> anyhow::Result<Summary> {
    let status = job.status.as_ref().context("the GRPO job has no status")?;
    let score = |scores: &[Score], set: &str| {
        scores
            .iter()
            .find(|score| score.set == set)
            .cloned()
            .with_context(|| format!("no score of set {set}"))
    };
    let (before, after) = (&status.initial_scores, &status.scores);
    Ok(Summary {
        critic_accuracy_before: score(before, sample::CRITIC_SET)?.accuracy,
        critic_accuracy_after: score(after, sample::CRITIC_SET)?.accuracy,
        policy_accuracy_before: score(before, sample::POLICY_SET)?.accuracy,
        policy_accuracy_after: score(after, sample::POLICY_SET)?.accuracy,
        format_rate_after: score(after, sample::CRITIC_SET)?.format_rate,
        seconds: (elapsed.as_secs_f64() * 10.0).round() / 10.0,
    })
}

fn explain(summary: &Summary) {
    let percent = |share: f64| format!("{:5.1} %", 100.0 * share);
    eprintln!("\n{}", style("Held-out digits").bold());
    eprintln!("            before      after");
    eprintln!(
        "  critic   {}    {}",
        percent(summary.critic_accuracy_before),
        percent(summary.critic_accuracy_after)
    );
    eprintln!(
        "  policy   {}    {}",
        percent(summary.policy_accuracy_before),
        percent(summary.policy_accuracy_after)
    );
}

/// A held-out row of the prepared dataset (`rows.jsonl`).
#[derive(Deserialize)]
struct Row {
    images: Vec<String>,
    question: String,
    responses: Vec<String>,
    label: String,
}

#[derive(Deserialize)]
struct Comparison {
    verdict: Option<String>,
    rationale: Option<String>,
    margin: Option<f64>,
}

/// Asks the served critic about the first held-out pair and shows picture, thought and verdict.
async fn ask(plane: &ControlPlane) -> anyhow::Result<()> {
    let client = plane.client();
    let folder = held_out(plane).await?;
    let rows = std::fs::read_to_string(folder.join("rows.jsonl")).context("rows of the held-out set")?;
    let row: Row = serde_json::from_str(rows.lines().next().context("the held-out set is empty")?)?;
    let image = std::fs::read(
        folder
            .join("images")
            .join(row.images.first().context("the row has no image")?),
    )?;
    let url = deployment_url(client).await?;
    let body = serde_json::json!({
        "images": [format!("data:image/png;base64,{}", STANDARD.encode(&image))],
        "question": row.question,
        "responses": row.responses,
    });
    let response = reqwest::Client::new()
        .post(format!("{url}/v1/critic/compare"))
        .json(&body)
        .send()
        .await?;
    ensure!(
        response.status().is_success(),
        "the critic answered {}: {}",
        response.status(),
        response.text().await?
    );
    let answer: Comparison = response.json().await?;

    eprintln!("\n{}  POST {url}/v1/critic/compare", style("A held-out digit").bold());
    eprintln!("{}", picture::draw(&image, 16, console::colors_enabled_stderr())?);
    eprintln!("  question   {}", row.question);
    for (index, response) in row.responses.iter().enumerate() {
        eprintln!("  response {} {response}", index + 1);
    }
    eprintln!(
        "  thought    {}",
        answer.rationale.as_deref().unwrap_or("(none)").trim()
    );
    let verdict = answer.verdict.as_deref().unwrap_or("none");
    let judged = if verdict == row.label {
        style("right").green()
    } else {
        style("wrong").red()
    };
    let margin = answer
        .margin
        .map(|margin| format!(", log-odds {margin:+.2}"))
        .unwrap_or_default();
    eprintln!("  verdict    response {verdict} is better ({judged}{margin})\n");
    Ok(())
}

async fn held_out(plane: &ControlPlane) -> anyhow::Result<PathBuf> {
    let dataset: Dataset = Api::default_namespaced(plane.client().clone())
        .get(sample::HELD_OUT_PAIRS)
        .await?;
    let report = dataset
        .status
        .and_then(|status| status.report)
        .context("the held-out set has no report")?;
    let rest = report
        .uri
        .strip_prefix("pvc://")
        .with_context(|| format!("{} is not on a claim", report.uri))?;
    let (claim, path) = rest
        .split_once('/')
        .with_context(|| format!("{} names no path", report.uri))?;
    Ok(plane.volume("default", claim).join(Path::new(path)))
}

async fn deployment_url(client: &Client) -> anyhow::Result<String> {
    let deployment: ModelDeployment = Api::default_namespaced(client.clone()).get(sample::DEPLOYMENT).await?;
    deployment
        .status
        .and_then(|status| status.url)
        .context("the deployment has no address")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_seed_changes_every_draw_of_a_job_and_nothing_else() {
        let text = "apiVersion: flotilla.dev/v1alpha1\nkind: TrainingJob\nmetadata: {name: a}\nspec: {seed: 0, model: {uri: 'pvc://a/b', randomSeed: 0}}\n---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: b}\ndata: {seed: '0'}\n";
        let mut manifests = manifest::parse(Path::new("x.yaml"), text).expect("parses");
        manifests.iter_mut().for_each(|manifest| reseed(manifest, 7));
        assert_eq!(manifests[0].object.data["spec"]["seed"], 7);
        assert_eq!(manifests[0].object.data["spec"]["model"]["randomSeed"], 7);
        assert_eq!(manifests[1].object.data["data"]["seed"], "0");
    }
}
