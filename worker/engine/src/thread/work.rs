//! What the thread does: commands in, steps, tokens out.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

use tokio::sync::{mpsc, watch};

use super::{Command, Ending, Health, Load, LoadPolicy, Output, Place, Submission, Ticket};
use crate::{
    engine::{Engine, Event},
    error::EngineError,
    runner::Runner,
    sequence::RequestId,
};

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
pub(super) struct Work<R: Runner> {
    engine: Engine<R>,
    clients: BTreeMap<RequestId, Client>,
    endings: mpsc::UnboundedReceiver<Ending>,
    /// Weights that wait for requests to end, in order.
    loads: VecDeque<Load<R>>,
    reports: watch::Sender<Health>,
}

impl<R: Runner> Work<R> {
    /// Nothing has been asked for yet.
    pub(super) fn new(
        engine: Engine<R>,
        endings: mpsc::UnboundedReceiver<Ending>,
        reports: watch::Sender<Health>,
    ) -> Self {
        Self {
            engine,
            clients: BTreeMap::new(),
            endings,
            loads: VecDeque::new(),
            reports,
        }
    }

    /// Says that the thread ends.
    pub(super) fn report_end(&self) {
        self.reports.send_modify(|health| {
            health.alive = false;
            health.busy = false;
        });
    }

    /// Until the last handle is dropped and the last request has ended, or the runner is lost.
    pub(super) fn run(&mut self, mut commands: mpsc::UnboundedReceiver<Command<R>>) {
        loop {
            if self.engine.is_idle() && self.loads.is_empty() {
                self.report(false);
                match commands.blocking_recv() {
                    Some(command) => self.take(command),
                    None => return,
                }
            }
            while let Ok(command) = commands.try_recv() {
                self.take(command);
            }
            self.end_samples();
            self.cancel_abandoned();
            self.load_ready();
            if !self.engine.is_idle() {
                self.report(true);
                if let Err(why) = self.step() {
                    tracing::error!("nothing can be computed any more: {why}");
                    return;
                }
            }
        }
    }

    fn report(&self, busy: bool) {
        let health = Health {
            alive: true,
            busy,
            last_step: Instant::now(),
        };
        self.reports.send_replace(health);
    }

    fn take(&mut self, command: Command<R>) {
        match command {
            Command::Submit(submission) => self.accept(submission),
            Command::Load(load) => self.loads.push_back(load),
        }
    }

    fn accept(&mut self, submission: Submission<R>) {
        let Submission {
            ticket,
            request,
            output,
            place,
        } = submission;
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

    /// Puts the weights in place whose turn it is.
    fn load_ready(&mut self) {
        while let Some(load) = self.loads.front() {
            let waits = load.policy == LoadPolicy::Finish && self.engine.started() > 0;
            self.engine.drain(waits);
            if waits {
                return;
            }
            let Some(load) = self.loads.pop_front() else {
                return;
            };
            if load.policy == LoadPolicy::Abort {
                self.fail_all(|| EngineError::Aborted(load.version.clone()));
            }
            let loaded = self.engine.load_weights(&load.version, load.apply);
            if let Err(error) = &loaded {
                tracing::error!(version = load.version, "weights were not loaded: {}", describe(error));
            }
            // The caller may have gone.
            let _ = load.done.send(loaded);
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

    /// Why nothing can be computed any more, if that is so.
    fn step(&mut self) -> Result<(), String> {
        match self.engine.step() {
            Ok(step) => {
                step.events.into_iter().for_each(|event| self.deliver(event));
                for (request, error) in step.failures {
                    if let Some(client) = self.clients.remove(&request) {
                        let _ = client.output.send(Output::Failed(error));
                    }
                }
            }
            Err(error) => {
                let message = describe(&error);
                tracing::error!(requests = self.clients.len(), "a step failed: {message}");
                self.fail_all(|| EngineError::Step(message.clone()));
                return self.engine.runner_mut().lost().map_or(Ok(()), Err);
            }
        }
        Ok(())
    }

    fn deliver(&mut self, event: Event) {
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
            version: self.engine.version().clone(),
        });
        if client.unfinished == 0 {
            self.clients.remove(&event.request);
        }
    }

    /// Ends all requests.
    fn fail_all(&mut self, error: impl Fn() -> EngineError) {
        for (_, client) in std::mem::take(&mut self.clients) {
            let _ = client.output.send(Output::Failed(error()));
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
