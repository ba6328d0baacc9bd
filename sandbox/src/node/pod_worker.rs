//! One pod on this node, from its first sight to its removal.
//!
//! The worker looks at the pod as it should be and at the record of what is, does what is missing, writes both down
//! and waits for the next change: of the pod, of a container, of the clock.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use super::{
    agent::Context,
    container::{self, ContainerError, News, Recipe, Run, Signal, Surroundings},
    event::{Severity, reference},
    leftover, log,
    probe::ProbeKind,
    publish::{Publisher, Written},
    record::{Exit, PodRecord, State},
    restart::{Next, plan},
    sources::{PodFacts, Sources},
    status, stop,
    volume::{self, Mounts},
};

/// Pause after something that may work the next time.
const RETRY: Duration = Duration::from_secs(1);

/// The pod as the API shows it.
#[derive(Clone, Debug)]
pub enum View {
    /// It is there.
    Present(Arc<Pod>),
    /// It is not there any more.
    Gone,
}

/// Why a pod must stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    Gone,
    Deleted,
    Ended,
    Shutdown,
}

/// See the module.
#[derive(Debug)]
pub struct PodWorker {
    context: Arc<Context>,
    view: watch::Receiver<View>,
    pod: Arc<Pod>,
    record: PodRecord,
    publisher: Publisher,
    runs: BTreeMap<usize, Run>,
    sender: mpsc::Sender<Signal>,
    signals: mpsc::Receiver<Signal>,
    inputs: Option<(Sources, Mounts)>,
    /// Sources must be read again before the next start.
    stale: bool,
    retry_at: Option<Instant>,
    resync_at: Instant,
    /// Volumes are to be compared with their sources again.
    resync: bool,
    /// The API was told to forget the pod.
    deleted: bool,
}

impl PodWorker {
    /// A worker for `pod`, continuing `record` where an earlier agent left one.
    pub fn new(context: Arc<Context>, pod: Arc<Pod>, view: watch::Receiver<View>, record: Option<PodRecord>) -> Self {
        let (sender, signals) = mpsc::channel(64);
        let record = record.unwrap_or_else(|| PodRecord::new(&pod, Timestamp::now()));
        let resync_at = Instant::now() + context.config.sync_period;
        Self {
            publisher: Publisher::new(Arc::clone(&context)),
            context,
            view,
            pod,
            record,
            runs: BTreeMap::new(),
            sender,
            signals,
            inputs: None,
            stale: true,
            retry_at: None,
            resync_at,
            resync: false,
            deleted: false,
        }
    }

    /// Works until the pod is gone or the agent stops.
    pub async fn run(mut self) {
        loop {
            let view = self.view.borrow_and_update().clone();
            if let View::Present(pod) = &view {
                self.pod = Arc::clone(pod);
            }
            self.retry_at = self.retry_at.filter(|at| *at > Instant::now());
            let over = match self.cause(&view) {
                Some(cause) => self.stop(cause).await,
                None => {
                    self.advance().await;
                    false
                }
            };
            if over {
                return;
            }
            self.publish(&view).await;
            self.wait().await;
        }
    }

    fn cause(&self, view: &View) -> Option<Cause> {
        if matches!(view, View::Gone) {
            Some(Cause::Gone)
        } else if self.pod.metadata.deletion_timestamp.is_some() {
            Some(Cause::Deleted)
        } else if self.context.shutdown.is_cancelled() {
            Some(Cause::Shutdown)
        } else if self.record.ended.is_some() || status::terminal_phase(&self.pod).is_some() {
            Some(Cause::Ended)
        } else {
            None
        }
    }

    async fn publish(&mut self, view: &View) {
        if matches!(view, View::Gone) {
            return;
        }
        // A pod that ended before this agent knew it keeps the status it has.
        if status::terminal_phase(&self.pod).is_some() && self.runs.is_empty() && self.inputs.is_none() {
            return;
        }
        if self.publisher.publish(&self.pod, &self.record).await == Written::Failed {
            self.retry_soon();
        }
    }

    fn retry_soon(&mut self) {
        let at = Instant::now() + RETRY;
        self.retry_at = Some(self.retry_at.map_or(at, |earlier| earlier.min(at)));
    }

    /// Waits for the next reason to look again.
    async fn wait(&mut self) {
        if self.resync_at <= Instant::now() {
            self.resync_at = Instant::now() + self.context.config.sync_period;
            self.resync = true;
        }
        let wake = self.wake_at();
        tokio::select! {
            changed = self.view.changed() => {
                if changed.is_err() {
                    // The agent is gone without a word; its containers must not outlive it.
                    self.context.shutdown.cancel();
                }
            }
            signal = self.signals.recv() => {
                if let Some(signal) = signal {
                    self.take(signal);
                }
                while let Ok(signal) = self.signals.try_recv() {
                    self.take(signal);
                }
            }
            () = tokio::time::sleep_until(wake) => {}
            () = self.context.shutdown.cancelled(), if !self.was_told_to_stop() => {}
        }
    }

    /// After the shutdown began, only the ends of the containers matter.
    fn was_told_to_stop(&self) -> bool {
        self.context.shutdown.is_cancelled()
    }

    fn wake_at(&self) -> Instant {
        let now = Timestamp::now();
        let later =
            |at: Timestamp| Instant::now() + at.duration_since(now).unsigned_abs().min(Duration::from_secs(3600));
        let planned = plan(
            status::restart_policy(&self.pod),
            &self.record,
            &self.context.config.backoff,
            now,
        );
        let restarts = planned.into_iter().filter_map(|next| match next {
            Next::Wait { until, .. } => Some(later(until)),
            Next::Start { .. } => None,
        });
        let deadline = self.deadline().filter(|at| *at > now).map(later);
        let kills = self.runs.values().filter_map(|run| run.kill_at);
        restarts
            .chain(deadline)
            .chain(kills)
            .chain(self.retry_at)
            .fold(self.resync_at, std::cmp::Ord::min)
            .max(Instant::now() + Duration::from_millis(20))
    }

    fn deadline(&self) -> Option<Timestamp> {
        let seconds = self.pod.spec.as_ref()?.active_deadline_seconds?;
        if self.record.ended.is_some() {
            return None;
        }
        self.record
            .started_at
            .checked_add(SignedDuration::from_secs(seconds))
            .ok()
    }

    /// Stops what runs. True when the worker has nothing left to do.
    async fn stop(&mut self, cause: Cause) -> bool {
        let grace = match cause {
            Cause::Gone => stop::least_grace(),
            _ if self.was_told_to_stop() => stop::grace_period(&self.pod).min(self.context.config.shutdown_grace),
            Cause::Shutdown | Cause::Deleted | Cause::Ended => stop::grace_period(&self.pod),
        };
        let now = Instant::now();
        for (index, run) in &mut self.runs {
            if run.stop(grace) {
                let container = &mut self.record.containers[*index];
                container.ready = false;
                let text = format!("Stopping container {}", container.name);
                self.context
                    .note(&self.pod, Some(&container.name), Severity::Normal, "Killing", text);
            }
            run.kill_when_due(now);
        }
        if !self.runs.is_empty() {
            return false;
        }
        match cause {
            Cause::Ended => false,
            Cause::Shutdown => {
                self.publish(&View::Present(Arc::clone(&self.pod))).await;
                self.publisher.save(&self.record);
                true
            }
            Cause::Gone => {
                self.remove().await;
                true
            }
            Cause::Deleted => {
                self.finish_deletion().await;
                // An agent that stops hears no more of the API; the next one finishes what is left.
                self.was_told_to_stop()
            }
        }
    }

    async fn finish_deletion(&mut self) {
        if self.deleted || self.pod.metadata.deletion_grace_period_seconds == Some(0) {
            return;
        }
        self.publish(&View::Present(Arc::clone(&self.pod))).await;
        match self.publisher.delete(&self.record).await {
            Written::Done | Written::Gone => self.deleted = true,
            Written::Failed => self.retry_soon(),
        }
    }

    async fn remove(&mut self) {
        let uid = self.record.uid.clone();
        let root = self.context.config.dir.clone();
        let removed = {
            let uid = uid.clone();
            tokio::task::spawn_blocking(move || leftover::remove(&root, &uid)).await
        };
        if let Ok(Err(error)) = removed {
            tracing::warn!(pod = self.record.name, %error, "a pod's directory was not removed");
        }
        self.context.release(&uid);
    }

    /// Brings the pod nearer to its spec.
    async fn advance(&mut self) {
        let now = Timestamp::now();
        for run in self.runs.values() {
            run.kill_when_due(Instant::now());
        }
        if self.deadline().is_some_and(|deadline| deadline <= now) {
            let message = "Pod was active on the node longer than the specified deadline".to_owned();
            self.context
                .note(&self.pod, None, Severity::Normal, "DeadlineExceeded", message.clone());
            self.record.ended = Some(("DeadlineExceeded".to_owned(), message));
            return;
        }
        let resync = std::mem::take(&mut self.resync);
        if (self.inputs.is_none() || resync) && self.retry_at.is_none() && !self.prepare().await {
            self.retry_soon();
        }
        if self.inputs.is_none() {
            return;
        }
        for next in plan(
            status::restart_policy(&self.pod),
            &self.record,
            &self.context.config.backoff,
            now,
        ) {
            match next {
                Next::Start { index, backoff } => self.begin(index, backoff).await,
                Next::Wait {
                    index,
                    delay,
                    until,
                    backoff,
                } => self.hold(index, delay, until, backoff),
            }
        }
    }

    fn facts(&self) -> Option<PodFacts> {
        Some(PodFacts {
            pod_ip: self.record.ip?,
            host_ip: self.context.config.addresses.host(),
            node_name: self.context.config.name.clone(),
        })
    }

    /// Address, sources and volumes. False when something is missing.
    async fn prepare(&mut self) -> bool {
        match self.context.address(&self.record) {
            Ok(ip) => self.record.ip = Some(ip),
            Err(error) => {
                let text = error.to_string();
                self.context
                    .note(&self.pod, None, Severity::Warning, "FailedCreatePodSandBox", text);
                return false;
            }
        }
        let Some(facts) = self.facts() else { return false };
        let config = &self.context.config;
        let sources = match Sources::gather(&self.context.client, &self.pod).await {
            Ok(sources) => sources,
            Err(error) => {
                tracing::warn!(pod = self.record.name, %error, "reading what a pod refers to");
                return false;
            }
        };
        let dir = leftover::pod_dir(&config.dir, &self.record.uid);
        match volume::mount(&self.context.client, &config.dir, &dir, &self.pod, &facts, &sources).await {
            Ok(mounts) => {
                self.inputs = Some((sources, mounts));
                self.record.prepared = true;
                self.stale = false;
                true
            }
            Err(error) => {
                self.context
                    .note(&self.pod, None, Severity::Warning, "FailedMount", error.to_string());
                false
            }
        }
    }

    /// Starts container `index`; a failure becomes its state.
    async fn begin(&mut self, index: usize, backoff: u32) {
        if std::mem::replace(&mut self.stale, true) && !self.prepare().await {
            self.retry_soon();
            return;
        }
        let record = &self.record.containers[index];
        let again = record.newest_exit().is_some();
        let restart = record.restart_count + u32::from(again);
        let Some(container) = container_spec(&self.pod, &record.name).cloned() else {
            return;
        };
        let previous = record.newest_exit().cloned();
        match self.start(index, restart, &container) {
            Ok(run) => {
                let record = &mut self.record.containers[index];
                record.last = previous;
                record.restart_count = restart;
                record.backoff = backoff;
                record.process = Some(run.process.id());
                record.state = State::Running {
                    started_at: Timestamp::now(),
                };
                record.started = record.init || container.startup_probe.is_none();
                record.ready = record.started && container.readiness_probe.is_none();
                let started = record.started && !record.init;
                self.runs.insert(index, run);
                // On disk before anything else happens: a later agent must find the process.
                self.publisher.save(&self.record);
                if started {
                    self.probe_after_startup(index);
                }
                let text = format!("Started container {}", container.name);
                self.context
                    .note(&self.pod, Some(&container.name), Severity::Normal, "Started", text);
            }
            Err(error) => self.refuse(index, restart, backoff, previous, &container, &error),
        }
    }

    fn start(&self, index: usize, restart: u32, container: &Container) -> Result<Run, ContainerError> {
        let (Some((sources, mounts)), Some(facts)) = (&self.inputs, self.facts()) else {
            return Err(ContainerError::Image("a pod that is not prepared".to_owned()));
        };
        let config = &self.context.config;
        let pod_dir = leftover::pod_dir(&config.dir, &self.record.uid);
        let devices = container::visible_devices(config, container, self.context.devices_of_others(&self.pod));
        let recipe = Recipe {
            pod: &self.pod,
            container,
            pod_dir: &pod_dir,
            facts: &facts,
            sources,
            mounts,
            restart,
            visible_devices: &devices,
        };
        let prepared = recipe.prepare(config)?;
        let image = container.image.as_deref().unwrap_or_default();
        let name = Some(container.name.as_str());
        let pulled = format!("Container image \"{image}\" already present on machine");
        self.context.note(&self.pod, name, Severity::Normal, "Pulled", pulled);
        let created = format!("Created container: {}", container.name);
        self.context.note(&self.pod, name, Severity::Normal, "Created", created);
        let record = &self.record;
        let around = Surroundings {
            guard: Arc::clone(&self.context.guard),
            news: self.sender.clone(),
            http: self.context.http.clone(),
            log_dir: log::pod_dir(&config.dir, &record.namespace, &record.name, &record.uid).join(&container.name),
            log_limits: config.log_limits,
        };
        container::start(&recipe, prepared, index, &around)
    }

    /// Notes why container `index` did not start. A program that cannot run is an end, the rest is tried again.
    fn refuse(
        &mut self,
        index: usize,
        restart: u32,
        backoff: u32,
        previous: Option<Exit>,
        container: &Container,
        error: &ContainerError,
    ) {
        let now = Timestamp::now();
        let text = format!("Error: {error}");
        self.context
            .note(&self.pod, Some(&container.name), Severity::Warning, "Failed", text);
        let record = &mut self.record.containers[index];
        record.last = previous;
        if matches!(error, ContainerError::Start { .. }) {
            record.restart_count = restart;
            record.backoff = backoff;
            record.end(Exit {
                code: 128,
                signal: None,
                reason: "StartError".to_owned(),
                message: Some(error.to_string()),
                started_at: Timestamp::UNIX_EPOCH,
                finished_at: now,
                container_id: None,
            });
            return;
        }
        let pause =
            SignedDuration::try_from(self.context.config.backoff.base.max(RETRY)).unwrap_or(SignedDuration::ZERO);
        record.state = State::waiting(error.reason(), Some(error.to_string()), now.checked_add(pause).ok());
    }

    /// Lets container `index` wait out its restart delay.
    fn hold(&mut self, index: usize, delay: Duration, until: Timestamp, backoff: u32) {
        let uid = &self.record.uid;
        let (pod, namespace) = (&self.record.name, &self.record.namespace);
        let record = &mut self.record.containers[index];
        let State::Terminated(exit) = record.state.clone() else {
            return;
        };
        let name = record.name.clone();
        let message = format!("back-off {delay:?} restarting failed container={name} pod={pod}_{namespace}({uid})");
        record.last = Some(exit);
        record.backoff = backoff;
        record.state = State::waiting("CrashLoopBackOff", Some(message), Some(until));
        let text = format!("Back-off restarting failed container {name} in pod {pod}_{namespace}({uid})");
        self.context
            .note(&self.pod, Some(&name), Severity::Warning, "BackOff", text);
    }

    fn probe_after_startup(&mut self, index: usize) {
        if let Some(run) = self.runs.get_mut(&index) {
            run.probe(ProbeKind::Readiness, index, &self.sender);
            run.probe(ProbeKind::Liveness, index, &self.sender);
        }
    }

    /// Takes note of one piece of news; news of an earlier run are void.
    fn take(&mut self, signal: Signal) {
        let Signal { index, restart, news } = signal;
        if self.runs.get(&index).is_none_or(|run| run.restart != restart) {
            return;
        }
        let name = self.record.containers[index].name.clone();
        match news {
            News::Exited(exit) => {
                self.runs.remove(&index);
                self.record.containers[index].end(exit);
            }
            News::Verdict(ProbeKind::Readiness, ready) => self.record.containers[index].ready = ready,
            News::Verdict(ProbeKind::Startup, true) => {
                let without_probe = container_spec(&self.pod, &name).is_some_and(|c| c.readiness_probe.is_none());
                let record = &mut self.record.containers[index];
                record.started = true;
                record.ready = without_probe;
                self.probe_after_startup(index);
            }
            News::Verdict(ProbeKind::Liveness, true) => {}
            News::Verdict(kind, false) => {
                let text = format!(
                    "Container {name} failed {} probe, will be restarted",
                    kind.name().to_lowercase()
                );
                self.kill(index, kind, text);
            }
            News::Unhealthy(kind, error) => {
                let text = format!("{} probe failed: {error}", kind.name());
                self.context
                    .note(&self.pod, Some(&name), Severity::Warning, "Unhealthy", text);
            }
            News::PostStartFailed(error) => {
                let text = format!("PostStartHook failed: {error}");
                self.context
                    .note(&self.pod, Some(&name), Severity::Warning, "FailedPostStartHook", text);
                self.kill(
                    index,
                    ProbeKind::Startup,
                    format!("Container {name} failed its postStart hook"),
                );
            }
        }
    }

    fn kill(&mut self, index: usize, kind: ProbeKind, text: String) {
        let grace = stop::grace_period(&self.pod);
        let Some(run) = self.runs.get_mut(&index) else { return };
        let own = kind
            .of(&run.target.container)
            .and_then(|probe| probe.termination_grace_period_seconds);
        let own = own
            .and_then(|seconds| u64::try_from(seconds).ok())
            .map(Duration::from_secs);
        if run.stop(own.unwrap_or(grace)) {
            let name = run.target.container.name.clone();
            self.record.containers[index].ready = false;
            self.context
                .note(&self.pod, Some(&name), Severity::Normal, "Killing", text);
        }
    }
}

fn container_spec<'a>(pod: &'a Pod, name: &str) -> Option<&'a Container> {
    let spec = pod.spec.as_ref()?;
    spec.containers
        .iter()
        .chain(spec.init_containers.iter().flatten())
        .find(|container| container.name == name)
}

impl Context {
    /// Records an event about a pod or one of its containers.
    pub fn note(&self, pod: &Pod, container: Option<&str>, severity: Severity, reason: &'static str, text: String) {
        let mut about = reference(pod);
        about.resource_version = None;
        about.field_path = container.map(|name| format!("spec.containers{{{name}}}"));
        self.events.record(about, severity, reason, text);
    }
}
