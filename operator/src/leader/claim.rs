//! What a candidate does about the Lease it read. No client and no clock.
//!
//! Whether a lease has run out is judged by how long *this* process has seen it unchanged, never by the time that its holder
//! wrote into it: clocks of two machines differ.

use std::time::Duration;

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};

use super::{config::ElectionConfig, moment::Moment};

/// A Lease, and since when this process knows it in this form.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// As it was read.
    pub lease: Lease,
    /// When it was first read like that.
    pub since: Moment,
}

impl Seen {
    /// A Lease that was read at `now`, after `before`.
    pub fn next(before: Option<Self>, lease: Lease, now: Moment) -> Self {
        let since = match before {
            Some(before) if before.lease.spec == lease.spec => before.since,
            _ => now,
        };
        Self { lease, since }
    }
}

/// What a candidate does next.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// There is no Lease: make one.
    Create,
    /// Nobody holds it, or its holder let it run out: write this process into it.
    Take,
    /// Another one holds it: read it again after so long.
    Wait(Duration),
}

/// Decides.
pub fn step(seen: Option<&Seen>, config: &ElectionConfig, now: Moment) -> Step {
    let Some(seen) = seen else { return Step::Create };
    match holder(&seen.lease) {
        None => Step::Take,
        // A write whose answer was lost.
        Some(holder) if holder == config.identity => Step::Take,
        Some(_) => {
            let left = seen.since.after(term(&seen.lease, config)).since(now);
            if left.is_zero() {
                Step::Take
            } else {
                Step::Wait(left.min(config.retry_period))
            }
        }
    }
}

/// Who holds it.
pub fn holder(lease: &Lease) -> Option<&str> {
    let holder = lease.spec.as_ref()?.holder_identity.as_deref()?;
    (!holder.is_empty()).then_some(holder)
}

/// How long its holder may stay silent: what the holder promised, since it counts on that.
fn term(lease: &Lease, config: &ElectionConfig) -> Duration {
    let seconds = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds);
    let promised = seconds.and_then(|seconds| u64::try_from(seconds).ok());
    promised.map_or(config.lease_duration, Duration::from_secs)
}

/// The Lease with this process as its holder. The version of `known` stays in it, so a write that anybody was faster than is
/// a conflict and not a second leader.
pub fn held(known: Option<&Lease>, config: &ElectionConfig, now: Timestamp) -> Lease {
    let before = known.and_then(|lease| lease.spec.clone()).unwrap_or_default();
    let continues = known.and_then(holder) == Some(config.identity.as_str());
    let transitions = before.lease_transitions.unwrap_or(0);
    let metadata = known.map_or_else(
        || ObjectMeta {
            name: Some(config.name.clone()),
            namespace: Some(config.namespace.clone()),
            ..ObjectMeta::default()
        },
        |lease| lease.metadata.clone(),
    );
    Lease {
        metadata,
        spec: Some(LeaseSpec {
            holder_identity: Some(config.identity.clone()),
            lease_duration_seconds: i32::try_from(config.lease_duration.as_secs()).ok(),
            acquire_time: before
                .acquire_time
                .clone()
                .filter(|_| continues)
                .or(Some(MicroTime(now))),
            renew_time: Some(MicroTime(now)),
            lease_transitions: Some(if continues || known.is_none() {
                transitions
            } else {
                transitions.saturating_add(1)
            }),
            ..before
        }),
    }
}

/// The Lease without a holder: the next candidate need not wait.
pub fn released(known: &Lease, now: Timestamp) -> Lease {
    let before = known.spec.clone().unwrap_or_default();
    Lease {
        metadata: known.metadata.clone(),
        spec: Some(LeaseSpec {
            holder_identity: None,
            renew_time: Some(MicroTime(now)),
            ..before
        }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config(identity: &str) -> ElectionConfig {
        ElectionConfig::new(identity, "flotilla-system")
    }

    fn at(seconds: u64) -> Moment {
        Moment::NEVER.after(Duration::from_secs(seconds))
    }

    fn time(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("in range")
    }

    #[test]
    fn without_a_lease_one_is_made_and_a_free_one_is_taken() {
        let (a, b) = (config("a"), config("b"));
        assert_eq!(step(None, &a, at(1)), Step::Create);
        let free = released(&held(None, &b, time(1)), time(2));
        let seen = Seen::next(None, free, at(1));
        assert_eq!(step(Some(&seen), &a, at(1)), Step::Take);
    }

    #[test]
    fn a_held_lease_is_taken_only_after_it_was_seen_unchanged_for_its_whole_term() {
        let (a, b) = (config("a"), config("b"));
        let seen = Seen::next(None, held(None, &b, time(1)), at(100));
        assert_eq!(step(Some(&seen), &a, at(100)), Step::Wait(a.retry_period));
        assert_eq!(step(Some(&seen), &a, at(114)), Step::Wait(Duration::from_secs(1)));
        assert_eq!(step(Some(&seen), &a, at(115)), Step::Take);
        let renewed = Seen::next(Some(seen), held(None, &b, time(2)), at(114));
        assert_eq!(step(Some(&renewed), &a, at(115)), Step::Wait(a.retry_period));
    }

    #[test]
    fn the_time_that_the_holder_wrote_does_not_matter() {
        let (a, b) = (config("a"), config("b"));
        let of_a_clock_years_behind = held(None, &b, time(0));
        let seen = Seen::next(None, of_a_clock_years_behind, at(100));
        assert_eq!(step(Some(&seen), &a, at(101)), Step::Wait(a.retry_period));
    }

    #[test]
    fn the_promise_of_the_holder_counts_and_not_our_own_setting() {
        let mut b = config("b");
        b.lease_duration = Duration::from_secs(60);
        let seen = Seen::next(None, held(None, &b, time(1)), at(0));
        assert_eq!(
            step(Some(&seen), &config("a"), at(59)),
            Step::Wait(Duration::from_secs(1))
        );
    }

    #[test]
    fn a_renewal_keeps_the_time_of_the_takeover_and_a_takeover_counts() {
        let (a, b) = (config("a"), config("b"));
        let first = held(None, &b, time(1));
        let renewed = held(Some(&first), &b, time(2)).spec.expect("a spec");
        assert_eq!(renewed.acquire_time, Some(MicroTime(time(1))));
        assert_eq!(renewed.renew_time, Some(MicroTime(time(2))));
        assert_eq!(renewed.lease_transitions, Some(0));
        let taken = held(Some(&first), &a, time(3)).spec.expect("a spec");
        assert_eq!(taken.acquire_time, Some(MicroTime(time(3))));
        assert_eq!(taken.lease_transitions, Some(1));
    }

    proptest! {
        /// The promise between two processes: a leader that began its last renewal at `renewed` has stopped writing before
        /// a candidate, which cannot have seen that renewal earlier, takes over.
        #[test]
        fn a_leader_has_stopped_writing_before_anybody_takes_over(
            renewed in 0_u64..1000, seen_after in 0_u64..20, waited in 0_u64..60,
        ) {
            let (a, b) = (config("a"), config("b"));
            let seen = Seen::next(None, held(None, &b, time(1)), at(renewed + seen_after));
            let now = at(renewed + seen_after + waited);
            if step(Some(&seen), &a, now) == Step::Take {
                prop_assert!(now >= at(renewed).after(b.renew_deadline));
            }
        }
    }
}
