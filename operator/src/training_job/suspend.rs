//! `spec.suspend`: the learner is stopped by SIGTERM and has its grace period to write a checkpoint.

use super::{decide::Decision, gather::Observed};
use crate::pod_view::PodView;

/// Suspension, if it is asked for. It is no failure and counts as none.
pub fn decide(observed: &Observed) -> Option<Decision> {
    observed.job.spec.suspend.then(|| Decision::Suspend {
        stop: observed.pod.as_ref().is_some_and(PodView::is_live),
    })
}
