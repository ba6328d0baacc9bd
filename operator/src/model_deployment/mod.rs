//! The ModelDeployment controller: `gather -> validate -> decide -> build -> apply -> report`.

mod apply;
mod build;
mod gather;
mod report;
mod rollout;
mod validate;

use std::sync::Arc;

use flotilla_api::ModelDeployment;
use kube::runtime::controller::Action;

use self::{
    apply::apply,
    build::build,
    gather::{Observed, gather},
    rollout::Rollout,
    validate::{Plan, validate},
};
use crate::{context::Context, error::Result, report::report as write, requeue};

/// One pass over one ModelDeployment.
pub async fn reconcile(object: Arc<ModelDeployment>, context: Arc<Context>) -> Result<Action> {
    // Reads (client required).
    let Some(observed) = gather(&context, &object).await? else {
        return Ok(Action::await_change());
    };
    // Decisions and objects (no client).
    let plan = validate(&observed);
    let rollout = decide(&observed, plan.as_ref().ok());
    let objects = build(&observed, &rollout, plan.as_ref().ok(), &context.config.worker_image)?;
    // Writes (client required).
    let applied = Box::pin(apply(&context, &observed, objects)).await?;
    // A last read: what the ready pods loaded, asked once per revision.
    let digest = gather::digest(&context, &observed, plan.as_ref().ok()).await?;
    let news = report::News {
        plan: plan.as_ref(),
        rollout: &rollout,
        applied: &applied,
        digest,
    };
    let (status, notes) = report::next_status(&observed, &news);
    write(
        &context,
        &observed.deployment,
        observed.deployment.status.as_ref(),
        &status,
        &notes,
    )
    .await?;
    let asks_again = status.ready_replicas > 0 && status.model_digest.is_none();
    let usual = if asks_again {
        context.config.progress_interval
    } else {
        context.config.resync_interval
    };
    let deadline = rollout.look_again.map(|at| requeue::until(at, observed.now));
    Ok(Action::requeue(deadline.map_or(usual, |deadline| deadline.min(usual))))
}

/// Without a plan the pods that run are left as they are, except that a deployment can always be made smaller.
fn decide(observed: &Observed, plan: Option<&Plan>) -> Rollout {
    let replicas = usize::try_from(observed.deployment.spec.replicas).unwrap_or(0);
    match plan {
        Some(plan) => rollout::decide(
            &rollout::Wanted {
                replicas,
                revision: &plan.revision,
                stem: &observed.stem,
                startup_deadline: observed.deployment.spec.startup_deadline_seconds,
                now: observed.now,
            },
            &observed.pods,
        ),
        None if replicas == 0 => Rollout::nothing_but(&observed.pods),
        None => Rollout::default(),
    }
}
