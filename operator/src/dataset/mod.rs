//! The Dataset controller: `gather -> validate -> judge -> build -> apply -> report`.

mod build;
mod gather;
mod report;
mod validate;

use std::sync::Arc;

use flotilla_api::{Dataset, dataset::DatasetPhase};
use kube::runtime::controller::Action;

use self::{
    build::build,
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
};

/// What a pass does about a Dataset.
#[derive(Clone, Debug, PartialEq)]
enum Decision {
    /// It is Ready or Failed, for good.
    Rest,
    /// Its spec cannot be acted on.
    Hold(Refusal),
    /// What follows from its pod.
    Run(Verdict),
}

/// One pass over one Dataset.
pub async fn reconcile(object: Arc<Dataset>, context: Arc<Context>) -> Result<Action> {
    // Reads (client required).
    let Some(observed) = gather(&context, &object).await? else {
        return Ok(Action::await_change());
    };
    // Decisions (no client).
    let plan = validate(&observed);
    let decision = decide(&observed, plan.as_ref().err());
    // Writes (client required).
    if let (Decision::Run(Verdict::Start { attempt, .. }), Ok(plan)) = (&decision, &plan) {
        let objects = build(&observed, plan, *attempt, &context.config.worker_image)?;
        Box::pin(objects.apply(&context, &observed.owner)).await?;
    }
    let (status, notes) = report::next_status(&observed, &decision);
    write(
        &context,
        &observed.dataset,
        observed.dataset.status.as_ref(),
        &status,
        &notes,
    )
    .await?;
    Ok(match &decision {
        Decision::Run(Verdict::BackOff { until, .. }) => requeue::at(*until, observed.now),
        Decision::Rest | Decision::Hold(_) | Decision::Run(_) => context.resync(),
    })
}

fn decide(observed: &Observed, refusal: Option<&Refusal>) -> Decision {
    if matches!(observed.status.phase, DatasetPhase::Ready | DatasetPhase::Failed) {
        return Decision::Rest;
    }
    let verdict = judge(observed.attempts(), observed.pod.as_ref(), observed.now);
    match (verdict, refusal) {
        (Verdict::Start { .. }, Some(refusal)) => Decision::Hold(refusal.clone()),
        (verdict, _) => Decision::Run(verdict),
    }
}

#[cfg(test)]
mod tests;
