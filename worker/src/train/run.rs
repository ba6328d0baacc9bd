//! The loop of a run: evaluate, checkpoint, step, until the goal, the guard or a signal.

use std::{collections::BTreeMap, time::Instant};

use flotilla_api::{progress::Stage, role::Train};
use flotilla_artifacts::{
    checkpoint::{list, prune},
    layout::RunDir,
    publish::{remove_leftovers, remove_published},
};

use super::{
    actor::{Actor, Turn},
    checkpoint::{self, Position},
    choice::Start,
    error::TrainError,
    evaluation::evaluate,
    fleet::Fleet,
    grpo::{GrpoSteps, terms},
    inputs::{Inputs, method, schedule},
    journal::{Journal, Line},
    plot,
    sft::SftSteps,
};
use crate::{context::Context, error::WorkerError, models::locate_blocking};

/// The algorithm of the run.
enum Steps<'a> {
    Sft(SftSteps<'a>),
    Grpo(GrpoSteps<'a>),
}

/// How a run came to its end.
enum End {
    Complete,
    Guarded(u32),
    Suspended(u32),
}

/// Runs a job to its end, sampling in this process or by the pods of `fleet`; once `cancelled` says yes it writes a
/// checkpoint and ends as suspended.
pub fn train(
    context: &Context,
    spec: &Train,
    fleet: Option<&Fleet>,
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<(), WorkerError> {
    context
        .progress
        .enter(Stage::Loading, format!("loading {}", spec.model.uri));
    let run = RunDir::new(context.volumes.resolve(&spec.output_uri)?);
    let removed = remove_leftovers(&run.checkpoints()).map_err(TrainError::from)?;
    if !removed.is_empty() {
        tracing::info!(?removed, "removed what an interrupted process left");
    }
    let base_dir = locate_blocking(context, &spec.model.uri, cancelled)?;
    let start = Start::load(context.device.open()?, spec, &base_dir, &run)?;
    let inputs = Inputs::read(&context.volumes, spec, &base_dir, start.model.config())?;
    let resumed = start.resumed.as_ref().map(|resumed| resumed.position.clone());
    let mut actor = start.actor(spec, &inputs)?;
    if let Some(position) = &resumed {
        tracing::info!(step = position.step, "resumed from the newest stable checkpoint");
    }
    let position = resumed.clone().unwrap_or_default();
    let runner = Runner {
        context,
        spec,
        journal: Journal::open(&run.metrics(), position.step)?,
        saved: resumed.is_some().then_some(position.step),
        run,
        inputs: &inputs,
        fleet,
        steps: steps_of(spec, &inputs)?,
        actor: actor.as_mut(),
        begin_step: position.step,
        position,
        line: BTreeMap::new(),
        total: spec.algorithm.total_steps(),
        begin: Instant::now(),
        cancelled,
    };
    runner.run()
}

fn steps_of<'a>(spec: &Train, inputs: &'a Inputs) -> Result<Steps<'a>, TrainError> {
    let (_, optimizer) = method(spec)?;
    let schedule = schedule(optimizer, spec.algorithm.total_steps());
    if let Some(sft) = &spec.algorithm.sft {
        return Ok(Steps::Sft(SftSteps {
            spec: sft.clone(),
            rows: &inputs.rows,
            schedule,
            seed: spec.seed,
        }));
    }
    Ok(Steps::Grpo(GrpoSteps {
        spec: spec.algorithm.grpo.clone().unwrap_or_default(),
        terms: terms(&spec.rewards)?,
        rows: &inputs.rows,
        gallery: &inputs.gallery,
        schedule,
        seed: spec.seed,
    }))
}

/// A run on its way.
struct Runner<'a> {
    context: &'a Context,
    spec: &'a Train,
    run: RunDir,
    inputs: &'a Inputs,
    fleet: Option<&'a Fleet>,
    steps: Steps<'a>,
    actor: &'a mut dyn Actor,
    journal: Journal,
    position: Position,
    /// Step of the newest checkpoint.
    saved: Option<u32>,
    /// Metrics of the newest step.
    line: BTreeMap<String, f64>,
    total: u32,
    begin: Instant,
    begin_step: u32,
    cancelled: &'a (dyn Fn() -> bool + Sync),
}

impl<'a> Runner<'a> {
    fn run(mut self) -> Result<(), WorkerError> {
        self.context
            .progress
            .enter(Stage::Running, format!("training to step {}", self.total));
        self.tell_checkpoints()?;
        match self.until_the_end()? {
            End::Complete => {
                self.draw();
                self.tell(&format!("completed {} steps", self.total));
            }
            End::Guarded(step) => self.fall_back(step)?,
            End::Suspended(step) => return Err(WorkerError::Suspended { step }),
        }
        self.context.progress.update(|progress| {
            progress.stage = Stage::Completed;
            progress.eta_seconds = Some(0);
        });
        Ok(())
    }

    fn until_the_end(&mut self) -> Result<End, TrainError> {
        loop {
            let step = self.position.step;
            if self.evaluation_is_due() {
                match self.evaluate() {
                    Err(TrainError::Cancelled) => return self.suspend(),
                    other => other?,
                }
                self.draw();
            }
            if self.checkpoint_is_due() {
                self.save()?;
            }
            if self.guard_tripped() {
                return Ok(End::Guarded(step));
            }
            if step >= self.total {
                return Ok(End::Complete);
            }
            if (self.cancelled)() {
                return self.suspend();
            }
            match self.step() {
                Err(TrainError::Cancelled) => return self.suspend(),
                other => other?,
            }
        }
    }

    fn step(&mut self) -> Result<(), TrainError> {
        let step = self.position.step;
        let span = tracing::info_span!("step", step = step + 1);
        let _entered = span.enter();
        let turn = self.turn();
        let mut metrics = match &self.steps {
            Steps::Sft(sft) => sft.step(self.actor, step)?,
            Steps::Grpo(grpo) => grpo.step(self.actor, turn)?,
        };
        metrics.extend(
            self.actor
                .gauges()
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value)),
        );
        // An update that was skipped has a norm that is no number, which JSON cannot say.
        metrics.retain(|_, value| value.is_finite());
        self.position.step = step + 1;
        self.line.clone_from(&metrics);
        self.journal.append(Line {
            step: step + 1,
            metrics,
        })?;
        self.tell("training");
        Ok(())
    }

    fn evaluation_is_due(&self) -> bool {
        let step = self.position.step;
        let every = self.spec.evaluate_every;
        let due = step == 0 || step >= self.total || (every > 0 && step.is_multiple_of(every));
        due && !self.inputs.sets.is_empty() && self.position.evaluated != Some(step)
    }

    fn evaluate(&mut self) -> Result<(), TrainError> {
        let step = self.position.step;
        let begin = Instant::now();
        let mut scores = Vec::new();
        let (longest, turn) = (self.inputs.longest_answer(self.spec), self.turn());
        for set in &self.inputs.sets {
            let score = evaluate(self.actor, &self.inputs.gallery, set, longest, turn)?;
            tracing::info!(
                set = score.set,
                step,
                accuracy = score.accuracy,
                format = score.format_rate,
                "evaluated"
            );
            scores.push(score);
        }
        self.line
            .insert("timing_s/evaluate".into(), begin.elapsed().as_secs_f64());
        self.position.evaluated = Some(step);
        // A run that was suspended in this evaluation has saved the step without its scores.
        self.saved = self.saved.filter(|saved| *saved != step);
        self.position.history.extend(scores);
        if !self.fell_at(step) {
            self.position.held = Some(step);
        }
        self.tell("training");
        Ok(())
    }

    /// The step that comes next.
    fn turn(&self) -> Turn<'a> {
        Turn {
            fleet: self.fleet,
            step: self.position.step,
            cancelled: self.cancelled,
        }
    }

    /// Whether the guard's set had fallen too far at `step`; false without guard or score.
    fn fell_at(&self, step: u32) -> bool {
        let Some(guard) = &self.spec.guard else { return false };
        let scores = || self.position.history.iter().filter(|score| score.set == guard.set);
        let at = |step: u32| scores().find(|score| score.step == step).map(|score| score.accuracy);
        match (at(0), at(step)) {
            (Some(initial), Some(now)) => now < initial - guard.max_drop - 1e-9,
            _ => false,
        }
    }

    /// A fall ends the run when the evaluation before had fallen too, or when none follows: what dips once may recover.
    fn guard_tripped(&self) -> bool {
        let step = self.position.step;
        let before = self
            .position
            .history
            .iter()
            .map(|score| score.step)
            .filter(|other| *other < step)
            .max();
        self.fell_at(step) && (step >= self.total || before.is_some_and(|before| self.fell_at(before)))
    }

    /// A checkpoint is due at its interval and at the end; with a guard also after each evaluation, since any of them may
    /// become the result.
    fn checkpoint_is_due(&self) -> bool {
        let step = self.position.step;
        let every = self.spec.checkpoint_every;
        let interval = step > 0 && every > 0 && step.is_multiple_of(every);
        let guarded = self.spec.guard.is_some() && self.position.evaluated == Some(step);
        self.saved != Some(step) && (interval || guarded || step >= self.total) && !self.guard_tripped()
    }

    fn save(&mut self) -> Result<(), TrainError> {
        let begin = Instant::now();
        let published = checkpoint::write(&self.run, &self.inputs.files, self.actor, &self.position)?;
        self.saved = Some(self.position.step);
        let kept = self.position.held.filter(|_| self.spec.guard.is_some());
        prune(&self.run.checkpoints(), self.spec.keep_last as usize, kept)?;
        let seconds = begin.elapsed().as_secs_f64();
        tracing::info!(
            step = self.position.step,
            digest = published.digest,
            seconds,
            "checkpoint"
        );
        self.tell_checkpoints()
    }

    /// Saves what is done unless it is saved, so that nothing of a suspended run is lost.
    fn suspend(&mut self) -> Result<End, TrainError> {
        self.context
            .progress
            .enter(Stage::Stopping, "writing the last checkpoint");
        if self.saved != Some(self.position.step) {
            self.save()?;
        }
        Ok(End::Suspended(self.position.step))
    }

    /// Ends a run whose guard tripped: the newest evaluated checkpoint that held is the result, later ones are removed.
    fn fall_back(&mut self, tripped: u32) -> Result<(), TrainError> {
        let held = self.position.held.unwrap_or(0);
        for checkpoint in list(&self.run.checkpoints())? {
            if checkpoint.step > held {
                remove_published(&checkpoint.path)?;
            }
        }
        self.draw();
        let set = self.spec.guard.as_ref().map_or("", |guard| guard.set.as_str());
        self.position.step = tripped;
        self.tell(&format!(
            "the guard on {set} stopped the run at step {tripped}; the result is step {held}"
        ));
        let scores = self.position.scores_at(held);
        self.context.progress.update(|progress| {
            progress.metrics.insert("guard/stopped_at".into(), f64::from(tripped));
            progress.scores = scores;
        });
        self.tell_checkpoints()
    }

    fn tell(&self, message: &str) {
        let position = &self.position;
        let done = position.step.saturating_sub(self.begin_step);
        let left = self.total.saturating_sub(position.step);
        let pace = self.begin.elapsed().as_secs_f64() / f64::from(done.max(1));
        self.context.progress.update(|progress| {
            progress.message = message.to_owned();
            progress.step = position.step;
            progress.total_steps = self.total;
            progress.eta_seconds = (done > 0).then(|| (pace * f64::from(left)) as u64);
            progress.metrics.extend(self.line.clone());
            progress.initial_scores = position.scores_at(0);
            progress.scores = position
                .evaluated
                .map(|step| position.scores_at(step))
                .unwrap_or_default();
        });
    }

    fn tell_checkpoints(&self) -> Result<(), TrainError> {
        let records = checkpoint::records(&self.run, &self.spec.output_uri)?;
        self.context.progress.update(|progress| progress.checkpoints = records);
        Ok(())
    }

    /// A plot that cannot be drawn does not end a run.
    fn draw(&self) {
        if let Err(error) = plot::write(&self.run.plot(), self.journal.lines(), &self.position.history) {
            tracing::warn!(%error, "the plot was not written");
        }
    }
}
