//! What to start next: init containers one after the other, then the containers, restarts with growing delays.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::record::{ContainerRecord, Exit, PodRecord, State};

/// `spec.restartPolicy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestartPolicy {
    /// After every end.
    Always,
    /// After a non-zero exit code.
    OnFailure,
    /// Not at all.
    Never,
}

impl RestartPolicy {
    /// Reads the field; absent means `Always`.
    pub fn parse(text: Option<&str>) -> Self {
        match text {
            Some("Never") => Self::Never,
            Some("OnFailure") => Self::OnFailure,
            _ => Self::Always,
        }
    }

    /// Whether a main container is started again after `exit`.
    pub fn restarts(self, exit: &Exit) -> bool {
        match self {
            Self::Always => true,
            Self::OnFailure => exit.code != 0,
            Self::Never => false,
        }
    }
}

/// Delays between restarts. The kubelet's are 10 s doubling up to 5 minutes, forgotten after a run of 10 minutes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// Delay before the second restart (the first has none).
    pub base: Duration,
    /// Longest delay.
    pub max: Duration,
    /// A run of this length begins a new row.
    pub reset_after: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            base: Duration::from_secs(10),
            max: Duration::from_secs(300),
            reset_after: Duration::from_secs(600),
        }
    }
}

impl Backoff {
    /// Delay before the next run of a container that has been restarted `restarts` times in a row.
    pub fn delay(&self, restarts: u32) -> Duration {
        match restarts {
            0 => Duration::ZERO,
            n => self.base.saturating_mul(2_u32.saturating_pow(n - 1)).min(self.max),
        }
    }

    fn row(&self, record: &ContainerRecord, exit: &Exit) -> u32 {
        let length = exit.finished_at.duration_since(exit.started_at);
        if length.unsigned_abs() >= self.reset_after {
            0
        } else {
            record.backoff
        }
    }
}

/// What one container waits for.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// Start it now; the number is the new length of its row of restarts.
    Start {
        /// Index in [`PodRecord::containers`].
        index: usize,
        /// New [`ContainerRecord::backoff`].
        backoff: u32,
    },
    /// Not before `until`.
    Wait {
        /// Index in [`PodRecord::containers`].
        index: usize,
        /// When to start it.
        until: Timestamp,
        /// The whole delay, for the message.
        delay: Duration,
        /// Length of its row of restarts so far.
        backoff: u32,
    },
}

/// Decides for every container that has its turn and does not run.
pub fn plan(policy: RestartPolicy, record: &PodRecord, backoff: &Backoff, now: Timestamp) -> Vec<Next> {
    if record.ended.is_some() {
        return Vec::new();
    }
    let indexed = || record.containers.iter().enumerate();
    let main_began = record
        .main()
        .any(|container| container.newest_exit().is_some() || is_running(container));
    if !main_began && let Some((index, container)) = indexed().find(|(_, c)| c.init && !c.succeeded()) {
        // An init container that fails is tried again under Always too; under Never it fails the pod.
        let policy = if policy == RestartPolicy::Always {
            RestartPolicy::OnFailure
        } else {
            policy
        };
        return next(policy, index, container, backoff, now).into_iter().collect();
    }
    indexed()
        .filter(|(_, container)| !container.init)
        .filter_map(|(index, container)| next(policy, index, container, backoff, now))
        .collect()
}

fn is_running(container: &ContainerRecord) -> bool {
    matches!(container.state, State::Running { .. })
}

fn next(
    policy: RestartPolicy,
    index: usize,
    container: &ContainerRecord,
    backoff: &Backoff,
    now: Timestamp,
) -> Option<Next> {
    match &container.state {
        State::Running { .. } => None,
        State::Waiting { until, .. } => {
            let restarted = container.last.is_some();
            match until {
                Some(until) if *until > now => {
                    let delay = until.duration_since(now).unsigned_abs();
                    Some(Next::Wait {
                        index,
                        until: *until,
                        delay,
                        backoff: container.backoff,
                    })
                }
                _ => Some(Next::Start {
                    index,
                    backoff: container.backoff + u32::from(restarted),
                }),
            }
        }
        State::Terminated(exit) if policy.restarts(exit) => {
            let row = backoff.row(container, exit);
            let delay = backoff.delay(row);
            let until = exit
                .finished_at
                .checked_add(SignedDuration::try_from(delay).unwrap_or(SignedDuration::MAX))
                .unwrap_or(Timestamp::MAX);
            Some(if until > now {
                Next::Wait {
                    index,
                    until,
                    delay,
                    backoff: row,
                }
            } else {
                Next::Start {
                    index,
                    backoff: row + 1,
                }
            })
        }
        State::Terminated(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn record(init: usize, main: usize) -> PodRecord {
        let containers = |count: usize, prefix: &str| -> Vec<Container> {
            (0..count)
                .map(|i| Container {
                    name: format!("{prefix}{i}"),
                    ..Container::default()
                })
                .collect()
        };
        let pod = Pod {
            spec: Some(PodSpec {
                init_containers: Some(containers(init, "i")),
                containers: containers(main, "m"),
                ..PodSpec::default()
            }),
            ..Pod::default()
        };
        PodRecord::new(&pod, at(0))
    }

    fn exit(code: i32, finished: i64) -> Exit {
        Exit {
            code,
            signal: None,
            reason: "Error".to_owned(),
            message: None,
            started_at: at(finished - 1),
            finished_at: at(finished),
            container_id: None,
        }
    }

    #[test]
    fn init_containers_come_one_after_the_other_and_before_the_rest() {
        let mut record = record(2, 2);
        let backoff = Backoff::default();
        let starts = |record: &PodRecord| plan(RestartPolicy::Never, record, &backoff, at(100));
        assert_eq!(starts(&record), [Next::Start { index: 0, backoff: 0 }]);
        record.containers[0].state = State::Running { started_at: at(1) };
        assert_eq!(starts(&record), []);
        record.containers[0].end(exit(0, 2));
        assert_eq!(starts(&record), [Next::Start { index: 1, backoff: 0 }]);
        record.containers[1].end(exit(0, 3));
        assert_eq!(
            starts(&record),
            [
                Next::Start { index: 2, backoff: 0 },
                Next::Start { index: 3, backoff: 0 }
            ]
        );
    }

    #[test]
    fn a_failed_init_container_ends_a_pod_that_never_restarts() {
        let mut record = record(1, 1);
        record.containers[0].end(exit(1, 2));
        assert_eq!(plan(RestartPolicy::Never, &record, &Backoff::default(), at(100)), []);
        assert_eq!(
            plan(RestartPolicy::Always, &record, &Backoff::default(), at(100)),
            [Next::Start { index: 0, backoff: 1 }]
        );
    }

    #[test]
    fn on_failure_restarts_only_failures() {
        let mut record = record(0, 2);
        record.containers[0].end(exit(0, 2));
        record.containers[1].end(exit(3, 2));
        assert_eq!(
            plan(RestartPolicy::OnFailure, &record, &Backoff::default(), at(2)),
            [Next::Start { index: 1, backoff: 1 }]
        );
    }

    #[test]
    fn the_first_restart_is_immediate_and_the_later_ones_wait_twice_as_long_each() {
        let backoff = Backoff::default();
        let delays: Vec<u64> = (0..8).map(|n| backoff.delay(n).as_secs()).collect();
        assert_eq!(delays, [0, 10, 20, 40, 80, 160, 300, 300]);
        let mut record = record(0, 1);
        record.containers[0].backoff = 2;
        record.containers[0].end(exit(1, 100));
        assert_eq!(
            plan(RestartPolicy::Always, &record, &backoff, at(100)),
            [Next::Wait {
                index: 0,
                until: at(120),
                delay: Duration::from_secs(20),
                backoff: 2
            }]
        );
        assert_eq!(
            plan(RestartPolicy::Always, &record, &backoff, at(120)),
            [Next::Start { index: 0, backoff: 3 }]
        );
    }

    #[test]
    fn a_long_run_begins_a_new_row_of_restarts() {
        let mut record = record(0, 1);
        record.containers[0].backoff = 6;
        record.containers[0].end(Exit {
            started_at: at(0),
            ..exit(1, 1000)
        });
        assert_eq!(
            plan(RestartPolicy::Always, &record, &Backoff::default(), at(1000)),
            [Next::Start { index: 0, backoff: 1 }]
        );
    }

    #[test]
    fn nothing_is_started_in_a_pod_that_the_node_ended() {
        let mut record = record(0, 1);
        record.ended = Some(("DeadlineExceeded".to_owned(), String::new()));
        assert_eq!(plan(RestartPolicy::Always, &record, &Backoff::default(), at(1)), []);
    }
}
