//! API server, controllers, node and operator in this process.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, bail};
use console::style;
use flotilla_operator::config::OperatorConfig;
use flotilla_sandbox::{
    Sandbox, Settings,
    controller::{
        self, ControllerConfig,
        provisioner::{self, ProvisionerConfig},
    },
    node::{self, Images, LogFiles, NodeConfig, accelerator::Accelerators, address::AddressBlock},
};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use tokio::{signal::unix::SignalKind, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::{EnvFilter, fmt::writer::BoxMakeWriter};

use crate::arguments::{Agent, Node, Plane, Volumes};

/// Image under which the node knows the worker's binary.
const WORKER_IMAGE: &str = "flotilla-worker";
/// Name of the sandbox's only node.
const NODE_NAME: &str = "sandbox";

/// What a control plane consists of.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory of state, volumes and logs.
    pub dir: PathBuf,
    /// The worker's binary.
    pub worker: PathBuf,
    /// GPUs that the node offers.
    pub gpus: u32,
    /// Port of the API server; 0: any.
    pub port: u16,
    /// Run the operator in this process.
    pub with_operator: bool,
    /// Run the node in this process.
    pub with_node: bool,
    /// Logs to the terminal; else to `DIR/sandbox.log`.
    pub log_to_terminal: bool,
    /// How often the operator asks workers for their progress.
    pub progress_interval: Duration,
}

impl Options {
    /// Everything, in `dir`.
    pub fn new(dir: &Path, node: &Node) -> anyhow::Result<Self> {
        Ok(Self {
            gpus: node.gpus,
            ..Self::for_tests(dir, &worker(node)?)
        })
    }

    /// Everything, in the directory of the arguments or a new one.
    pub fn for_one_run(plane: &Plane) -> anyhow::Result<Self> {
        let dir = match &plane.dir {
            Some(dir) => dir.clone(),
            None => {
                let now = SystemTime::now()
                    .duration_since(SystemTime::UNIX_EPOCH)
                    .unwrap_or_default();
                PathBuf::from(".flotilla").join(format!("run-{}", now.as_secs()))
            }
        };
        Ok(Self {
            progress_interval: Duration::from_millis(500),
            ..Self::new(&dir, &plane.node)?
        })
    }

    /// Everything, in `dir`, with the worker at `worker`.
    pub fn for_tests(dir: &Path, worker: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            worker: worker.to_owned(),
            gpus: 8,
            port: 0,
            with_operator: true,
            with_node: true,
            log_to_terminal: false,
            progress_interval: Duration::from_millis(250),
        }
    }
}

/// The worker's binary: as given, beside this program, or from PATH.
fn worker(node: &Node) -> anyhow::Result<PathBuf> {
    if let Some(path) = &node.worker {
        return std::path::absolute(path).with_context(|| format!("--worker {}", path.display()));
    }
    let beside = std::env::current_exe()
        .context("path of this program")?
        .with_file_name(WORKER_IMAGE);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut candidates = std::iter::once(beside).chain(std::env::split_paths(&path).map(|dir| dir.join(WORKER_IMAGE)));
    match candidates.find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => bail!("{WORKER_IMAGE} is neither beside this program nor in PATH: build it, or name it with --worker"),
    }
}

/// A running control plane.
#[expect(missing_debug_implementations, reason = "a client has none")]
pub struct ControlPlane {
    sandbox: Sandbox,
    client: Client,
    dir: PathBuf,
    shutdown: CancellationToken,
    operator: Option<Task>,
    node: Option<Task>,
    controllers: Task,
}

/// One of its parts, which can be stopped alone.
#[derive(Debug)]
struct Task {
    shutdown: CancellationToken,
    handle: JoinHandle<()>,
}

impl Task {
    fn spawn<F, E>(what: &'static str, parent: &CancellationToken, start: impl FnOnce(CancellationToken) -> F) -> Self
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: std::fmt::Display,
    {
        let shutdown = parent.child_token();
        let running = start(shutdown.clone());
        let handle = tokio::spawn(async move {
            if let Err(error) = running.await {
                tracing::error!(%error, "{what} ended");
                eprintln!("{} {what} ended: {error}", style("error:").red().bold());
            }
        });
        Self { shutdown, handle }
    }

    async fn stop(self) {
        self.shutdown.cancel();
        if let Err(error) = self.handle.await {
            tracing::error!(%error, "a part of the control plane ended badly");
        }
    }
}

impl ControlPlane {
    /// Starts the API server, installs the definitions, then starts the rest.
    pub async fn start(options: Options) -> anyhow::Result<Self> {
        let dir = directory(&options.dir)?;
        start_logging(&dir, options.log_to_terminal)?;
        let sandbox = Sandbox::start(Settings {
            port: options.port,
            ..Settings::new(&dir)
        })
        .await?;
        sandbox.set_pod_logs(Arc::new(LogFiles::new(dir.clone())));
        let client = sandbox.client().await?;
        install_definitions(&client).await?;

        let shutdown = CancellationToken::new();
        let addresses = AddressBlock::claim(&dir)?;
        let controllers = {
            let (client, config) = (
                client.clone(),
                ControllerConfig {
                    dir: dir.clone(),
                    addresses: addresses.clone(),
                },
            );
            Task::spawn("the controllers", &shutdown, |stop| async move {
                controller::run(client, config, stop).await;
                anyhow::Ok(())
            })
        };
        let node = match options.with_node {
            true => {
                let (client, config) = (
                    client.clone(),
                    node_config(&dir, &options.worker, options.gpus, addresses)?,
                );
                Some(Task::spawn("the node", &shutdown, |stop| {
                    node::Agent::run(client, config, stop)
                }))
            }
            false => None,
        };
        let operator = options.with_operator.then(|| {
            let config = OperatorConfig {
                progress_interval: options.progress_interval,
                ..OperatorConfig::default()
            };
            let client = client.clone();
            Task::spawn("the operator", &shutdown, |stop| {
                flotilla_operator::run::run(client, config, stop)
            })
        });
        Ok(Self {
            sandbox,
            client,
            dir,
            shutdown,
            operator,
            node,
            controllers,
        })
    }

    /// A client of the API server.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Directory of state, volumes and logs.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The API server.
    pub fn sandbox(&self) -> &Sandbox {
        &self.sandbox
    }

    /// Directory of a claim.
    pub fn volume(&self, namespace: &str, claim: &str) -> PathBuf {
        flotilla_sandbox::node::claim_dir(&self.dir, namespace, claim)
    }

    /// Says how to reach it.
    pub fn announce(&self) {
        let kubeconfig = self.sandbox.kubeconfig_path();
        eprintln!("sandbox at https://{}", self.sandbox.address());
        eprintln!(
            "  kubectl --kubeconfig {} get tj,dset,ckpt,mdep\n",
            kubeconfig.display()
        );
    }

    /// Stops the operator, then the node with all its processes, then the API server.
    pub async fn stop(self) {
        for task in [self.operator, self.node, Some(self.controllers)].into_iter().flatten() {
            task.stop().await;
        }
        self.shutdown.cancel();
        if let Err(error) = self.sandbox.shutdown().await {
            eprintln!(
                "{} the state was not written: {error}",
                style("warning:").yellow().bold()
            );
        }
    }
}

fn node_config(dir: &Path, worker: &Path, gpus: u32, addresses: Arc<AddressBlock>) -> anyhow::Result<NodeConfig> {
    let worker = worker
        .canonicalize()
        .with_context(|| format!("the worker {}", worker.display()))?;
    let mut config = NodeConfig::new(NODE_NAME, dir, addresses);
    config.images = Images::new(BTreeMap::from([(WORKER_IMAGE.to_owned(), worker)]));
    config.accelerators = Accelerators::detect(gpus);
    Ok(config)
}

/// Runs only a node, for the API server of `client`, until `stop`. Logs are served to those whose certificate `authority`
/// (DER) signed.
pub async fn node_alone(
    client: Client,
    arguments: Agent,
    authority: Option<Vec<Vec<u8>>>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let dir = directory(&arguments.dir)?;
    start_logging(&dir, true)?;
    let addresses = AddressBlock::claim(&dir)?;
    let config = NodeConfig {
        name: arguments.name,
        taints: arguments.taints,
        client_authority: authority,
        ..node_config(&dir, &worker(&arguments.node)?, arguments.node.gpus, addresses)?
    };
    node::Agent::run(client, config, stop).await?;
    Ok(())
}

/// Runs only the provisioner of claims, for the API server of `client`, until `stop`.
pub async fn volumes_alone(client: Client, arguments: Volumes, stop: CancellationToken) -> anyhow::Result<()> {
    let dir = directory(&arguments.dir)?;
    start_logging(&dir, true)?;
    let config = ProvisionerConfig {
        dir,
        class: arguments.class,
    };
    provisioner::run(client, config, stop).await?;
    Ok(())
}

fn directory(dir: &Path) -> anyhow::Result<PathBuf> {
    std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    dir.canonicalize().with_context(|| format!("resolve {}", dir.display()))
}

/// Applies the definitions of the four kinds.
pub async fn install_definitions(client: &Client) -> anyhow::Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for (file, crd) in flotilla_api::crd::all() {
        let name = crd.metadata.name.clone().unwrap_or_default();
        let params = PatchParams::apply("flotilla-cli").force();
        api.patch(&name, &params, &Patch::Apply(&crd))
            .await
            .with_context(|| format!("install {file}"))?;
    }
    Ok(())
}

/// Resolves at SIGINT or SIGTERM.
pub async fn interrupted() {
    let signals = tokio::signal::unix::signal(SignalKind::interrupt())
        .and_then(|interrupt| Ok((interrupt, tokio::signal::unix::signal(SignalKind::terminate())?)));
    match signals {
        Ok((mut interrupt, mut terminate)) => {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        }
        // Without handlers the default action of the signals ends the process.
        Err(_) => std::future::pending().await,
    }
}

fn start_logging(dir: &Path, to_terminal: bool) -> anyhow::Result<()> {
    let writer = if to_terminal {
        BoxMakeWriter::new(std::io::stderr)
    } else {
        let path = dir.join("sandbox.log");
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&path);
        BoxMakeWriter::new(file.with_context(|| format!("open {}", path.display()))?)
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(to_terminal);
    // A second control plane of one process logs where the first one does.
    let _ = subscriber.try_init();
    Ok(())
}
