//! `spec.ttlSecondsAfterFinished`: counted from `status.completionTime`, and on the parent only, so that nothing makes a
//! deleted child again.

use flotilla_api::TrainingJob;
use k8s_openapi::jiff::SignedDuration;

use super::{decide::Decision, gather::Observed};

/// Seconds that a finished job is kept; None: for ever.
pub fn expires_after(job: &TrainingJob) -> Option<i64> {
    job.spec.ttl_seconds_after_finished
}

/// What becomes of a finished job.
pub fn decide(observed: &Observed) -> Decision {
    let completed = observed.status.completion_time.as_ref().map(|time| time.0);
    let ttl = expires_after(&observed.job).map(SignedDuration::from_secs);
    let expires = completed
        .zip(ttl)
        .and_then(|(completed, ttl)| completed.checked_add(ttl).ok());
    match expires {
        Some(at) if at <= observed.now => Decision::Expire,
        expires => Decision::Rest { expires },
    }
}
