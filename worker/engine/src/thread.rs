//! The loop on its own thread: one thread owns the model, async callers send requests and receive tokens.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use tokio::sync::{mpsc, watch};

use crate::{
    engine::Engine,
    error::EngineError,
    request::{FinishReason, Token},
    runner::{RequestFor, Runner},
    scheduler::Limits,
    sequence::RequestId,
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

/// A request on its way to the thread.
struct Command<R: Runner> {
    ticket: Ticket,
    request: RequestFor<R>,
    output: mpsc::UnboundedSender<Output>,
    place: Place,
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
        let command = Command {
            ticket,
            request,
            output,
            place: Place(self.queued.clone()),
        };
        if let Err(mpsc::error::SendError(command)) = self.commands.send(command) {
            let _ = command.output.send(Output::Failed(EngineError::Stopped));
        }
        Ok(Tokens {
            receiver,
            endings: self.endings.clone(),
            ticket,
        })
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
    ) -> std::io::Result<(Self, EngineHandle<R>)>
    where
        R: Runner + Send + 'static,
        R::Prompt: Send + Sync,
        R::Cache: Send,
    {
        let (commands, receiver) = mpsc::unbounded_channel();
        let (ending, ended) = watch::channel(false);
        let (endings, ended_samples) = mpsc::unbounded_channel();
        let stats = Arc::new(Stats::default());
        let shared = stats.clone();
        let version = version.into();
        let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
            let mut worker = Loop {
                engine: Engine::new(runner, limits),
                clients: HashMap::new(),
                endings: ended_samples,
                stats: shared,
                version,
            };
            // A panic in a kernel ends this thread only; the process says so and is replaced.
            if catch_unwind(AssertUnwindSafe(|| worker.run(receiver))).is_err() {
                tracing::error!("the engine thread panicked");
            }
            drop(worker);
            let _ = ending.send(true);
        })?;
        let handle = EngineHandle {
            commands,
            endings,
            tickets: Arc::default(),
            queued: Arc::default(),
            stats,
            max_queue,
        };
        Ok((Self { thread, ended }, handle))
    }

    /// Waits until the thread has ended, which it does without a panic only when nobody can send requests any more.
    pub async fn ended(&mut self) {
        // A closed channel means the same.
        let _ = self.ended.wait_for(|ended| *ended).await;
    }

    /// Waits for the thread; every handle must be dropped before.
    pub fn join(self) {
        let _ = self.thread.join();
    }
}

/// A caller that waits for tokens.
#[derive(Debug)]
struct Client {
    ticket: Ticket,
    output: mpsc::UnboundedSender<Output>,
    /// Held until the first token.
    place: Option<Place>,
    unfinished: usize,
}

/// The state of the thread.
struct Loop<R: Runner> {
    engine: Engine<R>,
    clients: HashMap<RequestId, Client>,
    endings: mpsc::UnboundedReceiver<Ending>,
    stats: Arc<Stats>,
    version: Arc<str>,
}

impl<R: Runner> Loop<R> {
    /// Until the last handle is dropped and the last request has ended.
    fn run(&mut self, mut commands: mpsc::UnboundedReceiver<Command<R>>) {
        loop {
            if self.engine.is_idle() {
                match commands.blocking_recv() {
                    Some(command) => self.accept(command),
                    None => return,
                }
            }
            while let Ok(command) = commands.try_recv() {
                self.accept(command);
            }
            self.end_samples();
            self.cancel_abandoned();
            self.step();
            self.stats.waiting.set(self.engine.waiting());
            self.stats.running.set(self.engine.running());
        }
    }

    fn accept(&mut self, command: Command<R>) {
        let Command {
            ticket,
            request,
            output,
            place,
        } = command;
        match self.engine.submit(&request) {
            Ok(id) => {
                let client = Client {
                    ticket,
                    output,
                    place: Some(place),
                    unfinished: request.n,
                };
                self.clients.insert(id, client);
            }
            Err(error) => drop(output.send(Output::Failed(error))),
        }
    }

    /// Ends the samples that their callers have seen enough of.
    fn end_samples(&mut self) {
        while let Ok(Ending { ticket, sample }) = self.endings.try_recv() {
            let Some((id, client)) = self.clients.iter_mut().find(|(_, client)| client.ticket == ticket) else {
                continue;
            };
            let id = *id;
            if self.engine.end(id, sample) {
                client.unfinished -= 1;
                if client.unfinished == 0 {
                    self.clients.remove(&id);
                }
            }
        }
    }

    /// Frees what is computed for clients that are gone.
    fn cancel_abandoned(&mut self) {
        let engine = &mut self.engine;
        self.clients.retain(|id, client| {
            let gone = client.output.is_closed();
            if gone {
                engine.cancel(*id);
            }
            !gone
        });
    }

    fn step(&mut self) {
        match self.engine.step() {
            Ok(events) => events.into_iter().for_each(|event| self.deliver(event)),
            Err(error) => self.fail(&error),
        }
    }

    fn deliver(&mut self, event: crate::engine::Event) {
        let Some(client) = self.clients.get_mut(&event.request) else {
            return;
        };
        client.place = None;
        client.unfinished -= usize::from(event.finish.is_some());
        // A client that is gone is cancelled before the next step.
        let _ = client.output.send(Output::Token {
            sample: event.sample,
            token: event.token,
            finish: event.finish,
            version: self.version.clone(),
        });
        if client.unfinished == 0 {
            self.clients.remove(&event.request);
        }
    }

    /// Ends all requests: a failed step leaves no cache to go on with.
    fn fail(&mut self, error: &EngineError) {
        let message = describe(error);
        tracing::error!(requests = self.clients.len(), "a step failed: {message}");
        for (_, client) in self.clients.drain() {
            let failure = EngineError::Step(message.clone());
            let _ = client.output.send(Output::Failed(failure));
        }
        self.engine.clear();
    }
}

fn describe(error: &EngineError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
