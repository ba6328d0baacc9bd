//! From a container's spec to a running process with its log, hooks and probes.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, LifecycleHandler, Pod};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
};

use super::{
    NodeConfig, accelerator,
    environment::{self, EnvironmentError},
    expansion::expand,
    guard::Guard,
    image, log,
    probe::{self, Counter, ProbeKind, ProbeTarget},
    process::{self, Launch, MARKER, Process},
    record::Exit,
    rewrite::PathRewriter,
    sources::{PodFacts, Sources},
    volume::{Mounts, VolumeError},
};

/// Bytes of a termination message that reach the status.
const MESSAGE_BYTES: usize = 4096;
/// Search path of a container whose agent has none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why a container cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// No binary for the image.
    #[error("image \"{0}\" has no local binary: name it in the sandbox's image map")]
    Image(String),
    /// Its environment cannot be made.
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    /// Its mounts cannot be made.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// Its directories or its log cannot be written.
    #[error("preparing {}: {source}", path.display())]
    Prepare {
        /// What was written.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The process cannot be started.
    #[error("starting {}: {source}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl ContainerError {
    /// Reason of the waiting state, as the kubelet names it.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Image(_) => "ErrImagePull",
            Self::Environment(_) => "CreateContainerConfigError",
            Self::Volume(_) | Self::Prepare { .. } => "CreateContainerError",
            Self::Start { .. } => "RunContainerError",
        }
    }
}

/// What happens to a container while it runs.
#[derive(Debug)]
pub struct Signal {
    /// Index in the record.
    pub index: usize,
    /// Which run.
    pub restart: u32,
    /// What happened.
    pub news: News,
}

/// See [`Signal`].
#[derive(Debug)]
pub enum News {
    /// The process ended.
    Exited(Exit),
    /// A probe reached a threshold.
    Verdict(ProbeKind, bool),
    /// One try of a probe failed.
    Unhealthy(ProbeKind, String),
    /// The `postStart` hook failed.
    PostStartFailed(String),
}

/// Everything a container is made from.
#[derive(Clone, Copy, Debug)]
pub struct Recipe<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// The container.
    pub container: &'a Container,
    /// Directory of the pod.
    pub pod_dir: &'a Path,
    /// Addresses and names.
    pub facts: &'a PodFacts,
    /// ConfigMaps, Secrets, Services.
    pub sources: &'a Sources,
    /// The pod's volumes.
    pub mounts: &'a Mounts,
    /// Which run.
    pub restart: u32,
    /// The devices of the container's GPUs.
    pub visible_devices: &'a str,
}

/// A prepared container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// The process.
    pub launch: Launch,
    /// Where it may leave its last words.
    pub message_file: PathBuf,
}

impl Recipe<'_> {
    /// Resolves image, environment, paths and directories.
    pub fn prepare(&self, config: &NodeConfig) -> Result<Prepared, ContainerError> {
        let image = self.container.image.as_deref().unwrap_or_default();
        let binary = config
            .images
            .resolve(image)
            .ok_or_else(|| ContainerError::Image(image.to_owned()))?;
        let dir = self.pod_dir.join("containers").join(&self.container.name);
        let message_file = dir.join(format!("termination-log-{}", self.restart));
        for path in [dir.join("root"), dir.join("tmp")] {
            fs::create_dir_all(&path).map_err(|source| ContainerError::Prepare { path, source })?;
        }
        fs::write(&message_file, "").map_err(|source| ContainerError::Prepare {
            path: message_file.clone(),
            source,
        })?;
        let base = self.base_environment(config, &dir);
        let plain = environment::resolve(self.pod, self.container, self.facts, self.sources, base.clone())?;
        let rewriter = self.rewriter(&plain, &message_file)?;
        let words = |list: Option<&Vec<String>>| -> Vec<String> {
            let expanded = list
                .into_iter()
                .flatten()
                .map(|word| expand(word, |name| plain.get(name).cloned()));
            expanded.map(|word| rewriter.apply(&word)).collect()
        };
        let (program, args) = image::command_line(
            binary,
            &words(self.container.command.as_ref()),
            &words(self.container.args.as_ref()),
        );
        let env = plain
            .iter()
            .map(|(name, value)| {
                let own = base.get(name) == Some(value);
                (name.clone(), if own { value.clone() } else { rewriter.apply(value) })
            })
            .collect();
        let working_dir = self.working_dir(&rewriter, &dir)?;
        Ok(Prepared {
            launch: Launch {
                program,
                args,
                env,
                dir: working_dir,
            },
            message_file,
        })
    }

    fn base_environment(&self, config: &NodeConfig, dir: &Path) -> BTreeMap<String, String> {
        let passed = config
            .pass_env
            .iter()
            .filter_map(|name| Some((name.clone(), std::env::var(name).ok()?)));
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        let uid = self.pod.metadata.uid.as_deref().unwrap_or_default();
        let mut base: BTreeMap<String, String> = passed.collect();
        base.extend([
            (
                "PATH".to_owned(),
                std::env::var("PATH").unwrap_or_else(|_| DEFAULT_PATH.to_owned()),
            ),
            ("HOME".to_owned(), text(dir.join("root"))),
            ("TMPDIR".to_owned(), text(dir.join("tmp"))),
            (
                "HOSTNAME".to_owned(),
                self.pod.metadata.name.clone().unwrap_or_default(),
            ),
            ("CUDA_VISIBLE_DEVICES".to_owned(), self.visible_devices.to_owned()),
            (MARKER.to_owned(), format!("{uid}/{}", self.container.name)),
        ]);
        base
    }

    fn rewriter(&self, env: &BTreeMap<String, String>, message_file: &Path) -> Result<PathRewriter, VolumeError> {
        let message_path = self
            .container
            .termination_message_path
            .as_deref()
            .unwrap_or("/dev/termination-log");
        let message = (message_path.to_owned(), message_file.to_string_lossy().into_owned());
        let mounts = self.mounts.of_container(self.container, env)?;
        Ok(PathRewriter::new(mounts.into_iter().chain([message])))
    }

    /// The working directory: a mount's, an existing one of the machine, or one below the container's own root.
    fn working_dir(&self, rewriter: &PathRewriter, dir: &Path) -> Result<PathBuf, ContainerError> {
        let root = dir.join("root");
        let Some(wanted) = self
            .container
            .working_dir
            .as_deref()
            .filter(|wanted| !wanted.is_empty())
        else {
            return Ok(root);
        };
        let local = PathBuf::from(rewriter.apply(wanted));
        if local.is_dir() {
            return Ok(local);
        }
        let own = root.join(wanted.trim_start_matches('/'));
        fs::create_dir_all(&own).map_err(|source| ContainerError::Prepare {
            path: own.clone(),
            source,
        })?;
        Ok(own)
    }
}

/// A running container. Dropping it kills its processes: nobody would observe them any more.
#[derive(Debug)]
pub struct Run {
    /// Which run.
    pub restart: u32,
    /// The process.
    pub process: Arc<Process>,
    /// What probes and hooks use.
    pub target: ProbeTarget,
    /// When SIGKILL comes, once the container was told to stop.
    pub kill_at: Option<tokio::time::Instant>,
    tasks: JoinSet<()>,
}

impl Drop for Run {
    fn drop(&mut self) {
        self.process.kill();
    }
}

/// What watches over a run.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// Watchdog of process groups.
    pub guard: Arc<Guard>,
    /// Where news go.
    pub news: mpsc::Sender<Signal>,
    /// Client of HTTP probes.
    pub http: reqwest::Client,
    /// Directory of the container's logs.
    pub log_dir: PathBuf,
    /// Size of logs.
    pub log_limits: log::LogLimits,
}

/// Starts the process and everything that observes it.
pub fn start(
    recipe: &Recipe<'_>,
    prepared: Prepared,
    index: usize,
    around: &Surroundings,
) -> Result<Run, ContainerError> {
    let sink = log::LogSink::open(&around.log_dir, recipe.restart, around.log_limits).map_err(|source| {
        ContainerError::Prepare {
            path: around.log_dir.clone(),
            source,
        }
    })?;
    let failed = |source| ContainerError::Start {
        program: prepared.launch.program.clone(),
        source,
    };
    let started = process::start(&prepared.launch).map_err(failed)?;
    around.guard.add(started.process.id());
    let process = Arc::new(started.process);
    let (ended, end) = oneshot::channel::<()>();
    // From here on the exit is always observed, whatever becomes of the output.
    let stdout = tokio::process::ChildStdout::from_std(started.stdout).map_err(failed);
    let stderr = tokio::process::ChildStderr::from_std(started.stderr).map_err(failed);
    let log = match (stdout, stderr) {
        (Ok(stdout), Ok(stderr)) => Some(tokio::spawn(log::collect(sink, stdout, stderr, async {
            drop(end.await);
        }))),
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!(%error, "a container's output is lost");
            None
        }
    };
    let watch = ExitWatch {
        process: Arc::clone(&process),
        container: recipe.container.clone(),
        marker: prepared.launch.env.get(MARKER).cloned().unwrap_or_default(),
        message_file: prepared.message_file,
        started_at: Timestamp::now(),
        index,
        restart: recipe.restart,
        around: around.clone(),
    };
    tokio::spawn(watch.run(ended, log));
    let target = ProbeTarget {
        container: Arc::new(recipe.container.clone()),
        pod_ip: recipe.facts.pod_ip,
        launch: Arc::new(prepared.launch),
        http: around.http.clone(),
    };
    let mut run = Run {
        restart: recipe.restart,
        process,
        target,
        kill_at: None,
        tasks: JoinSet::new(),
    };
    if run.target.container.startup_probe.is_some() {
        run.probe(ProbeKind::Startup, index, &around.news);
    }
    run.post_start(index, &around.news);
    Ok(run)
}

impl Run {
    /// Begins to probe; does nothing when the container has no such probe.
    pub fn probe(&mut self, kind: ProbeKind, index: usize, news: &mpsc::Sender<Signal>) {
        if kind.of(&self.target.container).is_some() {
            self.tasks
                .spawn(probe_loop(kind, self.target.clone(), index, self.restart, news.clone()));
        }
    }

    fn post_start(&mut self, index: usize, news: &mpsc::Sender<Signal>) {
        let hook = self
            .target
            .container
            .lifecycle
            .as_ref()
            .and_then(|lifecycle| lifecycle.post_start.clone());
        let Some(hook) = hook else { return };
        let (target, restart, news) = (self.target.clone(), self.restart, news.clone());
        self.tasks.spawn(async move {
            if let Err(text) = run_hook(&hook, &target, Duration::from_secs(60)).await {
                drop(
                    news.send(Signal {
                        index,
                        restart,
                        news: News::PostStartFailed(text),
                    })
                    .await,
                );
            }
        });
    }

    /// Ends probes and hooks.
    pub fn quiet(&mut self) {
        self.tasks.abort_all();
    }
}

/// Runs a `postStart` or `preStop` hook.
pub async fn run_hook(hook: &LifecycleHandler, target: &ProbeTarget, timeout: Duration) -> Result<(), String> {
    if let Some(action) = &hook.exec {
        return probe::exec(action.command.as_deref().unwrap_or_default(), target, timeout).await;
    }
    if let Some(action) = &hook.http_get {
        return probe::http_get(action, target, timeout).await;
    }
    if let Some(action) = &hook.sleep {
        let pause = Duration::from_secs(u64::try_from(action.seconds).unwrap_or(0));
        tokio::time::sleep(pause.min(timeout)).await;
    }
    Ok(())
}

async fn probe_loop(kind: ProbeKind, target: ProbeTarget, index: usize, restart: u32, news: mpsc::Sender<Signal>) {
    let Some(probe) = kind.of(&target.container).cloned() else {
        return;
    };
    let mut counter = Counter::new(&probe);
    let mut verdict = None;
    tokio::time::sleep(probe::initial_delay(&probe)).await;
    loop {
        let outcome = probe::attempt(&probe, &target).await;
        let success = outcome.is_ok();
        if let Err(text) = outcome {
            let signal = Signal {
                index,
                restart,
                news: News::Unhealthy(kind, text),
            };
            if news.send(signal).await.is_err() {
                return;
            }
        }
        let reached = counter.observe(success);
        if reached.is_some() && reached != verdict {
            verdict = reached;
            let signal = Signal {
                index,
                restart,
                news: News::Verdict(kind, success),
            };
            if news.send(signal).await.is_err() || (kind == ProbeKind::Startup && success) {
                return;
            }
        }
        tokio::time::sleep(probe::period(&probe)).await;
    }
}

struct ExitWatch {
    process: Arc<Process>,
    container: Container,
    marker: String,
    message_file: PathBuf,
    started_at: Timestamp,
    index: usize,
    restart: u32,
    around: Surroundings,
}

impl ExitWatch {
    async fn run(self, ended: oneshot::Sender<()>, log: Option<tokio::task::JoinHandle<()>>) {
        let outcome = self.process.wait(|id| self.around.guard.remove(id)).await;
        let finished_at = Timestamp::now();
        let marker = self.marker.clone();
        let swept = tokio::task::spawn_blocking(move || process::kill_marked(&marker)).await;
        if let Ok(1..) = swept {
            tracing::info!(
                container = self.container.name,
                ?swept,
                "processes that had left their group were killed"
            );
        }
        if ended.send(()).is_err() {
            tracing::debug!(
                container = self.container.name,
                "both ends of the output were closed before the process ended"
            );
        }
        if let Some(log) = log
            && let Err(error) = log.await
        {
            tracing::warn!(container = self.container.name, %error, "the log writer failed");
        }
        if let Err(error) = log::mark_ended(&self.around.log_dir, self.restart) {
            tracing::warn!(dir = %self.around.log_dir.display(), %error, "the end of a log was not noted");
        }
        let (code, signal, failure) = match outcome {
            Ok(ended) => (ended.code, ended.signal, None),
            Err(error) => (255, None, Some(format!("waiting for the process: {error}"))),
        };
        let exit = Exit {
            code,
            signal,
            reason: if code == 0 { "Completed" } else { "Error" }.to_owned(),
            message: failure.or_else(|| self.message(code)),
            started_at: self.started_at,
            finished_at,
            container_id: Some(self.process.id().container_id()),
        };
        let signal = Signal {
            index: self.index,
            restart: self.restart,
            news: News::Exited(exit),
        };
        if self.around.news.send(signal).await.is_err() {
            tracing::debug!(
                container = self.container.name,
                "nobody waits for the end of a container any more"
            );
        }
    }

    fn message(&self, code: i32) -> Option<String> {
        let bytes = fs::read(&self.message_file).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes[..bytes.len().min(MESSAGE_BYTES)]).into_owned();
        let from_log = self.container.termination_message_policy.as_deref() == Some("FallbackToLogsOnError");
        if text.is_empty() && from_log && code != 0 {
            return Some(log::tail_for_status(&self.around.log_dir, self.restart)).filter(|text| !text.is_empty());
        }
        Some(text).filter(|text| !text.is_empty())
    }
}

/// Devices of `container`, `taken` being held by other pods.
pub fn visible_devices(config: &NodeConfig, container: &Container, taken: u32) -> String {
    config
        .accelerators
        .visible_devices(accelerator::requested(container), taken)
}
