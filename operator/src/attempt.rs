//! One run, one pod at a time: when a pod is made, replaced or given up.
//!
//! Pods of a run are numbered. A pod's number is in its name, so making it twice is making it once; pods of other numbers
//! do not count. The counters move in the same status write that names the new pod, so an operator that dies between the
//! two makes the same decision again.

use flotilla_api::names::{exit, reason};
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::pod_view::{Exit, PodView};

/// Delay before the replacement of a pod that was taken away, and before that of the first that failed.
const FIRST_DELAY: SignedDuration = SignedDuration::from_secs(1);
/// Longest delay between two pods.
const LONGEST_DELAY: SignedDuration = SignedDuration::from_secs(60);

/// The counters of a run, as its status has them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Attempts {
    /// Number of the current pod; 0 before the first.
    pub current: u32,
    /// Pods that failed and were replaced.
    pub restarts: u32,
    /// Failed pods after which the run fails.
    pub max_restarts: u32,
}

/// What follows from the current pod.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
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
    /// The pod starts, works or stops: look again when it changes.
    Wait,
    /// The pod reached its goal.
    Done(Exit),
    /// No further pod.
    Fail {
        /// Reason of the condition.
        reason: &'static str,
        /// Why, for people.
        message: String,
        /// How the last pod ended.
        exit: Exit,
    },
}

/// Judges the current pod; `pod` is None where the API server has none of that number.
pub fn judge(attempts: Attempts, pod: Option<&PodView>, now: Timestamp) -> Verdict {
    let Some(pod) = pod else {
        return Verdict::Start {
            attempt: attempts.current + 1,
            restarts: attempts.restarts,
            cause: (attempts.current > 0).then(|| format!("pod {} is gone", attempts.current)),
        };
    };
    let Some(ended) = pod.exit() else {
        return Verdict::Wait;
    };
    match ended.code {
        // Without its last word the result is not known; a new attempt finds it on disk and says it again.
        Some(exit::OK) if ended.progress.is_some() => Verdict::Done(ended.clone()),
        Some(exit::PERMANENT) => Verdict::Fail {
            reason: reason::PERMANENT_FAILURE,
            message: ended.message(),
            exit: ended.clone(),
        },
        Some(exit::SUSPENDED) => replace(attempts, ended, now),
        _ if ended.disrupted || pod.terminating => replace(attempts, ended, now),
        _ => restart(attempts, ended, now),
    }
}

/// A pod that was taken away does not count.
fn replace(attempts: Attempts, ended: &Exit, now: Timestamp) -> Verdict {
    after(FIRST_DELAY, attempts.current + 1, attempts.restarts, ended, now)
}

/// A pod that failed counts, and the next one waits longer.
fn restart(attempts: Attempts, ended: &Exit, now: Timestamp) -> Verdict {
    if attempts.restarts >= attempts.max_restarts {
        return Verdict::Fail {
            reason: reason::RESTART_LIMIT,
            message: format!(
                "{} of at most {} restarts are used up; the last pod ended with {}",
                attempts.restarts,
                attempts.max_restarts,
                ended.message()
            ),
            exit: ended.clone(),
        };
    }
    let delay = FIRST_DELAY
        .checked_mul(1_i32 << attempts.restarts.min(6))
        .map_or(LONGEST_DELAY, |delay| delay.min(LONGEST_DELAY));
    after(delay, attempts.current + 1, attempts.restarts + 1, ended, now)
}

fn after(delay: SignedDuration, attempt: u32, restarts: u32, ended: &Exit, now: Timestamp) -> Verdict {
    let until = ended.at.map_or(now, |at| at.checked_add(delay).unwrap_or(now));
    let cause = ended.message();
    if until > now {
        return Verdict::BackOff { until, cause };
    }
    Verdict::Start {
        attempt,
        restarts,
        cause: Some(cause),
    }
}

#[cfg(test)]
mod tests {
    use flotilla_api::progress::Progress;
    use proptest::prelude::*;

    use super::*;
    use crate::pod_view::PodStage;

    pub(crate) fn pod(stage: PodStage) -> PodView {
        PodView {
            name: "a-train-1".into(),
            uid: "u".into(),
            attempt: 1,
            index: None,
            revision: String::new(),
            ip: None,
            created: Timestamp::UNIX_EPOCH,
            terminating: false,
            ready: false,
            ready_since: None,
            container_restarts: 0,
            crash_loops: false,
            stage,
            crash: None,
        }
    }

    fn ended(code: Option<i32>) -> Exit {
        Exit {
            code,
            disrupted: false,
            at: Some(Timestamp::UNIX_EPOCH),
            progress: Some(Box::default()),
            reason: String::new(),
        }
    }

    fn later(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).expect("in range")
    }

    const FIRST: Attempts = Attempts {
        current: 1,
        restarts: 0,
        max_restarts: 2,
    };

    #[test]
    fn a_run_without_a_pod_starts_with_number_one() {
        let none = Attempts { current: 0, ..FIRST };
        assert!(matches!(
            judge(none, None, later(0)),
            Verdict::Start {
                attempt: 1,
                restarts: 0,
                cause: None
            }
        ));
    }

    #[test]
    fn a_pod_that_vanished_is_replaced_and_not_counted() {
        assert!(matches!(
            judge(FIRST, None, later(0)),
            Verdict::Start {
                attempt: 2,
                restarts: 0,
                cause: Some(_)
            }
        ));
    }

    #[test]
    fn a_killed_pod_is_replaced_after_a_delay_that_doubles() {
        let pod = pod(PodStage::Exited(ended(Some(137))));
        assert!(matches!(judge(FIRST, Some(&pod), later(0)), Verdict::BackOff { .. }));
        assert!(matches!(
            judge(FIRST, Some(&pod), later(1)),
            Verdict::Start {
                attempt: 2,
                restarts: 1,
                ..
            }
        ));
        let second = Attempts {
            current: 2,
            restarts: 1,
            ..FIRST
        };
        assert!(matches!(judge(second, Some(&pod), later(1)), Verdict::BackOff { .. }));
        assert!(matches!(
            judge(second, Some(&pod), later(2)),
            Verdict::Start {
                attempt: 3,
                restarts: 2,
                ..
            }
        ));
    }

    #[test]
    fn one_failure_more_than_allowed_ends_the_run() {
        let used_up = Attempts {
            current: 3,
            restarts: 2,
            ..FIRST
        };
        let pod = pod(PodStage::Exited(ended(Some(1))));
        let Verdict::Fail { reason, message, .. } = judge(used_up, Some(&pod), later(99)) else {
            panic!("the run goes on");
        };
        assert_eq!(reason, reason::RESTART_LIMIT);
        assert!(message.contains("exit code 1"), "{message}");
    }

    #[test]
    fn exit_code_zero_without_a_last_word_is_tried_again() {
        let silent = Exit {
            progress: None,
            ..ended(Some(0))
        };
        assert!(matches!(
            judge(FIRST, Some(&pod(PodStage::Exited(silent))), later(9)),
            Verdict::Start { restarts: 1, .. }
        ));
        assert!(matches!(
            judge(FIRST, Some(&pod(PodStage::Exited(ended(Some(0))))), later(9)),
            Verdict::Done(_)
        ));
    }

    proptest! {
        #[test]
        fn counters_never_fall_and_the_limit_is_never_passed(
            current in 1_u32..50, restarts in 0_u32..10, max_restarts in 0_u32..10,
            code in proptest::option::of(prop_oneof![Just(0), Just(1), Just(78), Just(137), Just(143)]),
            disrupted: bool, terminating: bool, told: bool, second in 0_i64..200,
        ) {
            let exit = Exit { disrupted, progress: told.then(Box::<Progress>::default), ..ended(code) };
            let pod = PodView { terminating, ..pod(PodStage::Exited(exit)) };
            let attempts = Attempts { current, restarts, max_restarts };
            match judge(attempts, Some(&pod), later(second)) {
                Verdict::Start { attempt, restarts: then, .. } => {
                    prop_assert_eq!(attempt, current + 1);
                    prop_assert!(then == restarts || (then == restarts + 1 && then <= max_restarts));
                    prop_assert!(code != Some(78));
                }
                Verdict::Fail { .. } => prop_assert!(code == Some(78) || restarts >= max_restarts),
                Verdict::Done(_) => prop_assert_eq!(code, Some(0)),
                Verdict::BackOff { until, .. } => prop_assert!(until > later(second)),
                Verdict::Wait => prop_assert!(false, "an ended pod needs a decision"),
            }
        }
    }
}
