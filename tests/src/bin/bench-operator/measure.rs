//! The experiments, in order.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use flotilla_api::TrainingJob;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{DeleteParams, ListParams},
};

use crate::{
    arguments::Arguments,
    audit::{self, Audited},
    bare, load, objects,
    process::Memory,
    scrape::Scrape,
    stage::Stage,
};

/// Histogram of the time that passes compute.
const COMPUTE: &str = "flotilla_operator_reconcile_compute_seconds";
/// How often one large job is measured; the median counts.
const GANGS: usize = 3;

/// What was measured.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Seconds until all pods of one large job were there, for each try.
    pub gangs: Vec<f64>,
    /// Pods per second of the bare client, before the first wave and after the second.
    pub bare: (f64, f64),
    /// The two waves.
    pub waves: (Wave, Wave),
    /// No event, only resyncs.
    pub quiet: Quiet,
    /// A new operator on old objects.
    pub restart: Restart,
    /// The operator's requests by the API server's account, and by its own, at the end of the second wave.
    pub audited: (Audited, f64),
}

/// One wave of jobs.
#[derive(Clone, Debug)]
pub struct Wave {
    /// Pods that it added.
    pub pods: u32,
    /// Seconds from the first apply until the last pod was there.
    pub seconds: f64,
    /// Seconds from the first apply until every job was Running.
    pub running_seconds: f64,
    /// The operator's requests to the API server meanwhile, by verb and resource.
    pub requests: Vec<(String, f64)>,
    /// All of them, and those that may change something.
    pub totals: (f64, f64),
    /// Passes over TrainingJobs.
    pub passes: f64,
    /// Median and 99th percentile of the time that passes of all kinds compute, in seconds.
    pub compute: (f64, f64),
    /// The operator's memory afterwards.
    pub memory: Memory,
    /// Processor seconds by program.
    pub processor: Vec<(String, f64)>,
}

/// A while without events.
#[derive(Clone, Copy, Debug)]
pub struct Quiet {
    /// Its length in seconds.
    pub seconds: f64,
    /// Passes over TrainingJobs.
    pub passes: f64,
    /// Requests that may change something.
    pub writes: f64,
    /// Other requests.
    pub reads: f64,
    /// Processor seconds of the operator.
    pub processor: f64,
}

/// A new operator on old objects.
#[derive(Clone, Copy, Debug)]
pub struct Restart {
    /// Seconds until every kind was listed.
    pub listed: f64,
    /// Seconds until there had been a pass for every job.
    pub converged: f64,
    /// Requests that may change something.
    pub writes: f64,
    /// Memory when converged.
    pub memory: Memory,
}

/// Runs all experiments.
pub async fn measure(stage: &mut Stage, arguments: &Arguments) -> anyhow::Result<Measured> {
    let model = warm_up(stage, arguments).await?;
    let mut gangs = Vec::with_capacity(GANGS);
    for number in 0..GANGS {
        gangs.push(gang(stage, number, arguments.gang).await?);
    }
    gangs.sort_by(f64::total_cmp);
    let (first, second) = arguments.jobs;
    let bare_pods = first * arguments.pods;
    eprintln!("gangs of {}: {gangs:.2?} s; the bare client", arguments.gang);
    let bare_before = bare::ceiling(stage, &model, bare_pods, arguments.in_flight).await?;
    eprintln!("{bare_before:.1} pods/s; the first wave: {first} jobs");
    let one = wave(stage, (0, first), arguments.pods).await?;
    eprintln!("{:.1} pods/s; the second wave: {second} jobs", one.rate());
    let two = wave(stage, (first, second), arguments.pods).await?;
    eprintln!("{:.1} pods/s; a while without events", two.rate());
    let audited = (
        audit::read(&stage.audit_log())?,
        without_watches(&stage.scrape().await?),
    );
    let quiet = quiet(stage, second, arguments.progress_interval).await?;
    eprintln!("{} writes; the bare client again", quiet.writes);
    stage.kill_operator()?;
    let bare_after = bare::ceiling(stage, &model, bare_pods, arguments.in_flight).await?;
    eprintln!("{bare_after:.1} pods/s; a new operator");
    let restart = restart(stage, second).await?;
    Ok(Measured {
        gangs,
        bare: (bare_before, bare_after),
        waves: (one, two),
        quiet,
        restart,
        audited,
    })
}

/// One small job, so that connections and caches are there; returns its learner as the model of the bare pods.
async fn warm_up(stage: &mut Stage, arguments: &Arguments) -> anyhow::Result<Pod> {
    let pods = arguments.pods.min(2);
    let name = "warm-up".to_owned();
    load::apply_jobs(&stage.client, std::iter::once(name), pods).await?;
    load::wait_for_pods(stage, objects::NAMESPACE, u64::from(pods), Duration::from_millis(50)).await?;
    load::wait_for_running_jobs(stage, 1).await?;
    let api: Api<Pod> = Api::namespaced(stage.client.clone(), objects::NAMESPACE);
    let pods = api.list(&ListParams::default()).await?.items;
    let model = pods.into_iter().next().context("the warm-up has a pod")?;
    clear(stage).await?;
    Ok(model)
}

/// Seconds from the apply until all pods of one job are there.
async fn gang(stage: &mut Stage, number: usize, pods: u32) -> anyhow::Result<f64> {
    let begun = Instant::now();
    load::apply_jobs(&stage.client, std::iter::once(format!("gang-{number}")), pods).await?;
    load::wait_for_pods(stage, objects::NAMESPACE, u64::from(pods), Duration::from_millis(20)).await?;
    let seconds = begun.elapsed().as_secs_f64();
    load::wait_for_running_jobs(stage, 1).await?;
    clear(stage).await?;
    Ok(seconds)
}

/// Deletes every job and waits for its pods to go.
async fn clear(stage: &mut Stage) -> anyhow::Result<()> {
    let api: Api<TrainingJob> = Api::namespaced(stage.client.clone(), objects::NAMESPACE);
    let (params, all) = (DeleteParams::background(), ListParams::default());
    api.delete_collection(&params, &all).await?;
    load::wait_for_pods(stage, objects::NAMESPACE, 0, Duration::from_millis(200)).await
}

async fn wave(stage: &mut Stage, (from, to): (u32, u32), pods: u32) -> anyhow::Result<Wave> {
    let before = stage.scrape().await?;
    let processor_before = stage.processor_seconds()?;
    let begun = Instant::now();
    let (client, names) = (stage.client.clone(), (from..to).map(|index| format!("job-{index}")));
    let applied = tokio::spawn(async move { load::apply_jobs(&client, names, pods).await });
    let wanted = u64::from(to) * u64::from(pods);
    load::wait_for_pods(stage, objects::NAMESPACE, wanted, Duration::from_millis(100)).await?;
    let seconds = begun.elapsed().as_secs_f64();
    applied.await??;
    load::wait_for_running_jobs(stage, to).await?;
    let running_seconds = begun.elapsed().as_secs_f64();
    let after = stage.scrape().await?;
    let processor = stage.processor_seconds()?.into_iter().zip(processor_before);
    let percentile = |quantile| after.percentile(&before, COMPUTE, quantile);
    Ok(Wave {
        pods: (to - from) * pods,
        seconds,
        running_seconds,
        requests: since(&before, &after),
        totals: (
            without_watches(&after) - without_watches(&before),
            after.writes() - before.writes(),
        ),
        passes: after.passes() - before.passes(),
        compute: (percentile(0.5)?, percentile(0.99)?),
        memory: stage.operator_memory()?,
        processor: processor.map(|((name, now), (_, then))| (name, now - then)).collect(),
    })
}

impl Wave {
    /// Pods per second.
    pub fn rate(&self) -> f64 {
        f64::from(self.pods) / self.seconds
    }
}

fn without_watches(scrape: &Scrape) -> f64 {
    scrape.all_requests() - scrape.requests("watch")
}

/// Requests between two scrapes, the most frequent first.
fn since(before: &Scrape, after: &Scrape) -> Vec<(String, f64)> {
    let known = before.by_verb_and_resource();
    let counts = after.by_verb_and_resource().into_iter().map(|(name, count)| {
        let count = count - known.get(&name).copied().unwrap_or(0.0);
        (name, count)
    });
    let mut counts: Vec<(String, f64)> = counts.filter(|(_, count)| *count > 0.0).collect();
    counts.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    counts
}

/// Long enough for every job to be looked at at least once: running jobs are, at each reading of their progress.
async fn quiet(stage: &mut Stage, jobs: u32, progress_interval: u64) -> anyhow::Result<Quiet> {
    // What the end of the wave left to do is done first.
    tokio::time::sleep(Duration::from_secs(progress_interval + 5)).await;
    let operator = |stage: &Stage| -> anyhow::Result<f64> {
        let seconds = stage.processor_seconds()?;
        let own = seconds.iter().find(|(name, _)| name == "operator");
        Ok(own.context("the operator runs")?.1)
    };
    let (before, processor) = (stage.scrape().await?, operator(stage)?);
    let begun = Instant::now();
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let after = stage.scrape().await?;
        let passes = after.passes() - before.passes();
        let long_enough = begun.elapsed() > Duration::from_secs(2 * progress_interval);
        if !(long_enough && passes >= f64::from(jobs)) && begun.elapsed() < Duration::from_secs(60) {
            continue;
        }
        let writes = after.writes() - before.writes();
        return Ok(Quiet {
            seconds: begun.elapsed().as_secs_f64(),
            passes,
            writes,
            reads: without_watches(&after) - without_watches(&before) - writes,
            processor: operator(stage)? - processor,
        });
    }
}

async fn restart(stage: &mut Stage, jobs: u32) -> anyhow::Result<Restart> {
    let begun = Instant::now();
    let listed = stage.start_operator().await?.as_secs_f64();
    loop {
        let scrape = stage.scrape().await?;
        if scrape.passes() >= f64::from(jobs) {
            return Ok(Restart {
                listed,
                converged: begun.elapsed().as_secs_f64(),
                writes: scrape.writes(),
                memory: stage.operator_memory()?,
            });
        }
        stage.check()?;
        anyhow::ensure!(
            begun.elapsed() < Duration::from_secs(120),
            "the new operator does not converge"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
