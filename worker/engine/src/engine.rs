//! The loop: schedule, run, postprocess.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};

use crate::{
    error::EngineError,
    group::Group,
    limits::Limits,
    prefix::{self, Key},
    recipe::Recipe,
    request::{FinishReason, Request, Token},
    row::{Row, Ticket},
    runner::{Answer, Answers, Cause, Chunk, RequestFor, Runner},
    scheduler::{Part, Plan, Scheduler},
    sequence::{RequestId, Sequence},
    stats::Stats,
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

/// What a step has brought.
#[derive(Debug, Default)]
pub struct Step {
    /// Drawn tokens.
    pub events: Vec<Event>,
    /// Requests that have ended unfinished.
    pub failures: Vec<(RequestId, EngineError)>,
}

/// A model and what it is working on. New requests join at the next step; blocks of finished samples are free at once.
#[derive(Debug)]
pub struct Engine<R: Runner> {
    runner: R,
    pool: R::Pool,
    scheduler: Scheduler,
    asked: BTreeMap<RequestId, Asked<R::Prompt>>,
    deadlines: BTreeSet<(Instant, RequestId)>,
    failures: Vec<(RequestId, EngineError)>,
    next_id: RequestId,
    version: Arc<str>,
    /// Key before the first block of every prompt.
    root: Key,
    /// What the step that the runner has begun does.
    begun: Option<Plan>,
    stats: Arc<Stats>,
}

/// What a request that has not ended came with.
#[derive(Debug)]
struct Asked<P> {
    prompt: Arc<P>,
    deadline: Option<Instant>,
}

impl<R: Runner> Engine<R> {
    /// With nothing to do. `version` names the weights that the runner has.
    pub fn new(runner: R, version: &str, limits: Limits) -> Result<Self, EngineError> {
        limits.validate()?;
        let (blocks, block_size) = (limits.kv_blocks, limits.block_size);
        let pool = runner.pool(blocks, block_size).map_err(|source| EngineError::Pool {
            blocks,
            block_size,
            source,
        })?;
        let stats = Stats::default();
        stats.kv_blocks.set(blocks);
        Ok(Self {
            runner,
            pool,
            scheduler: Scheduler::new(limits),
            asked: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            failures: Vec::new(),
            next_id: 0,
            version: version.into(),
            root: prefix::root(version),
            begun: None,
            stats: Arc::new(stats),
        })
    }

    /// The model.
    pub fn runner(&self) -> &R {
        &self.runner
    }

    /// The model, for what a caller asks of it between two steps. Weights change by [`Self::load_weights`] alone.
    pub fn runner_mut(&mut self) -> &mut R {
        &mut self.runner
    }

    /// Version of the weights.
    pub fn version(&self) -> &Arc<str> {
        &self.version
    }

    /// What the engine holds and has done.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// Takes a request; its tokens come out of [`Self::step`] under the number returned.
    pub fn submit(&mut self, request: &RequestFor<R>) -> Result<RequestId, EngineError> {
        let Request {
            prompt,
            n,
            sampling,
            constraint,
            deadline,
        } = request;
        let recipe = Recipe::new(sampling, constraint.as_ref(), *n, self.runner.prompt_ids(prompt))?;
        let prompt_tokens = self.runner.prompt_tokens(prompt);
        if *n == 0 || prompt_tokens == 0 {
            let fault = format!("{n} samples over a prompt of {prompt_tokens} tokens");
            return Err(EngineError::InvalidRequest(fault));
        }
        let limits = self.scheduler.limits();
        let blocks = limits.blocks_of(prompt_tokens, sampling.max_tokens);
        if blocks > limits.kv_blocks {
            let fault = format!(
                "a sample of {prompt_tokens} prompt tokens and {} new ones takes {blocks} blocks of {} tokens, the \
                 key-value cache has {}",
                sampling.max_tokens, limits.block_size, limits.kv_blocks
            );
            return Err(EngineError::InvalidRequest(fault));
        }
        let keys = prompt_keys(&self.runner, prompt, &self.root, limits.block_size)?;
        let id = self.next_id;
        self.next_id += 1;
        let group = Group::new(id, *n, Arc::new(recipe), prompt_tokens, keys);
        self.scheduler.enqueue(group);
        self.deadlines.extend(deadline.map(|deadline| (deadline, id)));
        let asked = Asked {
            prompt: prompt.clone(),
            deadline: *deadline,
        };
        self.asked.insert(id, asked);
        Ok(id)
    }

    /// Ends a request: nothing of it comes out any more, and its blocks are free.
    pub fn cancel(&mut self, request: RequestId) {
        self.scheduler.cancel(request);
        self.forget_ended(request);
        self.abandon_idle();
        self.report_held();
    }

    /// Ends a sample without another event of it. False if it has ended before.
    pub fn end(&mut self, request: RequestId, sample: usize) -> bool {
        let ended = self.scheduler.end(request, sample);
        self.forget_ended(request);
        self.abandon_idle();
        self.report_held();
        ended
    }

    /// Ends every request.
    pub fn clear(&mut self) {
        self.abandon();
        for request in std::mem::take(&mut self.asked).into_keys() {
            self.scheduler.cancel(request);
        }
        // A step that failed may have left anything in the blocks.
        self.scheduler.flush();
        self.deadlines.clear();
        self.failures.clear();
        self.report_held();
    }

    /// Forgets a step that was begun: its samples are where they were before it.
    fn abandon(&mut self) {
        self.begun = None;
        self.runner.abandon();
    }

    /// Forgets a step that was begun for samples that have all ended.
    fn abandon_idle(&mut self) {
        let scheduler = &self.scheduler;
        let is_left = |plan: &Plan| plan.parts.iter().any(|part| scheduler.row(part.ticket).is_some());
        if self.begun.as_ref().is_some_and(|plan| !is_left(plan)) {
            self.abandon();
        }
    }

    fn forget_ended(&mut self, request: RequestId) {
        if !self.scheduler.has(request)
            && let Some(asked) = self.asked.remove(&request)
            && let Some(deadline) = asked.deadline
        {
            self.deadlines.remove(&(deadline, request));
        }
    }

    fn fail(&mut self, request: RequestId, error: EngineError) {
        self.cancel(request);
        self.failures.push((request, error));
    }

    /// Requests of which not all samples have started.
    pub fn waiting(&self) -> usize {
        self.scheduler.waiting()
    }

    /// Samples that have blocks.
    pub fn running(&self) -> usize {
        self.scheduler.running()
    }

    /// Requests of which something has started.
    pub fn started(&self) -> usize {
        self.scheduler.started()
    }

    /// Blocks that hold keys and values of samples, running or kept to start from.
    pub fn used_blocks(&self) -> usize {
        self.scheduler.blocks().used()
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle() && self.failures.is_empty()
    }

    /// From now on requests of which nothing has started wait (or no more).
    pub fn drain(&mut self, draining: bool) {
        self.scheduler.drain(draining);
    }

    /// Computes the next tokens of what runs, lets waiting samples start, and draws. After an error the engine must be
    /// [cleared](Self::clear).
    ///
    /// Where the runner can, the step after this one is begun before the tokens of this one are read, so that it need not wait
    /// for what is done with them. A request that comes then joins one step later, and samples that have ended are computed
    /// once more, for nobody.
    pub fn step(&mut self) -> Result<Step, EngineError> {
        self.fail_expired();
        let (plan, answers) = match self.begun.take() {
            Some(plan) => (plan, None),
            None => {
                let plan = self.scheduler.schedule();
                let answers = self.run(&plan)?;
                (plan, answers)
            }
        };
        let answers = match answers {
            Some(answers) => answers,
            None => self.finish(&plan)?,
        };
        let events = self.postprocess(&plan, &answers)?;
        self.abandon_idle();
        self.report();
        Ok(Step {
            events,
            failures: std::mem::take(&mut self.failures),
        })
    }

    /// Begins the step after one that was begun, if that can be said already, and waits for the tokens of the first.
    fn finish(&mut self, plan: &Plan) -> Result<Answers, EngineError> {
        if let Some(next) = self.scheduler.schedule_after(plan) {
            let chunks = chunks(&self.scheduler, &self.asked, &next);
            let begun = self.runner.begin(&mut self.pool, &chunks);
            if begun.map_err(model_error("compute", next.parts.len()))? {
                self.begun = Some(next);
            }
        }
        let answers = self.runner.finish();
        answers.map_err(model_error("compute", plan.parts.len()))
    }

    /// Ends the requests whose deadline has passed.
    fn fail_expired(&mut self) {
        if self.deadlines.is_empty() {
            return;
        }
        let now = Instant::now();
        while let Some((deadline, request)) = self.deadlines.first().copied()
            && deadline <= now
        {
            self.deadlines.pop_first();
            self.fail(request, EngineError::Deadline);
        }
    }

    /// The answers of a step; None if it is begun.
    fn run(&mut self, plan: &Plan) -> Result<Option<Answers>, EngineError> {
        let rows = plan.parts.len();
        if !plan.copies.is_empty() {
            let copied = self.runner.copy(&mut self.pool, &plan.copies);
            copied.map_err(model_error("copy", rows))?;
        }
        if plan.parts.is_empty() {
            return Ok(Some(Answers::default()));
        }
        let chunks = chunks(&self.scheduler, &self.asked, plan);
        let begun = self.runner.begin(&mut self.pool, &chunks);
        if begun.map_err(model_error("compute", rows))? {
            return Ok(None);
        }
        let answers = self.runner.step(&mut self.pool, &chunks);
        answers.map(Some).map_err(model_error("compute", rows))
    }

    /// Counts what is stored now, tells the prefix cache, draws tokens and lets samples start from prompts that are
    /// computed.
    fn postprocess(&mut self, plan: &Plan, answers: &Answers) -> Result<Vec<Event>, EngineError> {
        let mut events = Vec::with_capacity(plan.parts.len());
        let mut wanted = 0;
        for part in &plan.parts {
            let (runner, asked, root) = (&self.runner, &self.asked, &self.root);
            let block_size = self.scheduler.limits().block_size;
            let key = |row: &Row, index: usize| {
                let asked = asked.get(&part.ticket.request).ok_or(EngineError::Stopped)?;
                let parent = row.keys.last().unwrap_or(root);
                block_key(runner, &asked.prompt, &row.drawn, parent, index, block_size)
            };
            let runs = self.scheduler.advance(part, key)?;
            if !part.wanted {
                continue;
            }
            let answer = answers.row(wanted);
            wanted += 1;
            if runs {
                self.take_answer(part.ticket, answer, &mut events);
            }
        }
        for ticket in &plan.forks {
            self.draw_first(*ticket, &mut events);
        }
        for ticket in self.scheduler.start_forks() {
            self.draw_first(ticket, &mut events);
        }
        Ok(events)
    }

    fn take_answer(&mut self, ticket: Ticket, answer: Answer<'_>, events: &mut Vec<Event>) {
        match answer {
            Answer::Logits(logits) => match self.scheduler.keep_prompt(ticket, logits) {
                Some(shared) => self.draw(ticket, |sequence| sequence.extend_shared(&shared), events),
                None => self.draw(ticket, |sequence| sequence.extend(logits), events),
            },
            Answer::Drawn(drawn) => {
                self.scheduler.leave_prompt(ticket);
                self.draw(ticket, |sequence| sequence.accept(drawn), events);
            }
        }
    }

    /// Draws the first token of a sample whose prompt another one has computed.
    fn draw_first(&mut self, ticket: Ticket, events: &mut Vec<Event>) {
        let first = self.scheduler.row_mut(ticket).and_then(|row| row.first.take());
        if let Some(logits) = first {
            self.draw(ticket, |sequence| sequence.extend_shared(&logits), events);
        }
    }

    fn draw(
        &mut self,
        ticket: Ticket,
        draw: impl FnOnce(&mut Sequence) -> Result<(Token, Option<FinishReason>), EngineError>,
        events: &mut Vec<Event>,
    ) {
        let Some(row) = self.scheduler.row_mut(ticket) else {
            return;
        };
        match draw(&mut row.sequence) {
            Ok((token, finish)) => {
                row.drawn.push(token.id);
                events.push(Event {
                    request: ticket.request,
                    sample: ticket.sample,
                    token,
                    finish,
                });
                if finish.is_some() {
                    self.end(ticket.request, ticket.sample);
                }
            }
            Err(error) => self.fail(ticket.request, error),
        }
    }

    /// What is held now: no step may follow that would tell it.
    fn report_held(&self) {
        self.stats.waiting.set(self.waiting());
        self.stats.running.set(self.running());
        self.stats.kv_blocks_used.set(self.used_blocks());
    }

    fn report(&self) {
        self.report_held();
        let (stats, counts, visuals) = (&self.stats, self.scheduler.counts(), self.runner.visual_counts());
        stats.steps.add(1);
        stats.prefill_tokens.set(counts.prefill_tokens);
        stats.prefix_queries.set(counts.prefix_queries);
        stats.prefix_hits.set(counts.prefix_hits);
        stats.preemptions.set(counts.preemptions);
        stats.visual_queries.set(visuals.queries);
        stats.visual_hits.set(visuals.hits);
    }

    /// Puts other weights in place between two steps. Requests go on with the tokens that they have drawn; everything that
    /// was computed from the weights before is forgotten in the same moment: keys and values, the prefix cache, features of
    /// pictures. If `apply` fails the version stays, and what `apply` has left of the weights is used.
    pub fn load_weights(
        &mut self,
        version: &str,
        apply: impl FnOnce(&mut R) -> Result<(), Cause>,
    ) -> Result<(), EngineError> {
        // A token that the old weights draw now would be said to be of the new ones.
        self.abandon();
        let applied = apply(&mut self.runner);
        if applied.is_ok() {
            self.version = version.into();
            self.root = prefix::root(version);
        }
        self.forget()?;
        applied.map_err(|source| EngineError::Weights {
            version: version.to_owned(),
            source,
        })
    }

    /// Forgets what was computed before: keys and values, the prefix cache, features of pictures. Requests go on with the
    /// tokens that they have drawn. An engine that has forgotten computes what comes as a new one does, to the last bit.
    pub fn forget(&mut self) -> Result<(), EngineError> {
        self.abandon();
        self.scheduler.flush();
        self.runner.flush();
        let block_size = self.scheduler.limits().block_size;
        let (runner, asked, root) = (&self.runner, &self.asked, &self.root);
        self.scheduler.rekey(|request| match asked.get(&request) {
            Some(asked) => prompt_keys(runner, &asked.prompt, root, block_size),
            None => Ok(Vec::new()),
        })
    }
}

/// What the runner is told of a step.
fn chunks<'a, P>(scheduler: &'a Scheduler, asked: &'a BTreeMap<RequestId, Asked<P>>, plan: &Plan) -> Vec<Chunk<'a, P>> {
    let chunk = |part: &Part| {
        let row = scheduler.row(part.ticket)?;
        let draw = if part.after.is_some() {
            row.sequence.draw_after_next()
        } else if !row.drawn.is_empty() || scheduler.is_alone(part.ticket.request) {
            row.sequence.next_draw()
        } else {
            // The logits after a prompt are kept for other samples of its request.
            None
        };
        Some(Chunk {
            prompt: asked.get(&part.ticket.request)?.prompt.as_ref(),
            drawn: &row.drawn,
            stored: row.stored + usize::from(part.after.is_some()),
            tokens: part.tokens,
            blocks: &row.blocks,
            wanted: part.wanted,
            draw,
            watched: row.sequence.watched_ids(),
            after: part.after,
        })
    };
    plan.parts.iter().filter_map(chunk).collect()
}

/// Keys of the full blocks of a prompt.
fn prompt_keys<R: Runner>(
    runner: &R,
    prompt: &R::Prompt,
    root: &Key,
    block_size: usize,
) -> Result<Vec<Key>, EngineError> {
    let count = runner.prompt_tokens(prompt) / block_size;
    let mut keys = Vec::with_capacity(count);
    let mut parent = *root;
    for index in 0..count {
        parent = block_key(runner, prompt, &[], &parent, index, block_size)?;
        keys.push(parent);
    }
    Ok(keys)
}

/// The key of a full block of the prompt followed by drawn tokens.
fn block_key<R: Runner>(
    runner: &R,
    prompt: &R::Prompt,
    drawn: &[u32],
    parent: &Key,
    index: usize,
    block_size: usize,
) -> Result<Key, EngineError> {
    let mut content = Vec::new();
    let range = index * block_size..(index + 1) * block_size;
    let identified = runner.content(prompt, drawn, range, &mut content);
    identified.map_err(model_error("identify", 1))?;
    Ok(prefix::next(parent, &content))
}

fn model_error(step: &'static str, rows: usize) -> impl FnOnce(Cause) -> EngineError {
    move |source| EngineError::Model { step, rows, source }
}
