//! Rollout pods as a learner uses them: weights to each, pieces to whoever is free, what a pod leaves undone to another.
//!
//! Nothing here decides a token: a piece is answered alike by every pod that holds the same weights. So pods may come, go and
//! fail at any moment; the only thing that ends a run is an answer that every pod would give.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::body::Bytes;
use flotilla_api::rollout::{RolloutPod, RolloutPods};
use flotilla_engine::Group;
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tokio::{runtime::Handle, sync::watch};
use tokio_util::sync::CancellationToken;

use super::{
    error::TrainError,
    pod_client::{Fault, PodClient},
};
use crate::{
    context::{Context, Token},
    error::WorkerError,
    progress::ProgressCell,
    rollout::wire::Piece,
};

/// How often cancellation and the end of a pod's rest are looked for.
const TICK: Duration = Duration::from_millis(50);
/// How long a pod is left alone after its first failure; then twice as long, and so on.
const FIRST_REST: Duration = Duration::from_millis(250);
/// Doublings of [`FIRST_REST`].
const DOUBLINGS: u32 = 6;
/// A learner that has had nobody to ask for so long says so.
const PATIENCE: Duration = Duration::from_secs(3);

/// The rollout pods of a run.
#[derive(Debug)]
pub struct Fleet {
    runtime: Handle,
    pods: watch::Receiver<RolloutPods>,
    client: Arc<PodClient>,
    progress: ProgressCell,
    /// Pieces that one pod works on at once.
    lanes: usize,
    /// Tells this process from the one before it, whose weights of the same step are not trusted to be the same.
    run: String,
    weights: Mutex<Option<(u32, Bytes)>>,
}

/// What is to be sampled.
pub struct Batch<'a> {
    /// Step after which the weights were made.
    pub step: u32,
    /// The weights as one safetensors file; asked for once in a step.
    pub weights: &'a dyn Fn() -> Result<Vec<u8>, TrainError>,
    /// The pieces, whose version is filled in here.
    pub pieces: Vec<Piece>,
    /// Once it says yes the call ends with [`TrainError::Cancelled`].
    pub cancelled: &'a (dyn Fn() -> bool + Sync),
}

impl std::fmt::Debug for Batch<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Batch")
            .field("step", &self.step)
            .finish_non_exhaustive()
    }
}

impl Fleet {
    /// A fleet that takes its pods from `pods`. Its calls block, so they are for a thread outside `runtime`.
    pub fn new(
        context: &Context,
        lanes: u32,
        pods: watch::Receiver<RolloutPods>,
        runtime: Handle,
    ) -> Result<Self, WorkerError> {
        let client = PodClient::new(context.token.as_ref().map(Token::reveal))
            .map_err(|error| WorkerError::retryable("failed to build the HTTP client for rollout pods", error))?;
        let mut run = uuid::Uuid::new_v4().simple().to_string();
        run.truncate(8);
        Ok(Self {
            runtime,
            pods,
            client: Arc::new(client),
            progress: context.progress.clone(),
            lanes: lanes.max(1) as usize,
            run,
            weights: Mutex::default(),
        })
    }

    /// The groups of every piece, in order.
    pub fn sample(&self, batch: Batch<'_>) -> Result<Vec<Vec<Group>>, TrainError> {
        let version = format!("{}-{}", batch.step, self.run);
        let weights = self.weights_of(&batch)?;
        let pieces = batch.pieces.into_iter().map(|piece| {
            Arc::new(Piece {
                weight_version: version.clone(),
                ..piece
            })
        });
        let dispatch = Dispatch::new(self, version.clone(), weights, pieces.collect());
        let groups = self.runtime.block_on(dispatch.run(batch.cancelled))?;
        self.progress
            .update(|progress| progress.rollout.get_or_insert_default().weight_version = Some(batch.step));
        Ok(groups)
    }

    /// The weights of the step, written once for all pods and calls.
    fn weights_of(&self, batch: &Batch<'_>) -> Result<Bytes, TrainError> {
        let mut known = self.weights.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((step, bytes)) = known.as_ref()
            && *step == batch.step
        {
            return Ok(bytes.clone());
        }
        let bytes = Bytes::from((batch.weights)()?);
        *known = Some((batch.step, bytes.clone()));
        Ok(bytes)
    }
}

/// How a pod has fared in this batch.
#[derive(Debug, Default)]
struct Standing {
    busy: usize,
    failures: u32,
    rests_until: Option<Instant>,
    /// Cancelled when the pod leaves the list: what it was asked for is asked of another one.
    gone: CancellationToken,
}

/// What became of one piece on one pod.
struct Outcome {
    uid: String,
    piece: usize,
    result: Result<Vec<Group>, Fault>,
}

/// One batch on its way.
struct Dispatch<'a> {
    fleet: &'a Fleet,
    version: String,
    weights: Bytes,
    pieces: Vec<Arc<Piece>>,
    /// Pieces that nobody works on, the first ones last.
    waiting: Vec<usize>,
    done: Vec<Option<Vec<Group>>>,
    missing: usize,
    pods: HashMap<String, Standing>,
    running: FuturesUnordered<BoxFuture<'static, Outcome>>,
    /// Since when nobody could be asked, and the last failure.
    idle_since: Option<Instant>,
    last_failure: Option<String>,
    /// What the progress said before it said that pods are waited for.
    message: Option<String>,
}

impl<'a> Dispatch<'a> {
    fn new(fleet: &'a Fleet, version: String, weights: Bytes, pieces: Vec<Arc<Piece>>) -> Self {
        Self {
            fleet,
            version,
            weights,
            waiting: (0..pieces.len()).rev().collect(),
            done: vec![None; pieces.len()],
            missing: pieces.len(),
            pieces,
            pods: HashMap::new(),
            running: FuturesUnordered::new(),
            idle_since: None,
            last_failure: None,
            message: None,
        }
    }

    async fn run(mut self, cancelled: &(dyn Fn() -> bool + Sync)) -> Result<Vec<Vec<Group>>, TrainError> {
        let mut news = self.fleet.pods.clone();
        while self.missing > 0 {
            if cancelled() {
                return Err(TrainError::Cancelled);
            }
            let pods = news.borrow_and_update().clone();
            self.forget_gone(&pods);
            self.assign(&pods);
            self.say_whether_idle(&pods);
            tokio::select! {
                Some(outcome) = self.running.next(), if !self.running.is_empty() => self.take(outcome)?,
                Ok(()) = news.changed() => {}
                () = tokio::time::sleep(TICK) => {}
            }
        }
        self.say_busy();
        Ok(self.done.into_iter().flatten().collect())
    }

    fn forget_gone(&mut self, listed: &RolloutPods) {
        self.pods.retain(|uid, standing| {
            let stays = listed.pods.iter().any(|pod| pod.uid == *uid);
            if !stays {
                standing.gone.cancel();
            }
            stays
        });
    }

    /// Gives waiting pieces to the pods that do least.
    fn assign(&mut self, listed: &RolloutPods) {
        let now = Instant::now();
        while let Some(piece) = self.waiting.last().copied() {
            let free = listed.pods.iter().filter_map(|pod| {
                let standing = self.pods.get(&pod.uid);
                let busy = standing.map_or(0, |standing| standing.busy);
                let rests = standing
                    .and_then(|standing| standing.rests_until)
                    .is_some_and(|until| until > now);
                (busy < self.fleet.lanes && !rests).then_some((busy, pod))
            });
            let Some((_, pod)) = free.min_by_key(|(busy, _)| *busy) else {
                return;
            };
            self.waiting.pop();
            self.ask(pod, piece);
        }
    }

    fn ask(&mut self, pod: &RolloutPod, piece: usize) {
        let standing = self.pods.entry(pod.uid.clone()).or_default();
        standing.busy += 1;
        let (client, gone) = (Arc::clone(&self.fleet.client), standing.gone.clone());
        let (version, weights) = (self.version.clone(), self.weights.clone());
        let (pod, body) = (pod.clone(), Arc::clone(&self.pieces[piece]));
        let answer = async move {
            let asked = async {
                client.prepare(&pod, &version, &weights).await?;
                client.sample(&pod, &body).await
            };
            let result = tokio::select! {
                result = asked => result,
                () = gone.cancelled() => Err(Fault::Lost("the pod is not ready any more".to_owned())),
            };
            Outcome {
                uid: pod.uid,
                piece,
                result,
            }
        };
        self.running.push(answer.boxed());
    }

    fn take(&mut self, outcome: Outcome) -> Result<(), TrainError> {
        let standing = self.pods.get_mut(&outcome.uid);
        match outcome.result {
            Ok(groups) => {
                if let Some(standing) = standing {
                    standing.busy = standing.busy.saturating_sub(1);
                    standing.failures = 0;
                }
                self.done[outcome.piece] = Some(groups);
                self.missing -= 1;
                Ok(())
            }
            Err(Fault::Permanent(message)) => Err(TrainError::Invalid(format!("rollout: {message}"))),
            Err(Fault::Lost(message)) => {
                self.waiting.push(outcome.piece);
                if let Some(standing) = standing {
                    let rest = FIRST_REST * 2_u32.pow(standing.failures.min(DOUBLINGS));
                    standing.busy = standing.busy.saturating_sub(1);
                    standing.failures += 1;
                    standing.rests_until = Some(Instant::now() + rest);
                }
                tracing::warn!(
                    pod = outcome.uid,
                    piece = outcome.piece,
                    "asking another rollout pod: {message}"
                );
                self.last_failure = Some(message);
                Ok(())
            }
        }
    }

    /// Tells people when pieces wait and nobody works.
    fn say_whether_idle(&mut self, listed: &RolloutPods) {
        if !self.running.is_empty() {
            self.idle_since = None;
            return self.say_busy();
        }
        let since = *self.idle_since.get_or_insert_with(Instant::now);
        if since.elapsed() < PATIENCE || self.message.is_some() {
            return;
        }
        let why = match (&self.last_failure, listed.pods.len()) {
            (_, 0) => "none is ready".to_owned(),
            (Some(failure), count) => format!("{count} ready, the last one failed: {failure}"),
            (None, count) => format!("{count} ready"),
        };
        tracing::warn!("waiting for rollout pods: {why}");
        self.fleet.progress.update(|progress| {
            let text = format!("waiting for rollout pods: {why}");
            self.message = Some(std::mem::replace(&mut progress.message, text));
        });
    }

    fn say_busy(&mut self) {
        if let Some(message) = self.message.take() {
            self.fleet.progress.update(|progress| progress.message = message);
        }
    }
}
