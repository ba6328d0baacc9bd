//! The loop of a run: evaluate, checkpoint, step, until the goal, the guard or a signal.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::Instant,
};

use flotilla_api::{
    algorithm::Optimizer,
    evaluation::Score,
    progress::Stage,
    role::{ModelSource, PreparedDataset, Train},
};
use flotilla_artifacts::{
    checkpoint::{list, newest, prune, verify},
    dataset::Dataset,
    layout::RunDir,
    publish::{remove_leftovers, remove_published},
};
use flotilla_model::{Config, LoadOptions, Pass, Processor, Vlm};

use super::{
    checkpoint::{self, ModelFiles, Position},
    error::TrainError,
    evaluation::{EvaluationSet, evaluate},
    examples::{ExampleSet, Images},
    features::{Features, Gallery, encode},
    fleet::Fleet,
    grpo::{GrpoSteps, terms},
    journal::{Journal, Line},
    learner::Learner,
    plot,
    rollout::{Remote, Rollout},
    sft::SftSteps,
};
use crate::{context::Context, device::threads, error::WorkerError, models::locate_blocking};

/// Features of a frozen vision tower are kept for the whole run up to this size.
const MAX_KEPT_FEATURE_BYTES: usize = 1 << 30;
/// Tokens that a greedy answer may have beyond the longest one imitated.
const SFT_ANSWER_MARGIN: usize = 8;

/// What is read before the first step.
struct Inputs {
    rows: ExampleSet,
    sets: Vec<EvaluationSet>,
    gallery: Gallery,
    files: ModelFiles,
}

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
    let options = LoadOptions {
        device: context.device.open()?.device,
        ..LoadOptions::default()
    };
    let base = load_base(&base_dir, &spec.model, &options)?;
    let inputs = read_inputs(context, spec, &base_dir, base.config())?;
    let (model, resumed) = load_newest(&run, &base, &options)?;
    let (freeze, optimizer) = algorithm_parts(spec)?;
    let threads = threads(&options.device, spec.threads as usize);
    let total = spec.algorithm.total_steps();
    let mut learner = Learner::new(model, freeze, optimizer, total, threads)?;
    let position = match &resumed {
        Some((dir, position)) => {
            checkpoint::restore_optimizer(dir, position, &mut learner)?;
            tracing::info!(step = position.step, "resumed from the newest stable checkpoint");
            position.clone()
        }
        None => Position::default(),
    };
    let known = known_features(&learner, &inputs, threads)?;
    let steps = steps_of(spec, &inputs, &base, fleet)?;
    let runner = Runner {
        context,
        spec,
        journal: Journal::open(&run.metrics(), position.step)?,
        saved: resumed.is_some().then_some(position.step),
        run,
        inputs: &inputs,
        fleet,
        steps,
        known: known.as_ref(),
        learner,
        position,
        line: BTreeMap::new(),
        total,
        begin: Instant::now(),
        begin_step: resumed.as_ref().map_or(0, |(_, position)| position.step),
        cancelled,
    };
    runner.run()
}

/// The model that the run begins with.
fn load_base(dir: &Path, source: &ModelSource, options: &LoadOptions) -> Result<Vlm, TrainError> {
    if let Some(seed) = source.random_seed {
        return Ok(Vlm::random(Config::load(dir)?, seed, options)?);
    }
    verify(dir, source.digest.as_deref())?;
    Ok(Vlm::load(dir, options)?)
}

/// The newest checkpoint of the run, verified; else a copy of the base model.
fn load_newest(
    run: &RunDir,
    base: &Vlm,
    options: &LoadOptions,
) -> Result<(Vlm, Option<(std::path::PathBuf, Position)>), TrainError> {
    let Some(newest) = newest(&run.checkpoints())? else {
        return Ok((base.deep_copy()?, None));
    };
    verify(&newest.path, Some(&newest.digest))?;
    let model = Vlm::load(&newest.path, options)?;
    let position = checkpoint::read_position(&newest.path)?;
    Ok((model, Some((newest.path, position))))
}

fn read_inputs(context: &Context, spec: &Train, base_dir: &Path, config: &Config) -> Result<Inputs, TrainError> {
    let processor = Processor::load(base_dir)?;
    let max_tokens = config.text.max_position_embeddings;
    let mut images = Images::default();
    let mut read = |set: &mut ExampleSet, prepared: &PreparedDataset| -> Result<(), TrainError> {
        let dataset = Dataset::open(&context.volumes.resolve(&prepared.uri)?, Some(&prepared.digest))?;
        set.append(&dataset, prepared.max_rows, &processor, &mut images, max_tokens)
    };
    let mut rows = ExampleSet::default();
    for prepared in &spec.datasets {
        read(&mut rows, prepared)?;
    }
    let mut sets = Vec::new();
    for prepared in &spec.evaluation_sets {
        let mut examples = ExampleSet::default();
        read(&mut examples, prepared)?;
        sets.push(EvaluationSet {
            name: prepared.name.clone(),
            examples,
        });
    }
    check(spec, &rows, &sets)?;
    Ok(Inputs {
        rows,
        sets,
        gallery: Gallery { processor, images },
        files: ModelFiles::read(base_dir)?,
    })
}

fn check(spec: &Train, rows: &ExampleSet, sets: &[EvaluationSet]) -> Result<(), TrainError> {
    let invalid = |what: String| Err(TrainError::Invalid(what));
    if rows.examples.is_empty() {
        return invalid("the training datasets have no rows".into());
    }
    let imitated = rows
        .examples
        .iter()
        .filter(|example| !example.completion.is_empty())
        .count();
    if spec.algorithm.sft.is_some() && imitated < rows.examples.len() {
        return invalid("sft needs instruction datasets: a row has no completion to imitate".into());
    }
    if spec.algorithm.grpo.is_some() && imitated > 0 {
        return invalid("grpo needs preference or exactMatch datasets: a row has a completion to imitate".into());
    }
    for set in sets {
        if set.examples.examples.iter().any(|example| example.target.is_none()) {
            return invalid(format!(
                "evaluation set {}: a row has no answer to compare with",
                set.name
            ));
        }
    }
    match &spec.guard {
        Some(guard) if !sets.iter().any(|set| set.name == guard.set) => invalid(format!(
            "guard.set {:?} is not an evaluation set of this job",
            guard.set
        )),
        _ => Ok(()),
    }
}

fn algorithm_parts(spec: &Train) -> Result<(&[flotilla_api::algorithm::Module], &Optimizer), TrainError> {
    match (&spec.algorithm.grpo, &spec.algorithm.sft) {
        (Some(grpo), None) => Ok((&grpo.freeze, &grpo.optimizer)),
        (None, Some(sft)) => Ok((&sft.freeze, &sft.optimizer)),
        _ => Err(TrainError::Invalid(
            "algorithm takes exactly one of grpo and sft".into(),
        )),
    }
}

fn steps_of<'a>(
    spec: &Train,
    inputs: &'a Inputs,
    base: &'a Vlm,
    fleet: Option<&'a Fleet>,
) -> Result<Steps<'a>, TrainError> {
    if let Some(sft) = &spec.algorithm.sft {
        return Ok(Steps::Sft(SftSteps {
            spec: sft.clone(),
            rows: &inputs.rows,
            gallery: &inputs.gallery,
            seed: spec.seed,
        }));
    }
    let grpo = spec.algorithm.grpo.clone().unwrap_or_default();
    Ok(Steps::Grpo(GrpoSteps {
        reference: (grpo.kl_coefficient > 0.0).then_some(base),
        spec: grpo,
        terms: terms(&spec.rewards)?,
        rows: &inputs.rows,
        gallery: &inputs.gallery,
        seed: spec.seed,
        fleet,
    }))
}

/// Features of every picture of the run, where the vision tower is frozen and they are not too large.
fn known_features(learner: &Learner, inputs: &Inputs, threads: usize) -> Result<Option<Features>, TrainError> {
    if !learner.vision_is_frozen() {
        return Ok(None);
    }
    let sets: Vec<&ExampleSet> = std::iter::once(&inputs.rows)
        .chain(inputs.sets.iter().map(|set| &set.examples))
        .collect();
    let names: BTreeSet<String> = sets.iter().flat_map(|set| set.image_names()).collect();
    let longest = sets
        .iter()
        .flat_map(|set| &set.examples)
        .flat_map(|example| example.prompt.spans.iter().map(|(_, tokens)| *tokens))
        .max()
        .unwrap_or(0);
    let bytes = names.len() * longest * learner.model.config().text.hidden_size * 4;
    if bytes > MAX_KEPT_FEATURE_BYTES {
        tracing::info!(bytes, "image features are computed with each step: too large to keep");
        return Ok(None);
    }
    Ok(Some(encode(
        &learner.model,
        &inputs.gallery,
        &names,
        Pass::Infer,
        threads,
    )?))
}

/// A run on its way.
struct Runner<'a> {
    context: &'a Context,
    spec: &'a Train,
    run: RunDir,
    inputs: &'a Inputs,
    fleet: Option<&'a Fleet>,
    steps: Steps<'a>,
    known: Option<&'a Features>,
    learner: Learner,
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

impl Runner<'_> {
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
        let metrics = match &self.steps {
            Steps::Sft(sft) => sft.step(&mut self.learner, self.known, step)?,
            Steps::Grpo(grpo) => grpo.step(&mut self.learner, self.known, step, self.cancelled)?,
        };
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
        for set in &self.inputs.sets {
            let score = self.score(set, step)?;
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

    fn score(&self, set: &EvaluationSet, step: u32) -> Result<Score, TrainError> {
        let fresh = match self.known {
            Some(_) => Features::new(),
            None => {
                let names = set.examples.image_names();
                encode(
                    &self.learner.model,
                    &self.inputs.gallery,
                    &names,
                    Pass::Infer,
                    self.learner.threads,
                )?
            }
        };
        let rollout = Rollout {
            model: &self.learner.model,
            features: self.known.unwrap_or(&fresh),
            tokenizer: self.inputs.gallery.processor.tokenizer(),
            threads: self.learner.threads,
            remote: self.fleet.map(|fleet| Remote { fleet, step }),
            cancelled: self.cancelled,
        };
        evaluate(rollout, set, step, self.longest_answer())
    }

    fn longest_answer(&self) -> usize {
        match &self.steps {
            Steps::Grpo(grpo) => grpo.spec.max_completion_tokens as usize,
            Steps::Sft(sft) => {
                let longest = sft.rows.examples.iter().map(|example| example.completion.len()).max();
                longest.unwrap_or(0) + SFT_ANSWER_MARGIN
            }
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
        let published = checkpoint::write(&self.run, &self.inputs.files, &self.learner, &self.position)?;
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
