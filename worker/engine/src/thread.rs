//! The loop on its own thread: one thread owns the model, async callers send requests and receive tokens.

mod work;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Instant,
};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use work::Work;

use crate::{
    engine::Engine,
    error::EngineError,
    limits::Limits,
    request::{FinishReason, Token},
    runner::{Cause, RequestFor, Runner},
    stats::Stats,
};

/// What a request's channel carries.
#[derive(Debug)]
pub enum Output {
    /// A token of a sample.
    Token {
        /// Index of the sample.
        sample: usize,
        /// The token.
        token: Token,
        /// Set with the last token of the sample.
        finish: Option<FinishReason>,
        /// Version of the weights that drew it.
        version: Arc<str>,
    },
    /// The request ends here, unfinished.
    Failed(EngineError),
}

/// Too many requests wait.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("{waiting} requests wait, the limit is {limit}")]
pub struct Overloaded {
    /// Requests that wait.
    pub waiting: usize,
    /// How many may.
    pub limit: usize,
}

/// The tokens of a request, as they are drawn. Dropping it cancels what is left.
#[derive(Debug)]
pub struct Tokens {
    receiver: mpsc::UnboundedReceiver<Output>,
    endings: mpsc::UnboundedSender<Ending>,
    ticket: Ticket,
}

impl Tokens {
    /// The next output; None after the last token of the last sample.
    pub async fn recv(&mut self) -> Option<Output> {
        self.receiver.recv().await
    }

    /// As [`Self::recv`], for a thread that may block.
    pub fn blocking_recv(&mut self) -> Option<Output> {
        self.receiver.blocking_recv()
    }

    /// Ends a sample that is complete for a reason that only the caller knows, such as a stop string. Tokens that are on
    /// their way still come, none of them with a reason to finish.
    pub fn end(&self, sample: usize) {
        // A thread that has ended has nothing to end.
        let _ = self.endings.send(Ending {
            ticket: self.ticket,
            sample,
        });
    }
}

/// Number of a request in the order of submission.
type Ticket = u64;

/// A sample that its caller has seen enough of.
#[derive(Clone, Copy, Debug)]
struct Ending {
    ticket: Ticket,
    sample: usize,
}

/// What the thread is told.
enum Command<R: Runner> {
    Submit(Submission<R>),
    Load(Load<R>),
}

/// A request on its way to the thread.
struct Submission<R: Runner> {
    ticket: Ticket,
    request: RequestFor<R>,
    output: mpsc::UnboundedSender<Output>,
    place: Place,
}

/// What becomes of requests when other weights are loaded.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LoadPolicy {
    /// All end with [`EngineError::Aborted`].
    Abort,
    /// Those that have started end with the old weights; the others begin with the new ones.
    #[default]
    Finish,
    /// All go on at once: what they have drawn stays, and its keys and values are computed again with the new weights.
    Keep,
}

/// Weights on their way to the thread.
struct Load<R> {
    version: String,
    policy: LoadPolicy,
    apply: Apply<R>,
    done: oneshot::Sender<Result<(), EngineError>>,
}

/// Puts weights in place.
pub type Apply<R> = Box<dyn FnOnce(&mut R) -> Result<(), Cause> + Send>;

/// How the thread is.
#[derive(Clone, Copy, Debug)]
pub struct Health {
    /// Whether it runs.
    pub alive: bool,
    /// Whether it has something to compute.
    pub busy: bool,
    /// When it began its last step, or to wait for one.
    pub last_step: Instant,
}

/// A place in the queue; dropping it gives it back.
#[derive(Debug)]
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Sends requests to the thread. Cloning is cheap; the thread ends when the last handle is dropped.
#[derive(Debug)]
pub struct EngineHandle<R: Runner> {
    commands: mpsc::UnboundedSender<Command<R>>,
    endings: mpsc::UnboundedSender<Ending>,
    tickets: Arc<AtomicU64>,
    queued: Arc<AtomicUsize>,
    stats: Arc<Stats>,
    health: watch::Receiver<Health>,
    max_queue: usize,
}

impl<R: Runner> Clone for EngineHandle<R> {
    fn clone(&self) -> Self {
        Self {
            commands: self.commands.clone(),
            endings: self.endings.clone(),
            tickets: self.tickets.clone(),
            queued: self.queued.clone(),
            stats: self.stats.clone(),
            health: self.health.clone(),
            max_queue: self.max_queue,
        }
    }
}

impl<R: Runner> EngineHandle<R> {
    /// Queues a request, or refuses it if too many wait.
    pub fn submit(&self, request: RequestFor<R>) -> Result<Tokens, Overloaded> {
        let take = |queued| (queued < self.max_queue).then_some(queued + 1);
        if let Err(waiting) = self.queued.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
            let limit = self.max_queue;
            return Err(Overloaded { waiting, limit });
        }
        let ticket = self.tickets.fetch_add(1, Ordering::Relaxed);
        let (output, receiver) = mpsc::unbounded_channel();
        let command = Command::Submit(Submission {
            ticket,
            request,
            output,
            place: Place(self.queued.clone()),
        });
        if let Err(mpsc::error::SendError(Command::Submit(lost))) = self.commands.send(command) {
            let _ = lost.output.send(Output::Failed(EngineError::Stopped));
        }
        Ok(Tokens {
            receiver,
            endings: self.endings.clone(),
            ticket,
        })
    }

    /// Puts other weights in place between two steps, in the order of calls. Everything that was computed from the ones before
    /// is forgotten in the same moment, and every token says which version drew it. If `apply` fails the engine goes on under
    /// the version that it had.
    pub async fn load_weights(&self, version: &str, policy: LoadPolicy, apply: Apply<R>) -> Result<(), EngineError> {
        let (done, loaded) = oneshot::channel();
        let load = Load {
            version: version.to_owned(),
            policy,
            apply,
            done,
        };
        // A thread that has ended drops what it is told, and with it the answer.
        let _ = self.commands.send(Command::Load(load));
        loaded.await.unwrap_or(Err(EngineError::Stopped))
    }

    /// How the thread is, as it changes.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.clone()
    }

    /// Requests before their first token.
    pub fn queued(&self) -> usize {
        self.queued.load(Ordering::Relaxed)
    }

    /// What the engine holds and has done.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }
}

/// The thread.
#[derive(Debug)]
pub struct EngineThread {
    thread: JoinHandle<()>,
    ended: watch::Receiver<bool>,
}

impl EngineThread {
    /// Gives the model, whose weights have this version, to a new thread. At most `max_queue` requests wait for their first
    /// token.
    pub fn spawn<R>(
        runner: R,
        version: &str,
        limits: Limits,
        max_queue: usize,
    ) -> Result<(Self, EngineHandle<R>), EngineError>
    where
        R: Runner + Send + 'static,
        R::Prompt: Send + Sync,
        R::Pool: Send,
    {
        let (commands, receiver) = mpsc::unbounded_channel();
        let (ending, ended) = watch::channel(false);
        let (endings, ended_samples) = mpsc::unbounded_channel();
        let (reports, health) = watch::channel(Health {
            alive: true,
            busy: false,
            last_step: Instant::now(),
        });
        let engine = Engine::new(runner, version, limits)?;
        let stats = engine.stats().clone();
        let body = move || {
            let mut work = Work::new(engine, ended_samples, reports);
            // A panic in a kernel ends this thread only; the process says so and is replaced.
            if catch_unwind(AssertUnwindSafe(|| work.run(receiver))).is_err() {
                tracing::error!("the engine thread panicked");
            }
            work.report_end();
            drop(work);
            let _ = ending.send(true);
        };
        let thread = std::thread::Builder::new().name("engine".to_owned());
        let thread = thread.spawn(body).map_err(EngineError::Thread)?;
        let handle = EngineHandle {
            commands,
            endings,
            tickets: Arc::default(),
            queued: Arc::default(),
            stats,
            health,
            max_queue,
        };
        Ok((Self { thread, ended }, handle))
    }

    /// Waits until the thread has ended, which it does without a panic only when nobody can send requests any more or when the
    /// runner is [lost](Runner::lost).
    pub async fn ended(&mut self) {
        // A closed channel means the same.
        let _ = self.ended.wait_for(|ended| *ended).await;
    }

    /// Waits for the thread; every handle must be dropped before.
    pub fn join(self) {
        let _ = self.thread.join();
    }
}
