//! `spec.ttlSecondsAfterFinished`: counted from `status.completionTime`, and on the parent only, so that nothing makes a
//! deleted child again.

use flotilla_api::TrainingJob;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::{decide::Decision, gather::Observed};

/// When a job that finished then is deleted; None: never, or beyond the calendar.
pub fn due(job: &TrainingJob, finished: Timestamp) -> Option<Timestamp> {
    let kept = job.spec.ttl_seconds_after_finished.map(SignedDuration::from_secs)?;
    finished.checked_add(kept).ok()
}

/// What becomes of a finished job.
pub fn decide(observed: &Observed) -> Decision {
    let completed = observed.status.completion_time.as_ref();
    let expires = completed.and_then(|completed| due(&observed.job, completed.0));
    match expires {
        Some(at) if at <= observed.now => Decision::Expire,
        expires => Decision::Rest { expires },
    }
}
