//! `flotilla-operator`: runs the controllers, or prints the definitions of their kinds.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use flotilla_operator::{OperatorConfig, crds, run};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Turns TrainingJobs, Datasets, ModelCheckpoints and ModelDeployments into pods.
///
/// Uses the in-cluster service account, or else KUBECONFIG. The kinds must be installed first:
/// `flotilla-operator crds --out crds && kubectl apply -f crds`.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the controllers until SIGTERM or SIGINT; running passes are finished, pods stay as they are.
    Run(RunArgs),
    /// Write the custom resource definitions as YAML, to a directory or to standard output.
    Crds {
        /// Directory that receives one file per kind.
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
}

#[derive(Args, Debug)]
struct RunArgs {
    /// Image of worker pods whose spec names none.
    #[arg(long, env = "FLOTILLA_WORKER_IMAGE", default_value = "flotilla-worker")]
    worker_image: String,
    /// Address of /metrics, /healthz and /readyz.
    #[arg(long, env = "FLOTILLA_LISTEN", default_value = "0.0.0.0:8081")]
    listen: SocketAddr,
    /// Passes of one controller that may run at the same time.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    concurrency: u16,
    /// Seconds between two reads of a running worker's progress.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    progress_interval: u64,
    /// Work in this namespace only (a Role is then enough); all namespaces if absent.
    #[arg(long, env = "FLOTILLA_NAMESPACE")]
    namespace: Option<String>,
    /// How log lines are written; RUST_LOG selects which.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Run(args) => operate(args).await,
        Command::Crds { out } => write_crds(out),
    }
}

async fn operate(args: RunArgs) -> anyhow::Result<()> {
    start_logging(args.log_format);
    let client = kube::Client::try_default().await.context("connect to the API server")?;
    let config = OperatorConfig {
        worker_image: args.worker_image,
        listen: Some(args.listen),
        concurrency: args.concurrency,
        progress_interval: Duration::from_secs(args.progress_interval),
        namespace: args.namespace,
        ..OperatorConfig::default()
    };
    let shutdown = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let stop = shutdown.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        tracing::info!("stopping");
        stop.cancel();
    });
    run(client, config, shutdown).await.context("run the operator")
}

fn start_logging(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
}

fn write_crds(out: Option<PathBuf>) -> anyhow::Result<()> {
    let files = crds::files().context("render the definitions")?;
    let Some(directory) = out else {
        for (_, text) in files {
            println!("---\n{text}");
        }
        return Ok(());
    };
    std::fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    for (name, text) in files {
        let path = directory.join(name);
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}
