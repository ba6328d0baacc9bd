//! When a run is over: its learner reached the goal, or said or showed that no new attempt can.

use super::decide::Decision;
use crate::attempt::Verdict;

/// The end of the run, if its pod is one. It outranks suspension: what is done is done.
pub fn decide(verdict: &Verdict) -> Option<Decision> {
    match verdict {
        Verdict::Done(exit) => Some(Decision::Complete(Box::new(exit.clone()))),
        Verdict::Fail { reason, message, .. } => Some(Decision::Fail {
            reason,
            message: message.clone(),
        }),
        Verdict::Start { .. } | Verdict::BackOff { .. } | Verdict::Wait => None,
    }
}
