//! `spec.activeDeadlineSeconds`: time since the first pod or the last resumption, as in a Kubernetes Job.

use flotilla_api::names::{condition, reason};
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::{decide::Decision, gather::Observed};
use crate::{conditions::find, text};

/// When an active job runs out of time; None for one that has no limit, is suspended, waits or is finished.
pub fn ends(observed: &Observed) -> Option<Timestamp> {
    let limit = observed.job.spec.active_deadline_seconds?;
    if observed.job.spec.suspend || observed.is_finished() {
        return None;
    }
    let begun = observed.status.start_time.as_ref()?.0;
    let suspended = find(&observed.status.conditions, condition::SUSPENDED);
    // Suspension ends with this condition turning False; while it is still True the job is only about to resume.
    let resumed = match suspended {
        Some(condition) if condition.status == "True" => observed.now,
        Some(condition) => condition.last_transition_time.0,
        None => begun,
    };
    begun.max(resumed).checked_add(SignedDuration::from_secs(limit)).ok()
}

/// The end of a job that is past its deadline.
pub fn decide(observed: &Observed) -> Option<Decision> {
    let limit = observed.job.spec.active_deadline_seconds?;
    let ends = ends(observed)?;
    (ends <= observed.now).then(|| Decision::Fail {
        reason: reason::DEADLINE,
        message: format!(
            "active for more than activeDeadlineSeconds ({})",
            text::duration(u64::try_from(limit).unwrap_or_default())
        ),
    })
}
