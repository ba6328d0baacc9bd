//! The TrainingJob controller: `gather -> validate -> decide -> build -> apply -> report`.

mod apply;
mod build;
mod checkpoints;
mod completion;
mod deadline;
mod decide;
mod gather;
mod report;
mod restart;
mod suspend;
mod ttl;
mod validate;

use std::sync::Arc;

use flotilla_api::TrainingJob;
use k8s_openapi::jiff::SignedDuration;
use kube::runtime::controller::Action;

use self::{
    apply::apply,
    build::build,
    decide::{Decision, decide},
    gather::{Observed, gather},
    validate::validate,
};
use crate::{context::Context, error::Result, pod_view::PodView, report::report as write, requeue};

/// One pass over one TrainingJob.
pub async fn reconcile(object: Arc<TrainingJob>, context: Arc<Context>) -> Result<Action> {
    // Reads (client required).
    let Some(observed) = gather(&context, &object).await? else {
        return Ok(Action::await_change());
    };
    // Decisions and objects (no client).
    let plan = validate(&observed);
    let decision = decide(&observed, plan.as_ref().err());
    let objects = build(&observed, &decision, plan.as_ref().ok(), &context.config.worker_image)?;
    // Writes (client required).
    let applied = apply(&context, &observed, objects).await?;
    if decision == Decision::Expire {
        return Ok(Action::await_change());
    }
    let (status, notes) = report::next_status(&observed, &decision, &applied);
    write(&context, &observed.job, observed.job.status.as_ref(), &status, &notes).await?;
    Ok(next_look(&context, &observed, &decision))
}

fn next_look(context: &Context, observed: &Observed, decision: &Decision) -> Action {
    let usual = match decision {
        Decision::Watch if observed.pod.as_ref().is_some_and(PodView::is_running) => context.config.progress_interval,
        Decision::BackOff { until, .. } => requeue::until(*until, observed.now),
        Decision::Rest { expires: Some(at) } => requeue::until(*at, observed.now),
        Decision::Complete(_) | Decision::Fail { .. } => match ttl::expires_after(&observed.job) {
            Some(after) => requeue::until(observed.now + SignedDuration::from_secs(after), observed.now),
            None => context.config.resync_interval,
        },
        Decision::Rest { expires: None }
        | Decision::Expire
        | Decision::Hold(_)
        | Decision::Suspend { .. }
        | Decision::Start { .. }
        | Decision::Watch => context.config.resync_interval,
    };
    let deadline = deadline::ends(observed).map(|at| requeue::until(at, observed.now));
    Action::requeue(deadline.map_or(usual, |deadline| deadline.min(usual)))
}

#[cfg(test)]
mod tests;
