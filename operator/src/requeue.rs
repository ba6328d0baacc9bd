//! When to look again.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::runtime::controller::Action;

/// Shortest wait, so that a clock that runs behind does not make a busy loop.
const SHORTEST: Duration = Duration::from_millis(50);

/// Looks again at `time`.
pub fn at(time: Timestamp, now: Timestamp) -> Action {
    Action::requeue(until(time, now))
}

/// Time from `now` until `time`.
pub fn until(time: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(time.duration_since(now))
        .unwrap_or_default()
        .max(SHORTEST)
}
