//! What a Dataset's status says after a pass.

use flotilla_api::{
    DatasetStatus,
    dataset::DatasetPhase,
    names::{condition, reason},
    progress::ConversionReport,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::{Decision, gather::Observed};
use crate::{
    attempt::Verdict,
    conditions::Conditions,
    pod_view::{Exit, PodStage},
    refusal::Refusal,
    report::Note,
};

/// The next status and the events that the change is worth.
pub fn next_status(observed: &Observed, decision: &Decision) -> (DatasetStatus, Vec<Note>) {
    let mut status = observed.status.clone();
    status.observed_generation = observed.dataset.metadata.generation;
    let notes = match decision {
        Decision::Rest => Vec::new(),
        Decision::Hold(refusal) => hold(&mut status, observed, refusal),
        Decision::Run(verdict) => run(&mut status, observed, verdict),
    };
    (status, notes)
}

fn hold(status: &mut DatasetStatus, observed: &Observed, refusal: &Refusal) -> Vec<Note> {
    let news = status.message != refusal.message;
    status.phase = DatasetPhase::Pending;
    status.message.clone_from(&refusal.message);
    conditions(status, observed).set(condition::READY, false, refusal.reason, &refusal.message);
    if news {
        return vec![Note::warning(refusal.reason, &refusal.message)];
    }
    Vec::new()
}

fn run(status: &mut DatasetStatus, observed: &Observed, verdict: &Verdict) -> Vec<Note> {
    match verdict {
        Verdict::Start {
            attempt,
            restarts,
            cause,
        } => start(status, observed, (*attempt, *restarts), cause.as_deref()),
        Verdict::BackOff { cause, .. } => {
            status.message = format!("waiting to replace a pod: {cause}");
            Vec::new()
        }
        Verdict::Wait => {
            wait(status, observed);
            Vec::new()
        }
        Verdict::Done(exit) => match exit.progress.as_ref().and_then(|progress| progress.conversion.clone()) {
            Some(report) => ready(status, observed, report),
            None => failed(
                status,
                observed,
                reason::PERMANENT_FAILURE,
                "the worker left no counts",
                exit,
            ),
        },
        Verdict::Fail { reason, message, exit } => failed(status, observed, reason, message, exit),
    }
}

fn start(status: &mut DatasetStatus, observed: &Observed, counters: (u32, u32), cause: Option<&str>) -> Vec<Note> {
    (status.attempt, status.restarts) = counters;
    let name = observed.names.pod(status.attempt);
    status.phase = DatasetPhase::Pending;
    let (message, note) = match cause {
        None => (
            "its pod starts".to_owned(),
            Note::normal(reason::PODS_CREATED, format!("pod {name} was created")),
        ),
        Some(cause) => (
            format!("its pod was replaced: {cause}"),
            Note::warning(reason::RESTARTED, format!("pod {name} was created, since {cause}")),
        ),
    };
    status.message = message;
    conditions(status, observed).set(condition::READY, false, reason::PODS_CREATED, "");
    vec![note.about("Pod", name)]
}

fn wait(status: &mut DatasetStatus, observed: &Observed) {
    match observed.pod.as_ref().map(|pod| &pod.stage) {
        Some(PodStage::Pending {
            message: Some(message), ..
        }) => status.message = format!("its pod waits: {message}"),
        Some(PodStage::Running) => {
            status.phase = DatasetPhase::Preparing;
            status.message = "rows are being converted".to_owned();
        }
        _ => {}
    }
}

fn ready(status: &mut DatasetStatus, observed: &Observed, report: ConversionReport) -> Vec<Note> {
    status.phase = DatasetPhase::Ready;
    status.message = match report.bad_records {
        0 => String::new(),
        bad => format!("{bad} of {} rows were left out", report.rows_in),
    };
    status.completion_time = Some(Time(observed.now));
    let text = format!(
        "{} rows in, {} out, {} bad",
        report.rows_in, report.rows_out, report.bad_records
    );
    status.report = Some(report);
    let mut conditions = conditions(status, observed);
    conditions.set(condition::READY, true, reason::COMPLETED, &text);
    conditions.set(condition::FAILED, false, reason::COMPLETED, "");
    vec![Note::normal(reason::COMPLETED, text)]
}

fn failed(status: &mut DatasetStatus, observed: &Observed, why: &str, message: &str, exit: &Exit) -> Vec<Note> {
    let report = exit.progress.as_ref().and_then(|progress| progress.conversion.clone());
    let limit = observed.dataset.spec.conversion.max_bad_records;
    let too_many = report.as_ref().is_some_and(|report| report.bad_records > limit);
    let why = match (too_many, why) {
        (true, _) => reason::TOO_MANY_BAD_RECORDS,
        (false, reason::RESTART_LIMIT) => reason::RESTART_LIMIT,
        (false, _) => reason::PERMANENT_FAILURE,
    };
    status.phase = DatasetPhase::Failed;
    status.message = message.to_owned();
    status.completion_time = Some(Time(observed.now));
    status.report = report.or_else(|| status.report.take());
    let mut conditions = conditions(status, observed);
    conditions.set(condition::READY, false, why, message);
    conditions.set(condition::FAILED, true, why, message);
    vec![Note::warning(why, message)]
}

fn conditions<'a>(status: &'a mut DatasetStatus, observed: &Observed) -> Conditions<'a> {
    Conditions::new(
        &mut status.conditions,
        observed.dataset.metadata.generation,
        observed.now,
    )
}
