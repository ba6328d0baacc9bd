//! `flotilla sandbox hollow`: many GPU nodes without processes, on the sandbox or a real API server.

use std::{num::NonZero, path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::{Args, value_parser};
use flotilla_api::progress::{Progress, Stage};
use flotilla_sandbox::hollow::{self, FleetConfig, Life};
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::control_plane::interrupted;

/// What `--help` ends with.
pub const EXAMPLES: &str = "Examples:\n  \
    200 nodes of 8 GPUs on the sandbox, beside its own node:\n    \
    flotilla sandbox up --dir .flotilla\n    \
    flotilla sandbox hollow --kubeconfig .flotilla/kubeconfig --nodes 200\n  \
    Jobs that take a minute each, on any cluster whose kubeconfig may write nodes and pods:\n    \
    flotilla sandbox hollow --kubeconfig ~/.kube/config --nodes 50 --run-for 60\n\n\
    A pod's own length outranks --run-for: annotation hollow.sandbox.flotilla.dev/run-for, or the environment variable \
    HOLLOW_RUN_FOR of a container (in a TrainingJob: spec.roles.learner.pod.podOverrides.env), in seconds. Pods with \
    restartPolicy Always never finish. The nodes carry no taint: on a cluster with real nodes, pods may land on either; \
    to keep them apart give the nodes a label (--label pool=hollow) and the pods a nodeSelector.\n\n\
    Nodes and pods stay in the API when the command ends; the same command goes on with them. To remove them: \
    kubectl delete nodes -l hollow.sandbox.flotilla.dev/fleet=PREFIX";

/// `flotilla sandbox hollow`.
#[derive(Args, Clone, Debug)]
pub struct Hollow {
    /// Kubeconfig of the API server; it must allow writing nodes, leases and pods.
    #[arg(long, value_name = "FILE", env = "KUBECONFIG")]
    pub kubeconfig: PathBuf,
    /// Number of nodes.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = value_parser!(u32).range(1..=5000))]
    pub nodes: u32,
    /// GPUs that each node offers as nvidia.com/gpu.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub gpus: u32,
    /// Pods that each node takes.
    #[arg(long, value_name = "N", default_value_t = 110)]
    pub pods: u32,
    /// Nodes are named PREFIX-0, PREFIX-1 and so on. One command per prefix.
    #[arg(long, default_value = "hollow")]
    pub prefix: String,
    /// A label of the nodes; may be given several times.
    #[arg(long = "label", value_name = "NAME=VALUE", value_parser = label)]
    pub labels: Vec<(String, String)>,
    /// Seconds after which a pod ends with exit code 0 and a termination message; without it pods run until they are
    /// deleted.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub run_for: Option<Duration>,
    /// What a running pod answers to GET /progress, a Progress as JSON.
    #[arg(long, value_name = "JSON", value_parser = progress)]
    pub progress: Option<Progress>,
    /// Writes to the API server that may be in flight.
    #[arg(long, value_name = "N", default_value = "16")]
    pub concurrency: NonZero<u16>,
}

/// Runs the fleet until SIGINT or SIGTERM.
pub async fn command(arguments: Hollow) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let path = &arguments.kubeconfig;
    let kubeconfig = Kubeconfig::read_from(path).with_context(|| format!("read {}", path.display()))?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    let stop = CancellationToken::new();
    let running = hollow::run(Client::try_from(config)?, fleet(arguments), stop.clone());
    tokio::pin!(running);
    tokio::select! {
        outcome = &mut running => return Ok(outcome?),
        () = interrupted() => stop.cancel(),
    }
    Ok(running.await?)
}

fn fleet(arguments: Hollow) -> FleetConfig {
    let word = |stage: Stage, message: &str| Progress {
        stage,
        message: message.to_owned(),
        ..Progress::default()
    };
    let running = arguments
        .progress
        .unwrap_or_else(|| word(Stage::Running, "no process runs on a hollow node"));
    FleetConfig {
        gpus: arguments.gpus,
        max_pods: arguments.pods,
        prefix: arguments.prefix,
        labels: arguments.labels.into_iter().collect(),
        life: Life {
            run_for: arguments.run_for,
            last_word: word(Stage::Completed, "its time on a hollow node is over").termination_message(),
            stopped_word: word(Stage::Suspended, "it was deleted from a hollow node").termination_message(),
        },
        progress: Some(running.termination_message()),
        concurrency: arguments.concurrency,
        ..FleetConfig::new(arguments.nodes)
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text
        .parse()
        .map_err(|error| format!("not a number of seconds: {error}"))?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

fn label(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(name, _)| !name.is_empty());
    pair.map(|(name, value)| (name.to_owned(), value.to_owned()))
        .ok_or_else(|| "a label is NAME=VALUE, for example pool=hollow".to_owned())
}

fn progress(text: &str) -> Result<Progress, String> {
    serde_json::from_str(text).map_err(|error| format!("not a Progress: {error}"))
}
