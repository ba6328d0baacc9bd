//! How one of several operators becomes the leader.

use std::time::Duration;

/// Settings of one candidate.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ElectionConfig {
    /// Name of this process in the Lease; no other process may have it, not even an earlier one of the same pod.
    pub identity: String,
    /// Namespace of the Lease.
    pub namespace: String,
    /// Name of the Lease.
    pub name: String,
    /// A candidate takes over when it has seen the Lease unchanged for so long.
    pub lease_duration: Duration,
    /// A leader that could not renew for so long has stopped writing and ends.
    pub renew_deadline: Duration,
    /// Time between two renewals, and between two looks of a candidate.
    pub retry_period: Duration,
}

/// Settings with which two operators could write at the same time, or none at all.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ElectionConfigError {
    /// A leader must stop before another one begins.
    #[error(
        "the renew deadline ({renew_deadline:?}) must be shorter than the lease duration ({lease_duration:?}): \
         a leader stops writing after the first, another one begins after the second"
    )]
    DeadlineTooLong {
        /// As given.
        renew_deadline: Duration,
        /// As given.
        lease_duration: Duration,
    },
    /// A single lost request must not end a term.
    #[error(
        "the retry period ({retry_period:?}) must be at most half of the renew deadline ({renew_deadline:?}): \
         one lost request would end the leader"
    )]
    RetryTooLong {
        /// As given.
        retry_period: Duration,
        /// As given.
        renew_deadline: Duration,
    },
}

impl ElectionConfig {
    /// Defaults: the values of Kubernetes' own components.
    pub fn new(identity: impl Into<String>, namespace: impl Into<String>) -> Self {
        Self {
            identity: identity.into(),
            namespace: namespace.into(),
            name: "flotilla-operator".into(),
            lease_duration: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry_period: Duration::from_secs(2),
        }
    }

    /// Refuses settings that break the promise of one leader at a time.
    pub fn check(&self) -> Result<(), ElectionConfigError> {
        if self.renew_deadline >= self.lease_duration {
            return Err(ElectionConfigError::DeadlineTooLong {
                renew_deadline: self.renew_deadline,
                lease_duration: self.lease_duration,
            });
        }
        if self.retry_period.saturating_mul(2) > self.renew_deadline {
            return Err(ElectionConfigError::RetryTooLong {
                retry_period: self.retry_period,
                renew_deadline: self.renew_deadline,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_let_two_write_are_refused() {
        let good = ElectionConfig::new("a", "flotilla-system");
        assert_eq!(good.check(), Ok(()));
        let overlapping = ElectionConfig {
            renew_deadline: good.lease_duration,
            ..good.clone()
        };
        assert!(matches!(
            overlapping.check(),
            Err(ElectionConfigError::DeadlineTooLong { .. })
        ));
        let brittle = ElectionConfig {
            retry_period: Duration::from_secs(6),
            ..good
        };
        assert!(matches!(brittle.check(), Err(ElectionConfigError::RetryTooLong { .. })));
    }
}
