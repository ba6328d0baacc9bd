//! When a pod must stop, and how its containers are stopped.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::time::Instant;

use super::container::{Run, run_hook};

/// Seconds that a pod without `terminationGracePeriodSeconds` gets.
const DEFAULT_GRACE: u64 = 30;
/// The least time between SIGTERM and SIGKILL, even when a pod is deleted by force.
const LEAST_GRACE: Duration = Duration::from_secs(1);

/// Time that a pod has between SIGTERM and SIGKILL: what the deletion says, else what its spec says.
pub fn grace_period(pod: &Pod) -> Duration {
    let spec = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
    let deletion = pod
        .metadata
        .deletion_timestamp
        .as_ref()
        .and(pod.metadata.deletion_grace_period_seconds);
    let seconds = deletion
        .or(spec)
        .and_then(|seconds| u64::try_from(seconds).ok())
        .unwrap_or(DEFAULT_GRACE);
    Duration::from_secs(seconds).max(LEAST_GRACE)
}

/// The least grace period, for a pod that is gone from the API already.
pub fn least_grace() -> Duration {
    LEAST_GRACE
}

impl Run {
    /// Begins to stop: `preStop` hook, then SIGTERM. A second call can only bring SIGKILL forward. True the first time.
    pub fn stop(&mut self, grace: Duration) -> bool {
        let kill_at = Instant::now() + grace;
        if let Some(earlier) = self.kill_at {
            self.kill_at = Some(earlier.min(kill_at));
            return false;
        }
        self.kill_at = Some(kill_at);
        self.quiet();
        let hook = self
            .target
            .container
            .lifecycle
            .as_ref()
            .and_then(|lifecycle| lifecycle.pre_stop.clone());
        let (process, target) = (std::sync::Arc::clone(&self.process), self.target.clone());
        tokio::spawn(async move {
            if let Some(hook) = hook
                && let Err(error) = run_hook(&hook, &target, grace).await
            {
                tracing::warn!(container = target.container.name, error, "a preStop hook failed");
            }
            process.terminate();
        });
        true
    }

    /// Sends SIGKILL if its time has come.
    pub fn kill_when_due(&self, now: Instant) {
        if self.kill_at.is_some_and(|at| at <= now) {
            self.process.kill();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(value: serde_json::Value) -> Pod {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn the_deletion_decides_over_the_spec_and_the_spec_over_the_default() {
        assert_eq!(grace_period(&Pod::default()), Duration::from_secs(30));
        let spec = serde_json::json!({"spec": {"containers": [], "terminationGracePeriodSeconds": 5}});
        assert_eq!(grace_period(&pod(spec.clone())), Duration::from_secs(5));
        let mut deleted = spec;
        deleted["metadata"] =
            serde_json::json!({"deletionTimestamp": "2026-01-01T00:00:00Z", "deletionGracePeriodSeconds": 2});
        assert_eq!(grace_period(&pod(deleted)), Duration::from_secs(2));
    }

    #[test]
    fn even_a_forced_deletion_leaves_one_second() {
        let forced = serde_json::json!({
            "metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z", "deletionGracePeriodSeconds": 0}
        });
        assert_eq!(grace_period(&pod(forced)), Duration::from_secs(1));
    }
}
