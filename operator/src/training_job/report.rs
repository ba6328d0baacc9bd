//! What a TrainingJob's status says after a pass.

use flotilla_api::{
    TrainingJobStatus,
    evaluation::Score,
    names::{condition, reason},
    progress::{Progress, Stage},
    training_job::{TrainingPhase, TrainingProgress},
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::{
    apply::Applied,
    decide::Decision,
    gather::Observed,
    rollout::{self, Fleet},
};
use crate::{
    conditions::Conditions,
    pod_view::{PodStage, PodView},
    refusal::Refusal,
    report::Note,
    text,
};

/// The next status and the events that the change is worth.
pub fn next_status(
    observed: &Observed,
    decision: &Decision,
    fleet: &Fleet,
    applied: &Applied,
) -> (TrainingJobStatus, Vec<Note>) {
    let mut status = observed.status.clone();
    status.observed_generation = observed.job.metadata.generation;
    status.rollout = rollout::status(observed, fleet);
    let mut notes: Vec<Note> = applied
        .registered
        .iter()
        .map(|name| {
            Note::normal(reason::CHECKPOINT, format!("ModelCheckpoint {name} was registered"))
                .about("ModelCheckpoint", name)
        })
        .collect();
    if let Some(progress) = observed.news() {
        record(&mut status, observed, progress);
    }
    if let Some(last) = &applied.last {
        status.last_checkpoint = Some(last.clone());
    }
    notes.extend(replaced(fleet));
    notes.extend(match decision {
        Decision::Rest { .. } | Decision::Expire => None,
        Decision::Hold(refusal) => hold(&mut status, observed, refusal),
        Decision::Suspend { .. } => suspend(&mut status, observed),
        Decision::Start {
            attempt,
            restarts,
            cause,
        } => {
            let fresh = fleet.create.len() - fleet.lost.len();
            Some(start(
                &mut status,
                observed,
                (*attempt, *restarts),
                fresh,
                cause.as_deref(),
            ))
        }
        Decision::BackOff { cause, .. } => {
            enter(
                &mut status,
                TrainingPhase::Restarting,
                &format!("waiting to replace a pod: {cause}"),
            );
            running(&mut status, observed, false, reason::RESTARTED, cause);
            None
        }
        Decision::Watch => {
            watch(&mut status, observed, fleet);
            None
        }
        Decision::Complete(_) => Some(complete(&mut status, observed)),
        Decision::Fail { reason, message } => Some(fail(&mut status, observed, reason, message)),
    });
    (status, notes)
}

/// One event about all rollout pods that were replaced in this pass.
fn replaced(fleet: &Fleet) -> Option<Note> {
    let first = fleet.lost.first()?;
    let others = match fleet.lost.len() - 1 {
        0 => String::new(),
        count => format!(" (and {count} more)"),
    };
    let text = format!("a rollout pod takes the place of {first}{others}; the learner goes on");
    Some(Note::warning(reason::ROLLOUT_REPLACED, text))
}

fn enter(status: &mut TrainingJobStatus, phase: TrainingPhase, message: &str) {
    status.phase = phase;
    status.message = message.to_owned();
}

fn conditions<'a>(status: &'a mut TrainingJobStatus, observed: &Observed) -> Conditions<'a> {
    Conditions::new(&mut status.conditions, observed.job.metadata.generation, observed.now)
}

fn running(status: &mut TrainingJobStatus, observed: &Observed, holds: bool, reason: &str, message: &str) {
    conditions(status, observed).set(condition::RUNNING, holds, reason, message);
}

fn hold(status: &mut TrainingJobStatus, observed: &Observed, refusal: &Refusal) -> Option<Note> {
    let invalid = refusal.reason == reason::INVALID_SPEC;
    let news = invalid && status.message != refusal.message;
    enter(status, TrainingPhase::Waiting, &refusal.message);
    not_suspended(status, observed);
    conditions(status, observed).set(condition::READY, false, refusal.reason, &refusal.message);
    running(status, observed, false, refusal.reason, "");
    news.then(|| Note::warning(refusal.reason, &refusal.message))
}

fn suspend(status: &mut TrainingJobStatus, observed: &Observed) -> Option<Note> {
    let known = crate::conditions::holds(&status.conditions, condition::SUSPENDED);
    if observed.pod.as_ref().is_some_and(|pod| pod.exit().is_none()) {
        enter(
            status,
            TrainingPhase::Suspending,
            "the learner writes a checkpoint and stops",
        );
    } else {
        enter(status, TrainingPhase::Suspended, "");
    }
    let mut conditions = conditions(status, observed);
    conditions.set(condition::SUSPENDED, true, reason::SUSPENDED, "");
    conditions.set(condition::RUNNING, false, reason::SUSPENDED, "");
    (!known).then(|| Note::normal(reason::SUSPENDED, "the run was suspended"))
}

/// Turns Suspended off where it is on; a job that never was suspended has no such condition.
fn not_suspended(status: &mut TrainingJobStatus, observed: &Observed) {
    if crate::conditions::holds(&status.conditions, condition::SUSPENDED) {
        conditions(status, observed).set(condition::SUSPENDED, false, reason::RESUMED, "");
    }
}

fn start(
    status: &mut TrainingJobStatus,
    observed: &Observed,
    counters: (u32, u32),
    fresh: usize,
    cause: Option<&str>,
) -> Note {
    let resumed = crate::conditions::holds(&status.conditions, condition::SUSPENDED);
    not_suspended(status, observed);
    (status.attempt, status.restarts) = counters;
    status.start_time.get_or_insert(Time(observed.now));
    let name = observed.names.pod(status.attempt);
    let made = match fresh {
        0 => format!("pod {name} was created"),
        count => format!("pod {name} and {count} rollout pods were created"),
    };
    let (phase, why, message) = match cause {
        None => (TrainingPhase::Starting, reason::PODS_CREATED, made),
        Some(_) if resumed => (
            TrainingPhase::Starting,
            reason::RESUMED,
            format!("pod {name} continues the run"),
        ),
        Some(cause) => (
            TrainingPhase::Restarting,
            reason::RESTARTED,
            format!("pod {name} continues the run, since {cause}"),
        ),
    };
    enter(status, phase, &message);
    let mut conditions = conditions(status, observed);
    conditions.set(condition::READY, true, "Resolved", "");
    conditions.set(condition::PODS_SCHEDULED, false, "Unscheduled", "");
    conditions.set(condition::MODEL_LOADED, false, why, "");
    conditions.set(condition::RUNNING, false, why, "");
    let note = if phase == TrainingPhase::Restarting {
        Note::warning(why, message)
    } else {
        Note::normal(why, message)
    };
    note.about("Pod", name)
}

fn watch(status: &mut TrainingJobStatus, observed: &Observed, fleet: &Fleet) {
    let Some(pod) = &observed.pod else { return };
    not_suspended(status, observed);
    if pod.terminating {
        enter(status, TrainingPhase::Restarting, "its pod was asked to stop");
        return running(status, observed, false, "PodTerminating", "");
    }
    match &pod.stage {
        PodStage::Pending { scheduled, message } => pending(status, observed, *scheduled, message.as_deref()),
        PodStage::Running => trains(status, observed, fleet),
        PodStage::Exited(_) => {}
    }
}

fn pending(status: &mut TrainingJobStatus, observed: &Observed, scheduled: bool, message: Option<&str>) {
    if let Some(message) = message {
        status.message = format!("its pod waits: {message}");
    }
    let why = if scheduled { "Scheduled" } else { "Unscheduled" };
    conditions(status, observed).set(condition::PODS_SCHEDULED, scheduled, why, message.unwrap_or_default());
}

fn trains(status: &mut TrainingJobStatus, observed: &Observed, fleet: &Fleet) {
    let scheduled = |pod: &&PodView| !matches!(pod.stage, PodStage::Pending { scheduled: false, .. });
    let placed = observed
        .rollout
        .iter()
        .filter(|pod| pod.is_live())
        .filter(scheduled)
        .count();
    if placed < usize::try_from(fleet.wanted).unwrap_or(usize::MAX) {
        let message = status
            .rollout
            .as_ref()
            .map(|rollout| rollout.message.clone())
            .unwrap_or_default();
        conditions(status, observed).set(condition::PODS_SCHEDULED, false, "Unscheduled", &message);
    } else {
        conditions(status, observed).set(condition::PODS_SCHEDULED, true, "Scheduled", "");
    }
    // A worker that does not answer for a moment stays what it was.
    let Some(live) = &observed.live else { return };
    match live.stage {
        Stage::Starting | Stage::Loading => {
            if status.phase != TrainingPhase::Restarting {
                status.phase = TrainingPhase::Starting;
            }
            status.message = "the model is being loaded".to_owned();
            conditions(status, observed).set(condition::MODEL_LOADED, false, "Loading", "");
        }
        Stage::Running | Stage::Stopping | Stage::Suspended | Stage::Completed => {
            enter(status, TrainingPhase::Running, &live.message);
            let mut conditions = conditions(status, observed);
            conditions.set(condition::MODEL_LOADED, true, "Loaded", "");
            conditions.set(condition::RUNNING, true, "Training", "");
        }
        Stage::Failed => status.message.clone_from(&live.message),
    }
}

fn complete(status: &mut TrainingJobStatus, observed: &Observed) -> Note {
    let message = observed
        .news()
        .map(|progress| progress.message.clone())
        .unwrap_or_default();
    enter(status, TrainingPhase::Complete, &message);
    status.completion_time = Some(Time(observed.now));
    if let Some(progress) = &mut status.progress {
        progress.eta = None;
    }
    let mut conditions = conditions(status, observed);
    conditions.set(condition::COMPLETE, true, reason::COMPLETED, &message);
    conditions.set(condition::RUNNING, false, reason::COMPLETED, "");
    Note::normal(reason::COMPLETED, "the run reached its goal")
}

fn fail(status: &mut TrainingJobStatus, observed: &Observed, why: &'static str, message: &str) -> Note {
    enter(status, TrainingPhase::Failed, message);
    status.completion_time = Some(Time(observed.now));
    if let Some(progress) = &mut status.progress {
        progress.eta = None;
    }
    let mut conditions = conditions(status, observed);
    conditions.set(condition::FAILED, true, why, message);
    conditions.set(condition::RUNNING, false, why, "");
    Note::warning(why, message)
}

/// Takes over what the learner says; what it leaves out (a cut termination message, a worker that only starts) stays.
fn record(status: &mut TrainingJobStatus, observed: &Observed, news: &Progress) {
    if !news.initial_scores.is_empty() {
        status.initial_scores.clone_from(&news.initial_scores);
    }
    if !news.scores.is_empty() {
        status.scores.clone_from(&news.scores);
    }
    if news.total_steps == 0 {
        return;
    }
    let known = status.progress.clone().unwrap_or_default();
    let metric = |name: &str, digits: usize| news.metrics.get(name).map(|value| format!("{value:.digits$}"));
    let running = observed.pod.as_ref().is_some_and(PodView::is_running);
    let mut next = TrainingProgress {
        step: news.step,
        total_steps: news.total_steps,
        steps: format!("{}/{}", news.step, news.total_steps),
        reward: metric("reward/overall", 2).or(known.reward.clone()),
        loss: metric("loss", 4).or(known.loss.clone()),
        accuracy: accuracy(observed, &status.scores).or(known.accuracy.clone()),
        kl: metric("actor/kl_loss", 4).or(known.kl.clone()),
        eta: news.eta_seconds.filter(|_| running).map(text::duration),
        last_update_time: known.last_update_time.clone(),
    };
    if next != known {
        next.last_update_time = Some(Time(observed.now));
    }
    status.progress = Some(next);
}

/// Newest accuracy of the first evaluation set.
fn accuracy(observed: &Observed, scores: &[Score]) -> Option<String> {
    let first = observed.job.spec.evaluation.as_ref()?.sets.first()?;
    let of_first = scores.iter().filter(|score| score.set == first.name);
    of_first
        .max_by_key(|score| score.step)
        .map(|score| text::percent(score.accuracy))
}
