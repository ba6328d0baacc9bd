//! `flotilla-operator`: runs the controllers, or prints the definitions of their kinds.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use flotilla_operator::{
    OperatorConfig, crds,
    leader::{self, ElectionConfig},
    run, run_elected,
};
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
    #[command(flatten)]
    election: ElectionArgs,
    /// How log lines are written; RUST_LOG selects which.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

/// Of several operators one leads. The others are ready to take over and make no passes.
#[derive(Args, Debug)]
#[command(next_help_heading = "Leader election")]
struct ElectionArgs {
    /// Take part in an election: needed as soon as a second operator may run.
    ///
    /// A leader that is deposed, or cannot renew its lease, ends with exit code 1 and is to be started again.
    #[arg(long)]
    leader_elect: bool,
    /// Namespace of the Lease; by default that of the pod, or of the kubeconfig's context.
    #[arg(long, env = "POD_NAMESPACE", value_name = "NAMESPACE")]
    lease_namespace: Option<String>,
    /// Name of the Lease.
    #[arg(long, default_value = "flotilla-operator", value_name = "NAME")]
    lease_name: String,
    /// Name of this process in the Lease and in the API server's audit log; a random part is added.
    #[arg(long, env = "POD_NAME", value_name = "NAME")]
    lease_identity: Option<String>,
    /// Seconds for which a standby must see the Lease unchanged before it takes over.
    #[arg(long, default_value_t = 15, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=3600))]
    lease_duration: u32,
    /// Seconds without a renewal after which the leader has stopped writing and ends; less than the lease duration.
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=3600))]
    renew_deadline: u32,
    /// Seconds between two renewals, and between two looks of a standby.
    #[arg(long, default_value_t = 2, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=3600))]
    retry_period: u32,
}

impl ElectionArgs {
    /// `<pod or process>_<random>`: a container that starts again in the same pod is another candidate.
    fn identity(&self) -> String {
        let name = self.lease_identity.clone();
        let name = name.unwrap_or_else(|| format!("process-{}", std::process::id()));
        format!("{name}_{:08x}", rand::random::<u32>())
    }

    fn config(&self, identity: String, default_namespace: &str) -> ElectionConfig {
        let namespace = self.lease_namespace.as_deref().unwrap_or(default_namespace);
        ElectionConfig {
            name: self.lease_name.clone(),
            lease_duration: Duration::from_secs(self.lease_duration.into()),
            renew_deadline: Duration::from_secs(self.renew_deadline.into()),
            retry_period: Duration::from_secs(self.retry_period.into()),
            ..ElectionConfig::new(identity, namespace)
        }
    }
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
    let kube_config = kube::Config::infer().await.context("find the API server")?;
    let identity = args.election.identity();
    let kube_config = leader::with_user_agent(kube_config, &identity);
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
    let ended = if args.election.leader_elect {
        let election = args.election.config(identity, &kube_config.default_namespace);
        let (client, candidate) = leader::candidate(kube_config, election)?;
        run_elected(client, config, candidate, shutdown).await
    } else {
        let client = kube::Client::try_from(kube_config).context("connect to the API server")?;
        run(client, config, shutdown).await
    };
    ended.context("run the operator")
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
