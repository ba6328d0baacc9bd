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
mod rollout;
mod suspend;
mod ttl;
mod validate;

use std::{sync::Arc, time::Duration};

use flotilla_api::TrainingJob;
use kube::runtime::controller::Action;

use self::{
    apply::apply,
    build::build,
    decide::{Decision, decide},
    gather::{Observed, gather},
    rollout::Fleet,
    validate::validate,
};
use crate::{context::Context, error::Result, report::report as write, requeue};

/// One pass over one TrainingJob.
pub async fn reconcile(object: Arc<TrainingJob>, context: Arc<Context>) -> Result<Action> {
    // Reads (client required).
    let Some(observed) = gather(&context, &object).await? else {
        return Ok(Action::await_change());
    };
    // Decisions and objects (no client).
    let plan = validate(&observed);
    let decision = decide(&observed, plan.as_ref().err());
    let fleet = rollout::decide(&observed, &decision, plan.is_ok());
    let objects = build(
        &observed,
        &decision,
        &fleet,
        plan.as_ref().ok(),
        &context.config.worker_image,
    )?;
    // Writes (client required).
    let applied = apply(&context, &observed, objects).await?;
    if decision == Decision::Expire {
        return Ok(Action::await_change());
    }
    let (status, notes) = report::next_status(&observed, &decision, &fleet, &applied);
    write(&context, &observed.job, observed.job.status.as_ref(), &status, &notes).await?;
    Ok(next_look(&context, &observed, &decision, &fleet))
}

fn next_look(context: &Context, observed: &Observed, decision: &Decision, fleet: &Fleet) -> Action {
    let running = observed.pod.as_ref().filter(|pod| pod.is_running());
    let usual = match (decision, running) {
        (Decision::Watch, Some(pod)) => {
            let silence = context.workers.silence(&pod.uid);
            silence.unwrap_or(context.config.progress_interval)
        }
        _ => rests(context, observed, decision),
    };
    let others = [deadline::ends(observed), fleet.look_again];
    let soonest = others
        .into_iter()
        .flatten()
        .map(|at| requeue::until(at, observed.now))
        .min();
    Action::requeue(soonest.map_or(usual, |soonest| soonest.min(usual)))
}

/// When to look again at a job whose learner does not run.
fn rests(context: &Context, observed: &Observed, decision: &Decision) -> Duration {
    match decision {
        Decision::BackOff { until, .. } => requeue::until(*until, observed.now),
        Decision::Rest { expires: Some(at) } => requeue::until(*at, observed.now),
        Decision::Complete(_) | Decision::Fail { .. } => match ttl::due(&observed.job, observed.now) {
            Some(at) => requeue::until(at, observed.now),
            None => context.config.resync_interval,
        },
        Decision::Rest { expires: None }
        | Decision::Expire
        | Decision::Hold(_)
        | Decision::Suspend { .. }
        | Decision::Start { .. }
        | Decision::Watch => context.config.resync_interval,
    }
}

#[cfg(test)]
mod tests;
