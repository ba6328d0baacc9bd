//! What a ModelCheckpoint's status says after a pass.

use flotilla_api::{
    ModelCheckpointStatus,
    model_checkpoint::CheckpointPhase,
    names::{condition, reason},
};

use super::{Decision, gather::Observed};
use crate::{attempt::Verdict, conditions::Conditions, pod_view::PodStage, report::Note, text};

/// The next status and the events that the change is worth.
pub fn next_status(observed: &Observed, decision: &Decision) -> (ModelCheckpointStatus, Vec<Note>) {
    let mut status = observed.status.clone();
    status.observed_generation = observed.checkpoint.metadata.generation;
    let size = observed
        .checkpoint
        .spec
        .size_bytes
        .and_then(|size| u64::try_from(size).ok());
    status.size = size.map(text::bytes);
    let notes = match decision {
        Decision::Rest => Vec::new(),
        Decision::Trust => {
            settle(&mut status, observed, CheckpointPhase::Available, ("Produced", ""));
            Vec::new()
        }
        Decision::Hold(refusal) => {
            let text = (refusal.reason, refusal.message.as_str());
            settle(&mut status, observed, CheckpointPhase::Pending, text);
            Vec::new()
        }
        Decision::Run(verdict) => run(&mut status, observed, verdict),
    };
    (status, notes)
}

fn run(status: &mut ModelCheckpointStatus, observed: &Observed, verdict: &Verdict) -> Vec<Note> {
    match verdict {
        Verdict::Start { attempt, cause, .. } => {
            status.attempt = *attempt;
            let why = cause.as_deref().unwrap_or_default();
            settle(
                status,
                observed,
                CheckpointPhase::Verifying,
                (reason::PODS_CREATED, why),
            );
            Vec::new()
        }
        Verdict::BackOff { cause, .. } => {
            status.message = format!("waiting to verify again: {cause}");
            Vec::new()
        }
        Verdict::Wait => {
            if let Some(PodStage::Pending {
                message: Some(text), ..
            }) = observed.pod.as_ref().map(|pod| &pod.stage)
            {
                status.message = format!("its verification waits: {text}");
            }
            Vec::new()
        }
        Verdict::Done(_) => {
            settle(status, observed, CheckpointPhase::Available, ("Verified", ""));
            vec![Note::normal("Verified", "files and digest agree")]
        }
        Verdict::Fail { message, .. } => {
            settle(
                status,
                observed,
                CheckpointPhase::Refused,
                (reason::DIGEST_MISMATCH, message),
            );
            vec![Note::warning(reason::DIGEST_MISMATCH, message)]
        }
    }
}

fn settle(status: &mut ModelCheckpointStatus, observed: &Observed, phase: CheckpointPhase, why: (&str, &str)) {
    let (reason, message) = why;
    status.phase = phase;
    status.message = message.to_owned();
    let generation = observed.checkpoint.metadata.generation;
    let mut conditions = Conditions::new(&mut status.conditions, generation, observed.now);
    conditions.set(condition::READY, phase == CheckpointPhase::Available, reason, message);
}
