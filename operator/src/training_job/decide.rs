//! What a pass does about a TrainingJob: the policies in the order in which they outrank each other.

use k8s_openapi::jiff::Timestamp;

use super::{completion, deadline, gather::Observed, restart, rollout, suspend, ttl};
use crate::{pod_view::Exit, refusal::Refusal};

/// What a pass does about a TrainingJob.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// It is Complete or Failed, for good.
    Rest {
        /// When it is to be deleted.
        expires: Option<Timestamp>,
    },
    /// It is past its time to live.
    Expire,
    /// It waits for something, or its spec cannot be acted on.
    Hold(Refusal),
    /// It has no pod, or the pod is asked for a checkpoint and stopped.
    Suspend {
        /// The pod was not asked yet.
        stop: bool,
    },
    /// Make pod `attempt`.
    Start {
        /// Its number.
        attempt: u32,
        /// What the counter of failures is then.
        restarts: u32,
        /// Why the pod before it does not go on; None for the first one.
        cause: Option<String>,
    },
    /// Make a new pod, but not before `until`.
    BackOff {
        /// When.
        until: Timestamp,
        /// Why the pod before it does not go on.
        cause: String,
    },
    /// The learner starts, trains or stops.
    Watch,
    /// The goal is reached.
    Complete(Box<Exit>),
    /// The goal cannot be reached.
    Fail {
        /// Reason of the condition.
        reason: &'static str,
        /// Why, for people.
        message: String,
    },
}

/// Decides. `refusal` says why no pod can be made now; a pod that runs already goes on.
pub fn decide(observed: &Observed, refusal: Option<&Refusal>) -> Decision {
    if observed.is_finished() {
        return ttl::decide(observed);
    }
    let verdict = observed.verdict();
    completion::decide(&verdict)
        .or_else(|| deadline::decide(observed))
        .or_else(|| suspend::decide(observed))
        .or_else(|| rollout::failure(observed))
        .unwrap_or_else(|| restart::decide(verdict, refusal))
}
