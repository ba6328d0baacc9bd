//! Follows the pods of all hollow nodes by one watch and writes what becomes of them.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    net::Ipv4Addr,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{
    StreamExt as _,
    channel::mpsc::{UnboundedSender, unbounded},
    future::BoxFuture,
};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
    runtime::{
        WatchStreamExt as _, applier,
        controller::{Action, Config, Error as ControllerError},
        reflector::{
            ObjectRef,
            store::{Writer, store},
        },
        watcher::{self, Event, watcher},
    },
};
use serde_json::json;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{
    FleetConfig, HollowError,
    life::{self, Step},
    node,
    record::{self, End},
    registration, responder,
};
use crate::node::address::AddressBlock;

/// Wait after a write that failed.
const RETRY: Duration = Duration::from_secs(1);
/// Exit code of a worker that was asked to stop.
const STOPPED: i32 = 143;

/// What all writes share.
struct Fleet {
    client: Client,
    config: FleetConfig,
    addresses: Arc<AddressBlock>,
    /// The step that was last written for a pod, by UID, until the watch shows that the pod is gone: its copy may lag.
    written: Mutex<HashMap<String, Step>>,
}

impl fmt::Debug for Fleet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fleet")
            .field("prefix", &self.config.prefix)
            .finish_non_exhaustive()
    }
}

/// Registers the nodes, then runs their pods until `shutdown`. Nodes and pods stay in the API: a later fleet of the same
/// prefix goes on with them.
pub async fn run(client: Client, config: FleetConfig, shutdown: CancellationToken) -> Result<(), HollowError> {
    let claimed = AddressBlock::claim(Path::new(&config.prefix));
    let addresses = claimed.map_err(|source| HollowError::Address {
        prefix: config.prefix.clone(),
        source,
    })?;
    let mut background = JoinSet::new();
    if let Some(progress) = config.progress.clone() {
        let listener = responder::bind(pod_ip(&addresses)).await?;
        background.spawn(responder::serve(listener, progress));
    }
    let host = addresses.host();
    tokio::select! {
        registered = registration::register_all(&client, &config, host) => registered?,
        () = shutdown.cancelled() => return Ok(()),
    }
    tracing::info!(nodes = config.nodes, gpus = config.gpus, "hollow nodes are registered");
    background.spawn(registration::keep_alive(client.clone(), config.clone(), host));
    let fleet = Arc::new(Fleet {
        client,
        config,
        addresses,
        written: Mutex::default(),
    });
    live(fleet, shutdown).await;
    background.shutdown().await;
    Ok(())
}

/// The address of every pod.
fn pod_ip(addresses: &AddressBlock) -> Ipv4Addr {
    addresses.pod(2)
}

async fn live(fleet: Arc<Fleet>, shutdown: CancellationToken) {
    let (pods, writer) = store();
    let (news, queue) = unbounded();
    let watching = follow(Arc::clone(&fleet), writer, news);
    let queue = queue.map(Ok::<_, std::convert::Infallible>);
    let stop = shutdown.clone();
    let queue = queue.take_until(async move { stop.cancelled().await });
    let concurrency = Config::default().concurrency(fleet.config.concurrency.get());
    let steps = applier(
        step,
        |_pod, _error, _fleet| Action::requeue(RETRY),
        fleet,
        pods,
        queue,
        concurrency,
    );
    let steps = steps.for_each(|outcome| async {
        if let Err(ControllerError::ReconcilerFailed(error, _)) = outcome {
            tracing::warn!(%error, "trying again");
        }
    });
    tokio::select! {
        () = watching => {}
        () = steps => {}
    }
}

async fn follow(fleet: Arc<Fleet>, mut writer: Writer<Pod>, news: UnboundedSender<ObjectRef<Pod>>) {
    let nodes: HashSet<String> = node::names(&fleet.config).collect();
    let ours = |pod: &Pod| {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref());
        node.is_some_and(|node| nodes.contains(node))
    };
    // One watch for all nodes: field selectors know no sets, so pods of other nodes are told apart here.
    let bound = watcher::Config::default().fields("spec.nodeName!=");
    let mut events = watcher(Api::<Pod>::all(fleet.client.clone()), bound)
        .default_backoff()
        .boxed();
    let tell = |pod: &Pod| drop(news.unbounded_send(ObjectRef::from_obj(pod)));
    while let Some(event) = events.next().await {
        let event = match event {
            Ok(event) => event.modify(life::slim),
            Err(error) => {
                tracing::warn!(%error, "watch of hollow pods interrupted, beginning again");
                continue;
            }
        };
        match &event {
            Event::Apply(pod) | Event::InitApply(pod) | Event::Delete(pod) if !ours(pod) => continue,
            Event::Apply(pod) => {
                writer.apply_watcher_event(&event);
                tell(pod);
            }
            Event::Delete(pod) => {
                writer.apply_watcher_event(&event);
                fleet.forget(pod);
            }
            Event::InitDone => {
                writer.apply_watcher_event(&event);
                let pods = writer.as_reader().state();
                fleet.keep(&pods);
                pods.iter().for_each(|pod| tell(pod));
            }
            Event::Init | Event::InitApply(_) => writer.apply_watcher_event(&event),
        }
    }
}

fn step(pod: Arc<Pod>, fleet: Arc<Fleet>) -> BoxFuture<'static, Result<Action, HollowError>> {
    Box::pin(async move {
        let now = Timestamp::now();
        let step = life::next(&pod, &fleet.config.life, now);
        let wait = match step {
            Step::Rest(until) => until,
            step if fleet.has_written(&pod, step) => None,
            step => {
                fleet.write(&pod, step, now).await?;
                fleet.note(&pod, step);
                None
            }
        };
        Ok(wait.map_or_else(Action::await_change, |until| {
            Action::requeue(Duration::try_from(until.duration_since(now)).unwrap_or_default())
        }))
    })
}

impl Fleet {
    fn has_written(&self, pod: &Pod, step: Step) -> bool {
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        pod.metadata.uid.as_ref().and_then(|uid| written.get(uid)) == Some(&step)
    }

    fn note(&self, pod: &Pod, step: Step) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.extend(pod.uid().map(|uid| (uid, step)));
    }

    fn forget(&self, pod: &Pod) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(uid) = &pod.metadata.uid {
            written.remove(uid);
        }
    }

    fn keep(&self, pods: &[Arc<Pod>]) {
        let present: HashSet<&str> = pods.iter().filter_map(|pod| pod.metadata.uid.as_deref()).collect();
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.retain(|uid, _| present.contains(uid.as_str()));
    }

    async fn write(&self, pod: &Pod, step: Step, now: Timestamp) -> Result<(), HollowError> {
        let life = &self.config.life;
        let (action, end) = match step {
            Step::Rest(_) => return Ok(()),
            Step::Remove => return self.remove(pod).await,
            Step::Run => ("start", None),
            Step::Finish => {
                let (reason, message) = ("Completed", life.last_word.as_str());
                (
                    "finish",
                    Some(End {
                        code: 0,
                        reason,
                        message,
                    }),
                )
            }
            Step::Stop => {
                let (code, reason, message) = (STOPPED, "Error", life.stopped_word.as_str());
                ("stop", Some(End { code, reason, message }))
            }
        };
        let status = record::status(pod, pod_ip(&self.addresses), self.addresses.host(), end, now);
        let patch = json!({"metadata": {"uid": pod.metadata.uid}, "status": status});
        let written = self
            .api(pod)
            .patch_status(&pod.name_any(), &PatchParams::default(), &Patch::Strategic(&patch))
            .await;
        done(action, pod, written.map(drop))
    }

    async fn remove(&self, pod: &Pod) -> Result<(), HollowError> {
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions {
                uid: pod.metadata.uid.clone(),
                ..Preconditions::default()
            }),
            ..DeleteParams::default()
        };
        let deleted = self.api(pod).delete(&pod.name_any(), &params).await;
        done("delete", pod, deleted.map(drop))
    }

    fn api(&self, pod: &Pod) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default())
    }
}

/// A pod that is gone, or whose name belongs to another by now, needs nothing any more.
fn done(action: &'static str, pod: &Pod, outcome: Result<(), kube::Error>) -> Result<(), HollowError> {
    match outcome {
        Err(kube::Error::Api(status))
            if status.code == 404 || (status.code == 409 && status.message.contains("UID")) =>
        {
            Ok(())
        }
        outcome => outcome.map_err(|source| HollowError::Pod {
            action,
            namespace: pod.namespace().unwrap_or_default(),
            name: pod.name_any(),
            source: Box::new(source),
        }),
    }
}
