//! The ModelCheckpoint controller: weights that a job produced are available at once, imported ones are read by a pod first.

mod gather;
mod report;
mod validate;

use std::sync::Arc;

use flotilla_api::{ModelCheckpoint, model_checkpoint::CheckpointPhase};
use kube::runtime::controller::Action;

use self::{
    gather::{Observed, gather},
    validate::validate,
};
use crate::{
    attempt::{Verdict, judge},
    context::Context,
    error::Result,
    refusal::Refusal,
    report::report as write,
    requeue,
    run_pod::Run,
};

/// Seconds that a verification has to stop; it keeps nothing.
const GRACE_SECONDS: i64 = 5;

/// What a pass does about a ModelCheckpoint.
#[derive(Clone, Debug, PartialEq)]
enum Decision {
    /// It is Available or Refused, for good.
    Rest,
    /// Its digest was computed by the learner that wrote it.
    Trust,
    /// Its spec cannot be acted on.
    Hold(Refusal),
    /// What follows from its verification pod.
    Run(Verdict),
}

/// One pass over one ModelCheckpoint.
pub async fn reconcile(object: Arc<ModelCheckpoint>, context: Arc<Context>) -> Result<Action> {
    let Some(observed) = gather(&context, &object).await? else {
        return Ok(Action::await_change());
    };
    let plan = validate(&observed);
    let decision = decide(&observed, plan.as_ref().err());
    if let (Decision::Run(Verdict::Start { attempt, .. }), Ok(config)) = (&decision, &plan) {
        let run = Run {
            owner: &observed.owner,
            names: &observed.names,
            config,
            settings: &observed.checkpoint.spec.verify,
            default_image: &context.config.worker_image,
            attempt: *attempt,
            grace_seconds: GRACE_SECONDS,
        };
        Box::pin(run.build()?.apply(&context, &observed.owner)).await?;
    }
    let (status, notes) = report::next_status(&observed, &decision);
    write(
        &context,
        &observed.checkpoint,
        observed.checkpoint.status.as_ref(),
        &status,
        &notes,
    )
    .await?;
    Ok(match &decision {
        Decision::Run(Verdict::BackOff { until, .. }) => requeue::at(*until, observed.now),
        Decision::Rest | Decision::Trust | Decision::Hold(_) | Decision::Run(_) => context.resync(),
    })
}

fn decide(observed: &Observed, refusal: Option<&Refusal>) -> Decision {
    if matches!(
        observed.status.phase,
        CheckpointPhase::Available | CheckpointPhase::Refused
    ) {
        return Decision::Rest;
    }
    if observed.checkpoint.spec.produced_by.is_some() {
        return Decision::Trust;
    }
    match (judge(observed.attempts(), observed.pod.as_ref(), observed.now), refusal) {
        (Verdict::Start { .. }, Some(refusal)) => Decision::Hold(refusal.clone()),
        (verdict, _) => Decision::Run(verdict),
    }
}

#[cfg(test)]
mod tests;
