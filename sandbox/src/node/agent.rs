//! Which pods this node has, and one worker for each.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    fs::File,
    io,
    net::Ipv4Addr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use futures::TryStreamExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    runtime::{WatchStreamExt, watcher, watcher::Event},
};
use rustix::fs::{FlockOperation, flock};
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::{
    NodeConfig, accelerator,
    address::{AddressError, AddressPool},
    event::EventRecorder,
    guard::Guard,
    leftover,
    log::LogFiles,
    log_server::{LogServer, LogServerError},
    pod_worker::{PodWorker, View},
    record::PodRecord,
    registration,
};

/// Why a node cannot run.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The directory cannot be used.
    #[error("preparing the node's directory {}: {source}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another agent works there.
    #[error("another node agent uses {}", .0.display())]
    InUse(PathBuf),
    /// The watchdog cannot be started.
    #[error("starting the watchdog of container processes: {0}")]
    Guard(io::Error),
    /// The HTTP client of probes cannot be made.
    #[error("making the HTTP client of probes: {0}")]
    Http(reqwest::Error),
    /// Logs cannot be served.
    #[error(transparent)]
    Logs(#[from] LogServerError),
}

/// What all workers share.
pub struct Context {
    /// Connection to the API server.
    pub client: Client,
    /// How the node runs.
    pub config: NodeConfig,
    /// The watchdog.
    pub guard: Arc<Guard>,
    /// Where events go.
    pub events: EventRecorder,
    /// Client of probes, without proxies.
    pub http: reqwest::Client,
    /// Told to stop.
    pub shutdown: CancellationToken,
    pool: AddressPool,
    devices: Mutex<BTreeMap<String, u32>>,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("node", &self.config.name)
            .finish_non_exhaustive()
    }
}

impl Context {
    /// The pod's address; the same one each time until it is released.
    pub fn address(&self, record: &PodRecord) -> Result<Ipv4Addr, AddressError> {
        let wanted = record.ip.map(|ip| ip.octets()[3]);
        Ok(self.config.addresses.pod(self.pool.allocate(&record.uid, wanted)?))
    }

    /// Notes what `pod` asks for and answers how many devices the other pods hold.
    pub fn devices_of_others(&self, pod: &Pod) -> u32 {
        let wanted = pod
            .spec
            .iter()
            .flat_map(|spec| &spec.containers)
            .map(accelerator::requested)
            .sum();
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        let others = devices
            .iter()
            .filter(|(other, _)| **other != uid)
            .map(|(_, count)| count)
            .sum();
        devices.insert(uid, wanted);
        others
    }

    /// Gives back what a pod held.
    pub fn release(&self, uid: &str) {
        self.pool.release(uid);
        self.devices.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }
}

struct Worker {
    view: watch::Sender<View>,
}

/// The node agent.
#[derive(Debug)]
pub struct Agent;

impl Agent {
    /// Runs a node until `shutdown`, then stops its containers (SIGTERM, SIGKILL after the grace period) and returns.
    ///
    /// Processes of an earlier agent on the same directory are killed first. Dropping the future kills all containers.
    pub async fn run(client: Client, config: NodeConfig, shutdown: CancellationToken) -> Result<(), NodeError> {
        let _lock = lock(&config)?;
        let fail = |source| NodeError::Directory {
            path: config.dir.clone(),
            source,
        };
        let leftovers = leftover::recover(&config.dir, Timestamp::now()).map_err(fail)?;
        let http = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .pool_max_idle_per_host(0)
            .build()
            .map_err(NodeError::Http)?;
        let context = Arc::new(Context {
            events: EventRecorder::new(client.clone(), "kubelet", Some(&config.name)),
            guard: Arc::new(Guard::start().map_err(NodeError::Guard)?),
            client,
            config,
            http,
            shutdown: shutdown.clone(),
            pool: AddressPool::default(),
            devices: Mutex::new(BTreeMap::new()),
        });
        let mut pods = Pods::new(Arc::clone(&context), leftovers);
        let mut background = JoinSet::new();
        let log_port = serve_logs(&context, &mut background).await?;
        tokio::select! {
            () = register_until_done(&context, log_port) => {}
            () = shutdown.cancelled() => return Ok(()),
        }
        background.spawn(registration::heartbeat(
            context.client.clone(),
            context.config.clone(),
            log_port,
        ));
        pods.follow(&shutdown).await;
        pods.workers.clear_finished().await;
        Ok(())
    }
}

fn lock(config: &NodeConfig) -> Result<File, NodeError> {
    let fail = |source| NodeError::Directory {
        path: config.dir.clone(),
        source,
    };
    std::fs::create_dir_all(&config.dir).map_err(fail)?;
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(config.dir.join("node.lock"))
        .map_err(fail)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(NodeError::InUse(config.dir.clone())),
        Err(error) => Err(fail(error.into())),
    }
}

/// Serves logs where the configuration names who may ask; the port.
async fn serve_logs(context: &Context, tasks: &mut JoinSet<()>) -> Result<Option<u16>, NodeError> {
    let config = &context.config;
    let Some(authority) = &config.client_authority else {
        return Ok(None);
    };
    let server = LogServer::bind(config.addresses.host().into(), authority).await?;
    let port = server.port();
    let logs = LogFiles::new(config.dir.clone());
    tasks.spawn(server.serve(context.client.clone(), config.name.clone(), logs));
    Ok(port)
}

async fn register_until_done(context: &Context, log_port: Option<u16>) {
    while let Err(error) = registration::register(&context.client, &context.config, log_port).await {
        tracing::warn!(node = context.config.name, %error, "the node was not registered");
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    }
}

/// The workers by pod uid.
struct Pods {
    context: Arc<Context>,
    leftovers: HashMap<String, PodRecord>,
    views: HashMap<String, Worker>,
    workers: Workers,
    listed: HashSet<String>,
}

#[derive(Default)]
struct Workers {
    tasks: JoinSet<String>,
}

impl Workers {
    /// Waits for the end of all workers.
    async fn clear_finished(&mut self) {
        while let Some(joined) = self.tasks.join_next().await {
            if let Err(error) = joined {
                tracing::error!(%error, "the worker of a pod failed");
            }
        }
    }
}

impl Pods {
    fn new(context: Arc<Context>, leftovers: Vec<PodRecord>) -> Self {
        Self {
            context,
            leftovers: leftovers
                .into_iter()
                .map(|record| (record.uid.clone(), record))
                .collect(),
            views: HashMap::new(),
            workers: Workers::default(),
            listed: HashSet::new(),
        }
    }

    async fn follow(&mut self, shutdown: &CancellationToken) {
        let api: Api<Pod> = Api::all(self.context.client.clone());
        let mine = format!("spec.nodeName={}", self.context.config.name);
        let stream = watcher(api, watcher::Config::default().fields(&mine)).default_backoff();
        tokio::pin!(stream);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                event = stream.try_next() => match event {
                    Ok(Some(event)) => self.take(event),
                    Ok(None) => return,
                    Err(error) => tracing::warn!(%error, "watching this node's pods"),
                },
                Some(ended) = self.workers.tasks.join_next(), if !self.workers.tasks.is_empty() => match ended {
                    Ok(uid) => { self.views.remove(&uid); }
                    Err(error) => tracing::error!(%error, "the worker of a pod failed"),
                },
            }
        }
    }

    fn take(&mut self, event: Event<Pod>) {
        match event {
            Event::Init => self.listed.clear(),
            Event::InitApply(pod) => {
                self.listed.extend(pod.metadata.uid.clone());
                self.present(pod);
            }
            Event::InitDone => self.forget_unlisted(),
            Event::Apply(pod) => self.present(pod),
            Event::Delete(pod) => {
                if let Some(worker) = pod.metadata.uid.as_ref().and_then(|uid| self.views.get(uid)) {
                    worker.view.send_replace(View::Gone);
                }
            }
        }
    }

    fn present(&mut self, pod: Pod) {
        let Some(uid) = pod.metadata.uid.clone() else { return };
        let pod = Arc::new(pod);
        if let Some(worker) = self.views.get(&uid)
            && !worker.view.is_closed()
        {
            worker.view.send_replace(View::Present(pod));
            return;
        }
        let (view, receiver) = watch::channel(View::Present(Arc::clone(&pod)));
        let record = self.leftovers.remove(&uid);
        let worker = PodWorker::new(Arc::clone(&self.context), pod, receiver, record);
        let key = uid.clone();
        self.workers.tasks.spawn(async move {
            worker.run().await;
            key
        });
        self.views.insert(uid, Worker { view });
    }

    fn forget_unlisted(&mut self) {
        for (uid, worker) in &self.views {
            if !self.listed.contains(uid) {
                worker.view.send_replace(View::Gone);
            }
        }
        for uid in std::mem::take(&mut self.leftovers).into_keys() {
            if let Err(error) = leftover::remove(&self.context.config.dir, &uid) {
                tracing::warn!(pod = uid, %error, "the directory of a pod that is gone was not removed");
            }
        }
    }
}
