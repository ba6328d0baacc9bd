//! The loop on its own thread: one thread owns the model, async callers send requests and receive tokens.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
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

/// What the engine holds, for metrics and draining.
#[derive(Debug, Default)]
pub struct Load {
    waiting: AtomicUsize,
    running: AtomicUsize,
}

impl Load {
    /// Requests that wait for their first token.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Samples that are being decoded.
    pub fn running(&self) -> usize {
        self.running.load(Ordering::Relaxed)
    }
}

/// A request on its way to the thread.
struct Command<R: Runner> {
    request: RequestFor<R>,
    output: mpsc::UnboundedSender<Output>,
    place: Place,
}

/// A place in the queue; dropping it gives it back.
#[derive(Debug)]
struct Place(Arc<Load>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Sends requests to the thread. Cloning is cheap; the thread ends when the last handle is dropped.
#[derive(Debug)]
pub struct EngineHandle<R: Runner> {
    commands: mpsc::UnboundedSender<Command<R>>,
    load: Arc<Load>,
    max_queue: usize,
}

impl<R: Runner> Clone for EngineHandle<R> {
    fn clone(&self) -> Self {
        Self {
            commands: self.commands.clone(),
            load: self.load.clone(),
            max_queue: self.max_queue,
        }
    }
}

impl<R: Runner> EngineHandle<R> {
    /// Queues a request, or refuses it if too many wait. Dropping the receiver cancels the request; its channel closes
    /// after the last token of its last sample.
    pub fn submit(&self, request: RequestFor<R>) -> Result<mpsc::UnboundedReceiver<Output>, Overloaded> {
        let take = |waiting| (waiting < self.max_queue).then_some(waiting + 1);
        let waiting = &self.load.waiting;
        if let Err(waiting) = waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
            let limit = self.max_queue;
            return Err(Overloaded { waiting, limit });
        }
        let (output, receiver) = mpsc::unbounded_channel();
        let command = Command {
            request,
            output,
            place: Place(self.load.clone()),
        };
        if let Err(mpsc::error::SendError(command)) = self.commands.send(command) {
            let _ = command.output.send(Output::Failed(EngineError::Stopped));
        }
        Ok(receiver)
    }

    /// What the engine holds.
    pub fn load(&self) -> &Load {
        &self.load
    }
}

/// The thread.
#[derive(Debug)]
pub struct EngineThread {
    thread: JoinHandle<()>,
    ended: watch::Receiver<bool>,
}

impl EngineThread {
    /// Gives the model to a new thread. At most `max_queue` requests wait for their first token.
    pub fn spawn<R>(runner: R, limits: Limits, max_queue: usize) -> std::io::Result<(Self, EngineHandle<R>)>
    where
        R: Runner + Send + 'static,
        R::Prompt: Send + Sync,
        R::Cache: Send,
    {
        let (commands, receiver) = mpsc::unbounded_channel();
        let (ending, ended) = watch::channel(false);
        let load = Arc::new(Load::default());
        let shared = load.clone();
        let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
            let mut worker = Loop {
                engine: Engine::new(runner, limits),
                clients: HashMap::new(),
                load: shared,
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
            load,
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
    output: mpsc::UnboundedSender<Output>,
    /// Held until the first token.
    place: Option<Place>,
    unfinished: usize,
}

/// The state of the thread.
struct Loop<R: Runner> {
    engine: Engine<R>,
    clients: HashMap<RequestId, Client>,
    load: Arc<Load>,
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
            self.cancel_abandoned();
            self.step();
            self.load.running.store(self.engine.running(), Ordering::Relaxed);
        }
    }

    fn accept(&mut self, command: Command<R>) {
        let Command { request, output, place } = command;
        match self.engine.submit(&request) {
            Ok(id) => {
                let client = Client {
                    output,
                    place: Some(place),
                    unfinished: request.n,
                };
                self.clients.insert(id, client);
            }
            Err(error) => drop(output.send(Output::Failed(error))),
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
