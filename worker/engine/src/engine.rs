//! The loop: schedule, run, postprocess.

use std::{collections::HashMap, sync::Arc};

use crate::{
    error::EngineError,
    recipe::Recipe,
    request::{FinishReason, Request, Token},
    runner::{Logits, RequestFor, Runner},
    scheduler::{Admission, Limits, Scheduler},
    sequence::{RequestId, Sequence},
};

/// One drawn token of one sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// The request.
    pub request: RequestId,
    /// Index of the sample in its request.
    pub sample: usize,
    /// The token.
    pub token: Token,
    /// Set with the last token of the sample.
    pub finish: Option<FinishReason>,
}

/// A model and what it is working on. New requests join at the next step; finished rows leave the batch at once.
#[derive(Debug)]
pub struct Engine<R: Runner> {
    runner: R,
    scheduler: Scheduler,
    requests: HashMap<RequestId, Active<R::Prompt>>,
    next_id: RequestId,
    /// Row `i` of the cache belongs to sequence `i`.
    rows: Vec<Sequence>,
    cache: Option<R::Cache>,
}

/// A request that has not ended.
#[derive(Debug)]
struct Active<P> {
    prompt: Arc<P>,
    recipe: Arc<Recipe>,
    row_tokens: usize,
    unfinished: usize,
    cancelled: bool,
}

impl<R: Runner> Engine<R> {
    /// With nothing to do.
    pub fn new(runner: R, limits: Limits) -> Self {
        Self {
            runner,
            scheduler: Scheduler::new(limits),
            requests: HashMap::new(),
            next_id: 0,
            rows: Vec::new(),
            cache: None,
        }
    }

    /// The model.
    pub fn runner(&self) -> &R {
        &self.runner
    }

    /// Takes a request; its tokens come out of [`Self::step`] under the number returned.
    pub fn submit(&mut self, request: &RequestFor<R>) -> Result<RequestId, EngineError> {
        let Request {
            prompt,
            n,
            sampling,
            constraint,
            ..
        } = request;
        let recipe = Recipe::new(sampling, constraint.as_ref(), *n, self.runner.prompt_ids(prompt))?;
        let prompt_tokens = self.runner.prompt_tokens(prompt);
        if *n == 0 || prompt_tokens == 0 {
            let fault = format!("{n} samples over a prompt of {prompt_tokens} tokens");
            return Err(EngineError::InvalidRequest(fault));
        }
        let id = self.next_id;
        self.next_id += 1;
        self.scheduler.enqueue(id, *n, prompt_tokens, sampling.max_tokens);
        let active = Active {
            prompt: prompt.clone(),
            recipe: Arc::new(recipe),
            row_tokens: prompt_tokens + sampling.max_tokens,
            unfinished: *n,
            cancelled: false,
        };
        self.requests.insert(id, active);
        Ok(id)
    }

    /// Ends a request: nothing of it comes out any more, and its rows are freed at the next step.
    pub fn cancel(&mut self, request: RequestId) {
        self.scheduler.cancel(request);
        let running = self.rows.iter().any(|row| row.request == request);
        match self.requests.get_mut(&request) {
            Some(active) if running => active.cancelled = true,
            _ => drop(self.requests.remove(&request)),
        }
    }

    /// Ends a sample that runs, without another event of it. False if it does not run (any more).
    pub fn end(&mut self, request: RequestId, sample: usize) -> bool {
        let of_it = |row: &Sequence| row.request == request && row.sample == sample;
        match self.rows.iter_mut().find(|row| of_it(row)) {
            Some(row) if !row.ended => {
                row.ended = true;
                true
            }
            _ => false,
        }
    }

    /// Ends every request.
    pub fn clear(&mut self) {
        let limits = self.scheduler.limits();
        self.scheduler = Scheduler::new(limits);
        self.requests.clear();
        self.rows.clear();
        self.cache = None;
    }

    /// Requests of which not all samples have started.
    pub fn waiting(&self) -> usize {
        self.scheduler.waiting()
    }

    /// Samples that are being decoded.
    pub fn running(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// Lets waiting requests start and draws one token for every row. After an error the engine must be
    /// [cleared](Self::clear).
    pub fn step(&mut self) -> Result<Vec<Event>, EngineError> {
        self.drop_cancelled()?;
        let mut events = self.advance()?;
        let admissions = self.scheduler.admit();
        if !admissions.is_empty() {
            events.extend(self.start(&admissions)?);
        }
        Ok(events)
    }

    /// Frees the rows of cancelled requests and ended samples.
    fn drop_cancelled(&mut self) -> Result<(), EngineError> {
        let mut kept = Vec::with_capacity(self.rows.len());
        for index in 0..self.rows.len() {
            let row = &self.rows[index];
            let (request, ended) = (row.request, row.ended);
            if ended {
                self.finish(request);
            } else if self.requests.get(&request).is_none_or(|active| active.cancelled) {
                if let Some(active) = self.requests.get(&request) {
                    self.scheduler.release(active.row_tokens);
                }
            } else {
                kept.push(index);
            }
        }
        self.requests.retain(|_, active| !active.cancelled);
        self.keep(&kept)
    }

    /// One token for every running row.
    fn advance(&mut self) -> Result<Vec<Event>, EngineError> {
        let Some(cache) = &mut self.cache else {
            return Ok(Vec::new());
        };
        let ids: Vec<u32> = self.rows.iter().map(Sequence::last).collect();
        let logits = self
            .runner
            .decode(cache, &ids)
            .map_err(model_error("decode", ids.len()))?;
        let mut rows = std::mem::take(&mut self.rows);
        let (events, unfinished) = self.extend(&mut rows, &logits)?;
        self.rows = rows;
        self.keep(&unfinished)?;
        Ok(events)
    }

    /// Computes the prompts of what was admitted, draws the first tokens and lets the rows join the others.
    fn start(&mut self, admissions: &[Admission]) -> Result<Vec<Event>, EngineError> {
        let mut prompts = Vec::with_capacity(admissions.len());
        let mut repeat = Vec::with_capacity(admissions.len());
        let mut rows = Vec::new();
        let mut room = 0;
        for admission in admissions {
            let Some(active) = self.requests.get(&admission.request) else {
                continue;
            };
            prompts.push(active.prompt.clone());
            repeat.push(admission.samples.len());
            room = room.max(active.recipe.sampling().max_tokens);
            let recipe = &active.recipe;
            let sequence = |sample| Sequence::new(admission.request, sample, recipe.clone());
            rows.extend(admission.samples.clone().map(sequence));
        }
        let prompts: Vec<&R::Prompt> = prompts.iter().map(AsRef::as_ref).collect();
        let (mut cache, logits) = self
            .runner
            .prefill(&prompts, &repeat, room)
            .map_err(model_error("prefill", prompts.len()))?;
        let (events, unfinished) = self.extend(&mut rows, &logits)?;
        if !unfinished.is_empty() {
            let count = rows.len();
            self.runner
                .keep(&mut cache, &unfinished)
                .map_err(model_error("drop", count))?;
            self.rows.extend(select(rows, &unfinished));
            match &mut self.cache {
                Some(running) => self.runner.append(running, cache).map_err(model_error("join", count))?,
                None => self.cache = Some(cache),
            }
        }
        Ok(events)
    }

    /// Draws a token for each row; also the indices of the rows that go on.
    fn extend(&mut self, rows: &mut [Sequence], logits: &Logits) -> Result<(Vec<Event>, Vec<usize>), EngineError> {
        let mut events = Vec::with_capacity(rows.len());
        let mut unfinished = Vec::with_capacity(rows.len());
        for (index, row) in rows.iter_mut().enumerate() {
            let (token, finish) = row.extend(logits.row(index))?;
            match finish {
                Some(_) => self.finish(row.request),
                None => unfinished.push(index),
            }
            events.push(Event {
                request: row.request,
                sample: row.sample,
                token,
                finish,
            });
        }
        Ok((events, unfinished))
    }

    /// Counts one sample of a request as finished.
    fn finish(&mut self, request: RequestId) {
        if let Some(active) = self.requests.get_mut(&request) {
            active.unfinished -= 1;
            self.scheduler.release(active.row_tokens);
            if active.unfinished == 0 {
                self.requests.remove(&request);
            }
        }
    }

    /// Keeps these rows of the batch.
    fn keep(&mut self, kept: &[usize]) -> Result<(), EngineError> {
        if kept.len() == self.rows.len() {
            return Ok(());
        }
        self.rows = select(std::mem::take(&mut self.rows), kept);
        if kept.is_empty() {
            self.cache = None;
        } else if let Some(cache) = &mut self.cache {
            self.runner.keep(cache, kept).map_err(model_error("drop", kept.len()))?;
        }
        Ok(())
    }
}

/// The items at these rising indices.
fn select<T>(items: Vec<T>, indices: &[usize]) -> Vec<T> {
    let mut wanted = indices.iter().copied().peekable();
    let is_wanted = |(index, item): (usize, T)| wanted.next_if_eq(&index).map(|_| item);
    items.into_iter().enumerate().filter_map(is_wanted).collect()
}

fn model_error(step: &'static str, rows: usize) -> impl FnOnce(crate::runner::Cause) -> EngineError {
    move |source| EngineError::Model { step, rows, source }
}
